"""What the lookups propose, and that the C form proposes the same."""

from __future__ import annotations

import random

import pytest
import torch

from octavo.core.messages import NewSlot
from octavo.sampling_params import SamplingParams
from octavo.speculation.cpu_lookup import CpuLookup
from octavo.speculation.lookup import Prediction, PythonLookup, prompt_lookup
from octavo.speculation.proposer import Proposer
from octavo.worker.cpu_step import CpuStep
from octavo.worker.input_batch import DeviceState


@pytest.mark.parametrize(
    ("text", "count", "drafts"),
    [
        ([1, 2, 3, 4, 9, 1, 2], 3, [3, 4, 9]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, [4, 1]),  # the latest of equally long matches
        ([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2], 1, [3]),  # the longest match before the latest
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([7, 7], 4, []),  # one token is no match
        ([7, 7, 7], 4, [7, 7, 7, 7]),  # a loop goes on
        ([1, 2, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
        ([1, 2, 3, 1, 2], 0, []),
    ],
)
def test_prompt_lookup(text: list[int], count: int, drafts: list[int]) -> None:
    assert prompt_lookup(text, count) == drafts


def test_a_prediction_is_followed_from_the_start() -> None:
    prediction = Prediction([1, 2, 3, 4, 5])
    assert prediction.drafts(2) == [1, 2]
    prediction.follow([1, 2, 3])
    assert prediction.drafts(9) == [4, 5]


def test_a_replaced_token_is_stepped_over() -> None:
    prediction = Prediction([1, 2, 3, 4, 5])
    prediction.follow([1, 9])
    assert prediction.drafts(3) == [3, 4, 5]


def test_an_insertion_is_found_again() -> None:
    prediction = Prediction([1, 2, 3, 4, 5, 6])
    prediction.follow([1, 9, 9, 9, 2, 3])
    assert prediction.drafts(2) == [4, 5]


def test_a_deletion_is_found_again() -> None:
    prediction = Prediction([1, 2, 3, 4, 5, 6, 7])
    prediction.follow([1, 5, 6])
    assert prediction.drafts(2) == [7]


def test_a_prediction_ends() -> None:
    prediction = Prediction([1, 2])
    prediction.follow([1, 2, 3, 4])
    assert prediction.drafts(4) == []


def slot(index: int, prompt: list[int], prediction: list[int], limit: int) -> NewSlot:
    return NewSlot(
        index,
        1,
        str(index),
        prompt,
        len(prompt),
        [0],
        0,
        SamplingParams(),
        0,
        (),
        limit,
        (),
        tuple(prediction),
    )


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_both_forms_propose_the_same(seed: int, prompt: bool) -> None:
    rng = random.Random(seed)
    states = [DeviceState(4, 200, 16, torch.device("cpu")) for _ in range(2)]
    proposers: list[Proposer] = [
        PythonLookup(states[0], prompt=prompt),
        CpuLookup(CpuStep(states[1]).tables, prompt=prompt),
    ]
    total = 0
    for index in range(4):
        text = [rng.randrange(4) for _ in range(rng.randint(1, 30))]
        prediction = [rng.randrange(4) for _ in range([0, 3, 60, 120][index])]
        new = slot(index, text, prediction, rng.randint(60, 200))
        for state, proposer in zip(states, proposers, strict=True):
            state.put(new)
            proposer.enter(new)
    for _ in range(60):
        chosen = rng.sample(range(4), rng.randint(1, 4))
        counts = [rng.randint(0, 6) for _ in chosen]
        for proposer in proposers:
            proposer.propose(chosen, counts)
        assert states[0].num_drafts[chosen].tolist() == states[1].num_drafts[chosen].tolist()
        for index in chosen:
            known, count = int(states[0].num_tokens[index]), int(states[0].num_drafts[index])
            drafts = [state.tokens[index, known : known + count].tolist() for state in states]
            assert drafts[0] == drafts[1]
            total += count
            came = [*drafts[0][: rng.randint(0, count)], rng.randrange(4)]
            came = came[: int(states[0].limit[index]) - known]
            for state in states:
                state.tokens[index, known : known + len(came)] = torch.tensor(came, dtype=torch.int32)
                state.num_tokens[index] += len(came)
                if int(state.num_tokens[index]) >= int(state.limit[index]):
                    state.finished[index] = True
    assert total > 50
