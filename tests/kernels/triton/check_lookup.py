"""The lookups' kernels propose what the Python form does."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.kernels.triton import lookup  # noqa: E402
from octavo.speculation.gpu_lookup import GpuLookup  # noqa: E402
from octavo.speculation.lookup import PythonLookup  # noqa: E402
from octavo.speculation.proposer import Proposer  # noqa: E402
from octavo.worker.gpu_step import slot_tables  # noqa: E402
from octavo.worker.input_batch import DeviceState  # noqa: E402
from tests.speculation.test_lookup import slot  # noqa: E402


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_both_forms_propose_the_same(seed: int, prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "BLOCK", 16)
    monkeypatch.setattr(lookup, "PART", 32)  # several programs, several rounds each
    rng = random.Random(seed)
    states = [DeviceState(4, 200, 16, torch.device("cpu")) for _ in range(2)]
    proposers: list[Proposer] = [
        PythonLookup(states[0], prompt=prompt),
        GpuLookup(slot_tables(states[1]), prompt=prompt),
    ]
    total = 0
    for index in range(4):
        text = [rng.randrange(4) for _ in range(rng.randint(1, 60))]
        prediction = [rng.randrange(4) for _ in range([0, 3, 60, 120][index])]
        new = slot(index, text, prediction, rng.randint(90, 200))
        for state, proposer in zip(states, proposers, strict=True):
            state.put(new)
            proposer.enter(new)
    for _ in range(15):
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
    assert total > 20
