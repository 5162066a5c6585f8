"""Random requests with penalties, bias, bans and masks, for tests of the kernels that apply them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from octavo.sampling.batch import Bitmask, SamplingBatch, SamplingSlots, compile_params
from octavo.sampling.device_rules import DeviceRules
from octavo.sampling.gpu_draw import GpuDraw
from octavo.sampling.processors import apply_processors
from octavo.sampling_params import SamplingParams

VOCAB, SLOTS, LENGTH = 90, 6, 40


def random_params(source: random.Random) -> tuple[SamplingParams, dict[str, Any]]:
    options: dict[str, Any] = {}
    if source.random() < 0.5:
        options["repetition_penalty"] = source.choice([0.7, 1.3, 5.0])
    if source.random() < 0.5:
        options["presence_penalty"] = source.uniform(-2, 2)
    if source.random() < 0.5:
        options["frequency_penalty"] = source.uniform(-2, 2)
    if source.random() < 0.4:
        options["logit_bias"] = {source.randrange(VOCAB): source.uniform(-9, 9) for _ in range(20)}
    if source.random() < 0.3:
        options["allowed_token_ids"] = source.sample(range(VOCAB), 30)
    if source.random() < 0.4:
        options["min_tokens"] = source.randrange(1, 12)
    # of the few tokens that texts are made of, and mostly long, so that some are there and others are not
    lengths = [source.choice([1, 2, 2, 3, 4]) for _ in range(source.choice([0, 4, 20]))]
    words = [[*(source.randrange(5) for _ in range(length - 1)), source.randrange(9)] for length in lengths]
    compiled = {
        "seed": 1, "num_prompt_tokens": source.randrange(1, 20), "vocab_size": VOCAB,
        "stop_ids": source.sample(range(VOCAB), source.randrange(4)), "bad_words_ids": words,
    }  # fmt: skip
    return SamplingParams(**options), compiled


def both(number: int, device: torch.device) -> tuple[SamplingSlots, SamplingSlots, torch.Tensor]:
    """The same random requests, their rules on the host and on the device, and their texts."""
    source = random.Random(number)
    on_host = SamplingSlots(SLOTS)
    on_device = SamplingSlots(SLOTS, DeviceRules(SLOTS, VOCAB, device))
    for slot in [*range(SLOTS), *range(0, SLOTS, 2)]:  # some are followed by others
        params, options = random_params(source)
        for slots in (on_host, on_device):
            slots.put(slot, compile_params(params, **options))
    generator = torch.Generator().manual_seed(number)
    # few different tokens, so that they repeat, and some that this vocabulary lacks
    tokens = torch.randint(0, 5, (SLOTS, LENGTH), generator=generator, dtype=torch.int32)
    tokens[:, 7], tokens[:, 8] = VOCAB + 3, -1
    return on_host, on_device, tokens


def edited(
    slots: SamplingSlots, tokens: torch.Tensor, number: int, device: torch.device
) -> tuple[torch.Tensor, SamplingBatch]:
    """Random rows of these requests, some of them the rows of a verify, with their rules applied."""
    source = np.random.default_rng(number)
    row_slots = np.sort(source.integers(0, SLOTS, 14))
    positions = torch.from_numpy(source.integers(0, LENGTH, 14))
    positions[3] = -1
    generator = torch.Generator().manual_seed(number)
    logits = (torch.randn(14, VOCAB, generator=generator) * 3).to(device)
    mask = torch.randint(-(2**31), 2**31, (2, 2), generator=generator)
    grammar = Bitmask(torch.tensor([1, 9]), mask.to(torch.int32)) if number % 2 else None
    batch = slots.batch(row_slots, positions.to(device), tokens.to(device), grammar)
    if batch.changes_logits:
        (apply_processors if batch.rules is None else GpuDraw().process)(logits, batch)
    logits[3] = 0.0  # padding: nobody looks
    return logits.cpu(), batch


def compare(device: torch.device, number: int) -> int:
    """Assert that the device does what the host's functions do, to the bit; returns the rows changed."""
    on_host, on_device, tokens = both(number, device)
    expected, _ = edited(on_host, tokens, number, torch.device("cpu"))
    found, batch = edited(on_device, tokens, number, device)
    assert torch.equal(found, expected), number
    assert batch.penalties is None
    if batch.rules is None:
        return 0
    assert not batch.rules.rules.counters.any()  # zero again
    return len(batch.rules.rows)
