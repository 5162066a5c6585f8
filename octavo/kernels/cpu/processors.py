"""Bit masks and penalties on logits: launchers for `src/processors.c`.

What they do is defined by octavo/sampling/processors.py, to the bit. Rows are worked on in parallel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from octavo.kernels.cpu._checks import check
from octavo.kernels.cpu.library import CpuLibrary, load


class _Penalties(ctypes.Structure):
    """`oc_penalties`."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("prompt_lengths", ctypes.c_void_p),
        ("repetition", ctypes.c_void_p),
        ("presence", ctypes.c_void_p),
        ("frequency", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("tokens_stride", ctypes.c_int64),
        ("num_entries", ctypes.c_int64),
    )


@cache
def _functions(library: CpuLibrary) -> tuple[Any, Any]:
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    return (
        library.function("oc_mask_rows", None, [pointer, size, size, pointer, pointer, size, size, flag]),
        library.function("oc_penalize_rows", flag, [pointer, size, size, ctypes.POINTER(_Penalties), flag]),
    )


def _check_indices(name: str, values: Sequence[int], limit: int) -> None:
    if values and not 0 <= min(values) <= max(values) < limit:
        raise ValueError(f"{name} must be in [0, {limit}), not {min(values)} to {max(values)}")


def mask_rows(
    logits: torch.Tensor,  # [rows, vocab] float32, written to
    rows: torch.Tensor,  # [entries] int64
    words: torch.Tensor,  # [entries, num_words] int32, bit (id % 32) of word (id // 32)
    *,
    library: CpuLibrary | None = None,
) -> None:
    """Tokens whose bit is 0, and those behind the last word, become -inf in these rows."""
    check(logits, "logits", [None, None], torch.float32, rows_only=True)
    check(rows, "rows", [None], torch.int64)
    check(words, "words", [len(rows), None], torch.int32)
    indices = rows.tolist()
    _check_indices("rows", indices, len(logits))
    _functions(library or load())[0](
        logits.data_ptr(),
        logits.shape[1],
        logits.stride(0),
        rows.data_ptr(),
        words.data_ptr(),
        len(indices),
        words.shape[1],
        len(set(indices)) == len(indices),
    )


def penalize_rows(
    logits: torch.Tensor,  # [rows, vocab] float32, written to
    rows: Sequence[int],
    slots: Sequence[int],  # rows of `tokens`
    lengths: Sequence[int],  # of each history, prompt included
    prompt_lengths: Sequence[int],
    repetition: Sequence[float],
    presence: Sequence[float],
    frequency: Sequence[float],
    tokens: torch.Tensor,  # [slots, max_len] int32
    *,
    library: CpuLibrary | None = None,
) -> None:
    """Repetition over prompt and output, frequency and presence over the output, in this order."""
    check(logits, "logits", [None, None], torch.float32, rows_only=True)
    check(tokens, "tokens", [None, None], torch.int32, rows_only=True)
    _check_indices("rows", rows, len(logits))
    _check_indices("slots", slots, len(tokens))
    _check_indices("lengths", lengths, tokens.shape[1] + 1)
    if any(length < 0 for length in prompt_lengths):
        raise ValueError("prompt_lengths must not be negative")
    integers = torch.tensor([rows, slots, lengths, prompt_lengths], dtype=torch.int64)
    factors = torch.tensor([repetition, presence, frequency], dtype=torch.float32)
    check(factors, "factors", [3, len(rows)])
    view = _Penalties(
        *(column.data_ptr() for column in integers),
        *(column.data_ptr() for column in factors),
        tokens.data_ptr(),
        tokens.stride(0),
        len(rows),
    )
    status = _functions(library or load())[1](
        logits.data_ptr(), logits.shape[1], logits.stride(0), ctypes.byref(view), len(set(rows)) == len(rows)
    )
    if status:
        raise MemoryError("the penalty kernel could not get memory for one count a token")
