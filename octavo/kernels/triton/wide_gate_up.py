"""Gate and up of a large weight for 17 to 128 rows, fed by the copy engine of Hopper GPUs.

From some rows on it is no longer enough to stream the weight: every program reads all rows of x as well, from
the second-level cache, and 384 programs of 64 weight rows each would read x as often as a weight of 24,576
rows is long. Here the rows of the step are the long side of the product. A program owns all of K, so nothing
has to be added up, and a gate and its up lie in one thread: SiLU·mul needs no memory between.

Each number is summed over K in the order of the other kernels (see products), to the same bits.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.triton.launch import begin, dot_precision, next_power_of_2, pdl_options, uses_pdl
from octavo.kernels.triton.product_sums import row_scales
from octavo.kernels.triton.quick import kernel

LEAST_ROWS, MAX_ROWS = 17, 128  # below, padding x to a tile costs more than it saves
_LEAST_WEIGHT = 1 << 25  # numbers; a smaller weight is read before the copy engine has begun
_BLOCK_K = 64


@dataclass(frozen=True, slots=True)
class WideTiling:
    """How the product is cut: a program computes width + rest columns of the result."""

    block_m: int  # rows of x in a tile
    width: int  # a power of two from 32 on
    rest: int  # another, or 0
    stages: int
    warps: int


def choose_tiling(weight: torch.Tensor, num_rows: int) -> WideTiling | None:
    """A cut that measured well on one H200; None: another kernel or the library serves this product."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    serves = LEAST_ROWS <= num_rows <= MAX_ROWS and weight.element_size() == 2 and uses_pdl(weight)
    if not serves or k % _BLOCK_K or weight.numel() < _LEAST_WEIGHT:
        return None
    if num_rows <= 64:
        return WideTiling(64, 32, 0, stages=4, warps=4) if n % 32 == 0 else None
    # one program a multiprocessor: it pays where they come out even
    programs, processors = n // 96, torch.cuda.get_device_properties(weight.device).multi_processor_count
    even = n % 96 == 0 and 0.9 * processors <= programs <= processors
    return WideTiling(128, 64, 32, stages=5, warps=8) if even else None


@triton.jit
def _finish(
    acc,  # [BLOCK_M, 2 * WIDTH] float32: gates, then ups
    scale,  # [BLOCK_M]
    bias_ptr,
    out_ptr,
    first,  # column of the result
    num_rows,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    gate, up = acc.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
    m, columns = tl.arange(0, BLOCK_M), first + tl.arange(0, WIDTH)
    if NORMED:
        gate, up = gate * scale[:, None], up * scale[:, None]
    if HAS_BIAS:
        gate += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + N + columns).to(tl.float32)[None, :]
    out = gate / (1.0 + tl.exp(-gate)) * up
    where = m[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=m[:, None] < num_rows)


@kernel(do_not_specialize=["num_rows"])
def wide_gate_up_kernel(
    x_desc,  # [BLOCK_M or fewer, K], tiles of [BLOCK_M, BLOCK_K]
    w_desc,  # [2, N, K], gates and ups, tiles of [2, WIDTH, BLOCK_K]
    w_rest_desc,  # the same, tiles of [2, REST, BLOCK_K]
    bias_ptr,  # [2 * N]
    squares_ptr,  # [num_rows, SQUARES] float32
    out_ptr,  # [num_rows, N]
    num_rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,  # x comes with sums of squares
    SQUARES: tl.constexpr,
    SQUARES_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    first = tl.program_id(0) * (WIDTH + REST)
    acc = tl.zeros((BLOCK_M, 2 * WIDTH), dtype=tl.float32)
    if REST > 0:
        acc_rest = tl.zeros((BLOCK_M, 2 * REST), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        rows = x_desc.load([0, k])
        part = w_desc.load([0, first, k]).reshape(2 * WIDTH, BLOCK_K)
        acc = tl.dot(rows, part.T, acc, input_precision=PRECISION)
        if REST > 0:
            part = w_rest_desc.load([0, first + WIDTH, k]).reshape(2 * REST, BLOCK_K)
            acc_rest = tl.dot(rows, part.T, acc_rest, input_precision=PRECISION)
    m = tl.arange(0, BLOCK_M)
    scale = m.to(tl.float32)
    if NORMED:
        scale = row_scales(squares_ptr, m, m < num_rows, eps, K, SQUARES, SQUARES_PADDED)
    _finish(acc, scale, bias_ptr, out_ptr, first, num_rows, N, HAS_BIAS, NORMED, BLOCK_M, WIDTH)
    if REST > 0:
        _finish(
            acc_rest, scale, bias_ptr, out_ptr, first + WIDTH, num_rows, N, HAS_BIAS, NORMED, BLOCK_M, REST
        )


def gate_up(
    x: torch.Tensor,  # [num_rows or more, K]; with fewer than a tile's rows the copy engine is slower
    weight: torch.Tensor,  # [2 * N, K]
    bias: torch.Tensor | None,
    squares: torch.Tensor | None,  # [num_rows, K / 64] float32 of the stream behind x; None: x is normed
    eps: float,
    out: torch.Tensor,  # [num_rows, N]
    tiling: WideTiling,
) -> None:
    """out = silu(gate) * up"""
    num_rows, (n, k) = len(out), weight.shape
    if x.dim() != 2 or x.shape[1] != k or len(x) < num_rows or out.shape != (num_rows, n // 2):
        shapes = [tuple(tensor.shape) for tensor in (x, weight, out)]
        raise ValueError(f"x, weight and out do not go together: {shapes}")
    if not (x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()):
        raise ValueError("x, weight and out must be contiguous")
    if num_rows > tiling.block_m or n // 2 % (tiling.width + tiling.rest) or k % _BLOCK_K:
        raise ValueError(f"{num_rows} rows and a weight of {tuple(weight.shape)} cannot be cut as {tiling}")
    pdl = uses_pdl(x)
    halves = weight.view(2, n // 2, k)
    count = 1 if squares is None else squares.shape[1]
    wide_gate_up_kernel[(n // 2 // (tiling.width + tiling.rest),)](
        _tiles(x, [tiling.block_m, _BLOCK_K]), _tiles(halves, [2, tiling.width, _BLOCK_K]),
        _tiles(halves, [2, tiling.rest or tiling.width, _BLOCK_K]), x if bias is None else bias,
        x if squares is None else squares, out, num_rows, eps, N=n // 2, K=k, HAS_BIAS=bias is not None,
        NORMED=squares is not None, SQUARES=count, SQUARES_PADDED=next_power_of_2(count), WIDTH=tiling.width,
        REST=tiling.rest, BLOCK_M=tiling.block_m, BLOCK_K=_BLOCK_K, STAGES=tiling.stages,
        PRECISION=dot_precision(x.dtype), PDL=pdl, num_warps=tiling.warps, **pdl_options(pdl),
    )  # fmt: skip


def _tiles(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
