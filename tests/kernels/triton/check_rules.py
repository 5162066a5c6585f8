"""What requests' own rules do to logits: the device's kernels against the host's functions, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.kernels.triton import rules  # noqa: E402
from octavo.sampling.batch import SamplingSlots, compile_params  # noqa: E402
from octavo.sampling.device_rules import DeviceRules  # noqa: E402
from octavo.sampling.gpu_draw import GpuDraw  # noqa: E402
from octavo.sampling_params import SamplingParams  # noqa: E402
from tests.kernels.random_rules import VOCAB, compare  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("room", [64, 2])
def test_as_on_the_host(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two counted rows most steps take several launches."""
    monkeypatch.setattr(rules, "COUNTED_ROWS", room)
    monkeypatch.setattr(rules, "_BLOCK", 16)
    changed = sum(compare(CPU, number) for number in range(4))
    assert changed > 20


def test_records_grow_and_nothing_is_left_of_the_last_request() -> None:
    table = DeviceRules(3, VOCAB, CPU)
    slots = SamplingSlots(3, table)
    many = dict.fromkeys(range(VOCAB), 1.0)

    def enter(slot: int, params: SamplingParams) -> None:
        slots.put(slot, compile_params(params, seed=0, num_prompt_tokens=1, vocab_size=VOCAB))

    enter(0, SamplingParams(logit_bias={3: 2.0}))
    enter(1, SamplingParams(logit_bias=many))
    assert table.records.shape[1] >= 2 * VOCAB
    logits = torch.zeros(2, VOCAB)
    positions, tokens = torch.tensor([2, 2]), torch.zeros(3, 8, dtype=torch.int32)
    batch = slots.batch(np.array([0, 1]), positions, tokens)
    GpuDraw().process(logits, batch)
    assert logits[0].nonzero().tolist() == [[3]]
    assert bool((logits[1] == 1.0).all())
    enter(1, SamplingParams(presence_penalty=1.0))
    logits = torch.zeros(1, VOCAB)
    GpuDraw().process(logits, slots.batch(np.array([1]), positions[:1], tokens))
    assert logits[0].nonzero().tolist() == [[0]]  # the text is zeros, one of them the prompt
    slots.remove(1)
    assert slots.batch(np.array([1]), positions[:1], tokens).rules is None
