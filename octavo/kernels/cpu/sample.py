"""Drawing tokens and log-probabilities on the CPU: launchers for `src/sample.c` and `src/logprobs.c`.

`src/sample.c` says which tokens are kept and `src/noise.h` what the noise is, step by step. Rows
are independent: a row's token does not depend on the other rows nor on the number of threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from octavo.kernels.cpu._checks import check
from octavo.kernels.cpu.library import CpuLibrary, load

MAX_TOP = 64
_MASK32 = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class _Functions:
    argmax: Any
    sample: Any
    logprobs: Any
    exponentials: Any
    philox: Any


@cache
def _functions(library: CpuLibrary) -> _Functions:
    pointer, size, flag, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32
    rows = [pointer, size, size, size]
    return _Functions(
        argmax=library.function("oc_argmax_rows", None, [*rows, pointer]),
        sample=library.function("oc_sample_rows", flag, [*rows, *[pointer] * 6, word, pointer]),
        logprobs=library.function("oc_logprobs_rows", flag, [*rows, pointer, flag, *[pointer] * 4]),
        exponentials=library.function("oc_exponentials", None, [ctypes.c_uint64, size, word, size, pointer]),
        philox=library.function("oc_philox", None, [pointer, ctypes.c_uint64, pointer]),
    )


class Logprobs(NamedTuple):
    """Log softmax of raw logits. Columns of `top_*` by logprob descending, equal ones by id."""

    token_logprobs: torch.Tensor  # [rows] float32
    ranks: torch.Tensor  # [rows] int32, 1 + the number of strictly greater logits
    top_ids: torch.Tensor  # [rows, top_n] int32
    top_logprobs: torch.Tensor  # [rows, top_n] float32


def _check_logits(logits: torch.Tensor) -> tuple[int, int]:
    check(logits, "logits", [None, None], torch.float32, rows_only=True)
    rows, vocab = logits.shape
    if not 0 < vocab < 2**31:
        raise ValueError(f"logits must have between 1 and 2**31 - 1 columns, not {vocab}")
    return rows, vocab


def _enough_memory(status: int) -> None:
    if status:
        raise MemoryError("the sampling kernel could not get memory for one row of candidates")


def argmax_rows(logits: torch.Tensor, *, library: CpuLibrary | None = None) -> torch.Tensor:
    """Greedy tokens `[rows]` int64 of logits `[rows, vocab]` float32: the lowest id of equal ones.

    A row of nothing but -inf (or NaN) gives -1.
    """
    rows, vocab = _check_logits(logits)
    tokens = torch.empty(rows, dtype=torch.int64)
    _functions(library or load()).argmax(logits.data_ptr(), rows, vocab, logits.stride(0), tokens.data_ptr())
    return tokens


def sample_rows(
    logits: torch.Tensor,  # [rows, vocab] float32: penalties, bias and masks (-inf) applied
    temperature: torch.Tensor,  # [rows] float32, 0 is greedy
    top_k: torch.Tensor,  # [rows] int32, <= 0 is off
    top_p: torch.Tensor,  # [rows] float32, >= 1 is off
    min_p: torch.Tensor,  # [rows] float32, <= 0 is off
    seed: torch.Tensor,  # [rows] int64, read as 64 unsigned bits
    position: torch.Tensor,  # [rows] int64, of the token that is drawn
    stream: int = 0,
    *,
    library: CpuLibrary | None = None,
) -> torch.Tensor:
    """One token a row, `[rows]` int64; -1 for a row of nothing but -inf."""
    rows, vocab = _check_logits(logits)
    check(temperature, "temperature", [rows], torch.float32)
    check(top_k, "top_k", [rows], torch.int32)
    check(top_p, "top_p", [rows], torch.float32)
    check(min_p, "min_p", [rows], torch.float32)
    check(seed, "seed", [rows], torch.int64)
    check(position, "position", [rows], torch.int64)
    if not 0 <= stream <= _MASK32:
        raise ValueError(f"stream must fit 32 bits, but is {stream}")
    if not bool(((temperature >= 0) & temperature.isfinite()).all()):
        raise ValueError("temperature must be finite and at least 0 in every row")
    tokens = torch.empty(rows, dtype=torch.int64)
    status = _functions(library or load()).sample(
        logits.data_ptr(),
        rows,
        vocab,
        logits.stride(0),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        seed.data_ptr(),
        position.data_ptr(),
        stream,
        tokens.data_ptr(),
    )
    _enough_memory(status)
    return tokens


def logprobs_rows(
    logits: torch.Tensor,  # [rows, vocab] float32, raw
    tokens: torch.Tensor,  # [rows] int64
    top_n: int,
    *,
    library: CpuLibrary | None = None,
) -> Logprobs:
    """Log-probability and rank of one token a row, and the `top_n` (at most 64) most probable."""
    rows, vocab = _check_logits(logits)
    check(tokens, "tokens", [rows], torch.int64)
    if not 0 <= top_n <= min(MAX_TOP, vocab):
        raise ValueError(f"top_n must be between 0 and {min(MAX_TOP, vocab)}, not {top_n}")
    if rows and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        raise ValueError(f"tokens must be in [0, {vocab})")
    result = Logprobs(
        torch.empty(rows, dtype=torch.float32),
        torch.empty(rows, dtype=torch.int32),
        torch.empty(rows, top_n, dtype=torch.int32),
        torch.empty(rows, top_n, dtype=torch.float32),
    )
    status = _functions(library or load()).logprobs(
        logits.data_ptr(),
        rows,
        vocab,
        logits.stride(0),
        tokens.data_ptr(),
        top_n,
        result.token_logprobs.data_ptr(),
        result.ranks.data_ptr(),
        result.top_ids.data_ptr(),
        result.top_logprobs.data_ptr(),
    )
    _enough_memory(status)
    return result


def exponentials(
    seed: int, position: int, vocab: int, stream: int = 0, *, library: CpuLibrary | None = None
) -> torch.Tensor:
    """The noise E `[vocab]` float32 of all tokens at one position; sampling adds -log(E) to logit / T."""
    noise = torch.empty(vocab, dtype=torch.float32)
    _functions(library or load()).exponentials(
        seed & 0xFFFF_FFFF_FFFF_FFFF, position, stream, vocab, noise.data_ptr()
    )
    return noise


def philox(counter: tuple[int, int, int, int], key: int, *, library: CpuLibrary | None = None) -> list[int]:
    """One block of Philox4x32-10: four 32-bit words."""
    words = (ctypes.c_uint32 * 4)(*counter)
    out = (ctypes.c_uint32 * 4)()
    _functions(library or load()).philox(words, key, out)
    return list(out)
