"""Building a step's batch: right values in right rows, parts only where needed, and cheap."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from octavo.sampling.batch import SamplingSlots, compile_params
from octavo.sampling_params import SamplingParams


def plain_slots(num_slots: int) -> SamplingSlots:
    slots = SamplingSlots(num_slots)
    for slot in range(num_slots):
        params = SamplingParams(temperature=slot / 100, top_p=0.9, top_k=slot)
        slots.put(slot, compile_params(params, seed=-slot, num_prompt_tokens=4, vocab_size=50))
    return slots


def test_rows_take_the_columns_of_their_slots() -> None:
    slots = plain_slots(100)
    positions = torch.tensor([5, 6, 7, -1])
    batch = slots.batch(np.array([7, 7, 60, 0]), positions, torch.zeros(100, 8, dtype=torch.int32))
    torch.testing.assert_close(batch.temperature, torch.tensor([0.07, 0.07, 0.6, 0.0]))
    assert batch.top_k.tolist() == [7, 7, 0, 0]  # 60 is the whole vocabulary: off
    assert batch.seed.tolist() == [-7, -7, -60, 0]
    assert batch.position.tolist() == [5, 6, 7, -1]
    assert not batch.all_greedy
    assert not batch.changes_logits
    assert batch.num_logprobs is None


def test_large_seeds_keep_their_bits() -> None:
    slots = SamplingSlots(1)
    seed = 2**64 - 3
    slots.put(0, compile_params(SamplingParams(), seed=seed, num_prompt_tokens=1, vocab_size=9))
    batch = slots.batch(np.array([0]), torch.tensor([1]), torch.zeros(1, 4, dtype=torch.int32))
    assert batch.seed.tolist() == [-3]


def test_what_a_request_needed_leaves_with_it() -> None:
    slots = SamplingSlots(2)
    table = torch.zeros(2, 8, dtype=torch.int32)
    rows, positions = np.array([0, 1]), torch.tensor([5, 5])
    special = SamplingParams(
        temperature=0,
        presence_penalty=1.0,
        logit_bias={1: 1.0},
        allowed_token_ids=[1, 2],
        logprobs=2,
        min_tokens=9,
    )
    plain = SamplingParams(temperature=0)
    compiled_special = compile_params(special, seed=0, num_prompt_tokens=4, vocab_size=64, stop_ids=[3])
    compiled_plain = compile_params(plain, seed=0, num_prompt_tokens=4, vocab_size=64, stop_ids=[3])
    slots.put(0, compiled_special)
    slots.put(1, compiled_plain)
    batch = slots.batch(rows, positions, table)
    assert batch.all_greedy
    assert batch.changes_logits
    assert batch.num_logprobs == [2, -1]
    assert batch.penalties is not None
    assert batch.penalties.rows == [0]
    for next_request in (None, compiled_plain):
        slots.put(0, compiled_special)
        if next_request is None:
            slots.remove(0)
        else:
            slots.put(0, next_request)
        batch = slots.batch(rows, positions, table)
        assert not batch.changes_logits
        assert batch.num_logprobs is None


def test_settings_without_effect_are_plain() -> None:
    for params, stop_ids in [
        (SamplingParams(min_tokens=5), []),  # nothing to ban
        (SamplingParams(logit_bias={}), [1]),
        (SamplingParams(repetition_penalty=1.0), [1]),
    ]:
        assert compile_params(params, seed=0, num_prompt_tokens=1, vocab_size=9, stop_ids=stop_ids).is_plain


def test_a_plain_batch_of_256_rows_costs_little() -> None:
    slots = plain_slots(256)
    rows, positions = np.arange(256), torch.arange(256)
    table = torch.zeros(256, 4, dtype=torch.int32)
    best = min(_timed(lambda: slots.batch(rows, positions, table)) for _ in range(50))
    assert best < 1e-3


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
