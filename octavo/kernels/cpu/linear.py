"""Linear layers over weights that are packed once.

`pack` turns a weight `[n, k]` into panels of 16 columns that the kernels read as one stream
(`src/octavo_cpu.h` gives the layout); the plain tensor can then be dropped. A row's result is the
same bit for bit whatever the number of rows and threads. A tied embedding and head share one
packed weight: `embed` reads rows out of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from octavo.kernels.cpu._checks import check, dtype_number
from octavo.kernels.cpu.arena import WeightArena
from octavo.kernels.cpu.library import CpuLibrary, load

PANEL = 16
_STORE, _RESIDUAL, _SILU_MUL = 0, 1, 2


class Packed(ctypes.Structure):
    """`oc_packed`: a packed weight as C sees it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("gate_up", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight `[n, k]` in the kernels' layout.

    `gate_up` marks a weight whose rows are gate `[n/2]` and then up `[n/2]`, packed as panels of
    the two in turn: `linear` then returns silu(gate) * up, `[rows, n/2]`, in one pass.
    """

    storage: torch.Tensor  # 1-D, padding included
    n: int
    k: int
    dtype: torch.dtype
    gate_up: bool = False

    @property
    def out_features(self) -> int:
        """Columns of what `linear` returns."""
        return self.n // 2 if self.gate_up else self.n

    @property
    def packed_columns(self) -> int:
        """Columns with padding, in the order of the panels."""
        if self.gate_up:
            return 2 * PANEL * -(-self.n // 2 // PANEL)
        return PANEL * -(-self.n // PANEL)

    def pointer(self) -> Packed:
        """The C view; it borrows the storage."""
        return Packed(
            self.storage.data_ptr(), self.n, self.k, dtype_number(self.dtype, "weight"), self.gate_up
        )


@dataclass(frozen=True, slots=True)
class _Functions:
    pack: Any
    unpack: Any
    linear: Any
    gather_packed: Any
    gather_plain: Any


@cache
def _functions(library: CpuLibrary) -> _Functions:
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    packed = ctypes.POINTER(Packed)
    return _Functions(
        pack=library.function("oc_pack", None, [pointer, size, packed]),
        unpack=library.function("oc_unpack", None, [packed, pointer]),
        linear=library.function(
            "oc_linear", flag, [pointer, size, size, packed, pointer, pointer, size, flag, flag]
        ),
        gather_packed=library.function("oc_gather_packed", None, [packed, pointer, size, pointer]),
        gather_plain=library.function("oc_gather_plain", None, [pointer, flag, size, pointer, size, pointer]),
    )


def _pack(
    weight: torch.Tensor, gate_up: bool, library: CpuLibrary | None, arena: WeightArena | None
) -> PackedLinear:
    check(weight, "weight", [None, None], rows_only=True)
    n, k = weight.shape
    if n == 0 or k == 0:
        raise ValueError(f"weight must not be empty, but has shape {[n, k]}")
    shape = PackedLinear(torch.empty(0), n, k, weight.dtype, gate_up)
    padded_k = k + k % 2 if weight.dtype == torch.bfloat16 else k
    elements = shape.packed_columns * padded_k
    storage = (
        torch.empty(elements, dtype=weight.dtype) if arena is None else arena.take(elements, weight.dtype)
    )
    packed = PackedLinear(storage, n, k, weight.dtype, gate_up)
    _functions(library or load()).pack(weight.data_ptr(), weight.stride(0), packed.pointer())
    return packed


def pack(
    weight: torch.Tensor, library: CpuLibrary | None = None, arena: WeightArena | None = None
) -> PackedLinear:
    """Pack a weight `[n, k]`, float32 or bfloat16. All levels share the layout.

    The weights of one model belong side by side, in one arena.
    """
    return _pack(weight, False, library, arena)


def pack_gate_up(
    weight: torch.Tensor, library: CpuLibrary | None = None, arena: WeightArena | None = None
) -> PackedLinear:
    """Pack gate and up, stacked as `[2 * intermediate, k]`, so that `linear` gives silu(gate) * up."""
    check(weight, "weight", [None, None], rows_only=True)
    if weight.shape[0] % 2:
        raise ValueError(f"weight must hold gate and up, an even number of rows, not {weight.shape[0]}")
    return _pack(weight, True, library, arena)


def unpack(packed: PackedLinear, library: CpuLibrary | None = None) -> torch.Tensor:
    """The plain weight `[n, k]`, bit for bit; for tests and debugging."""
    weight = torch.empty(packed.n, packed.k, dtype=packed.dtype)
    _functions(library or load()).unpack(packed.pointer(), weight.data_ptr())
    return weight


def pack_bias(bias: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """A bias `[n]` as the kernels take it: float32, in the order of the packed columns."""
    check(bias, "bias", [packed.n])
    if not packed.gate_up:
        return bias.float().contiguous()
    half = packed.n // 2
    padded = torch.zeros(2, packed.packed_columns // 2)
    padded[:, :half] = bias.float().view(2, half)
    return padded.view(2, -1, PANEL).transpose(0, 1).reshape(-1).contiguous()


def _multiply(
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    epilogue: int,
    library: CpuLibrary | None,
) -> torch.Tensor:
    check(x, "x", [None, packed.k], packed.dtype, rows_only=True)
    check(
        out, "residual" if epilogue == _RESIDUAL else "out", [x.shape[0], packed.out_features], rows_only=True
    )
    if bias is not None:
        check(bias, "bias", [packed.packed_columns if packed.gate_up else packed.n], torch.float32)
    failed = _functions(library or load()).linear(
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        packed.pointer(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        dtype_number(out.dtype, "out_dtype"),
        epilogue,
    )
    if failed:
        raise MemoryError(f"no memory to prepare {x.shape[0]} rows of {packed.k} inputs")
    return out


def linear(
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    library: CpuLibrary | None = None,
) -> torch.Tensor:
    """x W^T + bias, or silu(gate) * up for a weight packed so: `[rows, out_features]`.

    The result has `out_dtype`, by default x's, or is written to `out` in the dtype of that.
    x `[rows, k]` has the weight's dtype; its rows may lie apart, like those of `out`. The bias is
    float32 as `pack_bias` returns it.
    """
    if out is None:
        out = torch.empty(x.shape[0], packed.out_features, dtype=out_dtype or x.dtype)
    elif out_dtype not in (None, out.dtype):
        raise ValueError(f"out_dtype is {out_dtype}, but out is {out.dtype}")
    return _multiply(x, packed, bias, out, _SILU_MUL if packed.gate_up else _STORE, library)


def linear_add(
    x: torch.Tensor,
    packed: PackedLinear,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    library: CpuLibrary | None = None,
) -> torch.Tensor:
    """residual += x W^T + bias, in place; residual `[rows, n]` is float32 and is returned."""
    if packed.gate_up:
        raise ValueError("packed must come from pack, not from pack_gate_up")
    check(residual, "residual", [None, packed.n], torch.float32, rows_only=True)
    return _multiply(x, packed, bias, residual, _RESIDUAL, library)


def embed(
    ids: torch.Tensor, table: PackedLinear | torch.Tensor, library: CpuLibrary | None = None
) -> torch.Tensor:
    """Rows `ids` `[rows]` int64 of a table `[vocab, k]`, packed or plain, as float32 `[rows, k]`.

    Raises ValueError if an id is outside the table.
    """
    check(ids, "ids", [None], torch.int64)
    rows = ids.shape[0]
    if isinstance(table, PackedLinear):
        vocab, k = table.n, table.k
        if table.gate_up:
            raise ValueError("table must be packed as a plain weight, not as gate and up")
    else:
        check(table, "table", [None, None])
        vocab, k = table.shape
    if rows and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise ValueError(f"ids must be in 0 .. {vocab - 1}")
    out = torch.empty(rows, k)
    functions = _functions(library or load())
    if isinstance(table, PackedLinear):
        functions.gather_packed(table.pointer(), ids.data_ptr(), rows, out.data_ptr())
    else:
        number = dtype_number(table.dtype, "table")
        functions.gather_plain(table.data_ptr(), number, k, ids.data_ptr(), rows, out.data_ptr())
    return out
