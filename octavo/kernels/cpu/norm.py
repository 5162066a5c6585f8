"""RMS norm, residual addition with RMS norm, and silu(gate) * up, row by row.

Sums are float32 in a fixed order, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from octavo.kernels.cpu._checks import check, dtype_number
from octavo.kernels.cpu.library import CpuLibrary, load


@dataclass(frozen=True, slots=True)
class _Functions:
    rms_norm: Any
    add_rms_norm: Any
    silu_mul: Any


@cache
def _functions(library: CpuLibrary) -> _Functions:
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    return _Functions(
        rms_norm=library.function(
            "oc_rms_norm", None, [pointer, flag, pointer, real, size, size, pointer, flag]
        ),
        add_rms_norm=library.function(
            "oc_add_rms_norm", None, [pointer, flag, pointer, pointer, real, size, size, pointer, flag]
        ),
        silu_mul=library.function("oc_silu_mul", None, [pointer, flag, size, size, pointer]),
    )


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    library: CpuLibrary | None = None,
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for x `[rows, k]`, weight float32 `[k]`.

    The result has `out_dtype`, by default x's.
    """
    check(x, "x", [None, None])
    rows, k = x.shape
    check(weight, "weight", [k], torch.float32)
    out = torch.empty(rows, k, dtype=out_dtype or x.dtype)
    _functions(library or load()).rms_norm(
        x.data_ptr(),
        dtype_number(x.dtype, "x"),
        weight.data_ptr(),
        eps,
        rows,
        k,
        out.data_ptr(),
        dtype_number(out.dtype, "out_dtype"),
    )
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    library: CpuLibrary | None = None,
) -> torch.Tensor:
    """residual += x, in place (float32 `[rows, k]`), then the norm of the residual.

    The result has `out_dtype`, by default x's.
    """
    check(x, "x", [None, None])
    rows, k = x.shape
    check(residual, "residual", [rows, k], torch.float32)
    check(weight, "weight", [k], torch.float32)
    out = torch.empty(rows, k, dtype=out_dtype or x.dtype)
    _functions(library or load()).add_rms_norm(
        x.data_ptr(),
        dtype_number(x.dtype, "x"),
        residual.data_ptr(),
        weight.data_ptr(),
        eps,
        rows,
        k,
        out.data_ptr(),
        dtype_number(out.dtype, "out_dtype"),
    )
    return out


def silu_mul(x: torch.Tensor, library: CpuLibrary | None = None) -> torch.Tensor:
    """silu(gate) * up for x `[rows, 2 * k]`, gate before up; the result `[rows, k]` has x's dtype."""
    check(x, "x", [None, None])
    rows, width = x.shape
    if width % 2:
        raise ValueError(f"x must hold gate and up, an even number of columns, not {width}")
    out = torch.empty(rows, width // 2, dtype=x.dtype)
    _functions(library or load()).silu_mul(
        x.data_ptr(), dtype_number(x.dtype, "x"), rows, width // 2, out.data_ptr()
    )
    return out
