"""Small makers shared by the sampling tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from octavo.sampling.batch import SamplingBatch, SamplingSlots, compile_params
from octavo.sampling_params import SamplingParams


def make_batch(
    params: list[SamplingParams],
    *,
    vocab_size: int,
    positions: list[int] | None = None,
    seeds: list[int] | None = None,
    histories: list[list[int]] | None = None,
    prompt_lengths: list[int] | None = None,
    **compile_options: Any,
) -> SamplingBatch:
    """A batch of one row a request, built the way a model runner builds it."""
    num = len(params)
    if histories is None:
        positions = positions if positions is not None else [10] * num
        histories = [[0] * position for position in positions]
    positions = [len(history) for history in histories]
    seeds = seeds if seeds is not None else [param.seed or 0 for param in params]
    prompt_lengths = prompt_lengths if prompt_lengths is not None else positions
    table = torch.zeros(num, max(positions) + 1, dtype=torch.int32)
    slots = SamplingSlots(num)
    for slot, history in enumerate(histories):
        table[slot, : len(history)] = torch.tensor(history, dtype=torch.int32)
        slots.put(
            slot,
            compile_params(
                params[slot],
                seed=seeds[slot],
                num_prompt_tokens=prompt_lengths[slot],
                vocab_size=vocab_size,
                **compile_options,
            ),
        )
    return slots.batch(np.arange(num), torch.tensor(positions), table)


def random_logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    """Normal logits, float32 [rows, vocab_size]."""
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
