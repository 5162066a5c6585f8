"""How a product of few rows is summed: a program's part of K, and the parts of a tile in their order.

See products for the whole; here is what its kernels have in common.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.triton.launch import prefetch


@triton.jit
def accumulate(
    x_ptr,  # [num_rows, K]
    w_ptr,  # [any, K]
    weight_rows,  # [BLOCK_N] rows of the weight
    rows_valid,  # [BLOCK_N] which of them exist
    split,
    num_rows,
    K: tl.constexpr,
    K_PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,  # columns of this part whose weight is loaded before the wait; only if EVEN
    PREFETCH: tl.constexpr,  # 128-byte lines of each weight row fetched before the wait
    EVEN: tl.constexpr,  # BLOCK_N divides the rows, and BLOCK_K divides K_PART
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] float32: this part of K of these weight rows times all rows of x."""
    k = split * K_PART + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    w_rows = w_ptr + weight_rows.to(tl.int64)[:, None] * K
    w_ptrs = w_rows + k[None, :]
    x_ptrs = x_ptr + m[None, :] * K + k[:, None]
    if EARLY > 0:
        # on its way, or in place, before the wait begins
        e = tl.arange(0, EARLY)
        first = tl.load(w_rows + split * K_PART + e[None, :])
    if PDL:
        if PREFETCH > 0:
            LINE: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
            prefetch(w_rows + split * K_PART + tl.arange(0, PREFETCH)[None, :] * LINE)
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if EARLY > 0:
        x_early = x_ptr + m[None, :] * K + split * K_PART + e[:, None]
        x_first = tl.load(x_early, mask=m[None, :] < num_rows, other=0.0)
        acc = tl.dot(first, x_first, acc, input_precision=PRECISION)
    if EARLY < K_PART:
        w_ptrs += EARLY
        x_ptrs += EARLY
        for start in tl.range(EARLY, K_PART, BLOCK_K, num_stages=STAGES):
            if EVEN:
                w = tl.load(w_ptrs)
                x = tl.load(x_ptrs, mask=m[None, :] < num_rows, other=0.0)
            else:
                inside = (k + start < K) & (start + tl.arange(0, BLOCK_K) < K_PART)
                w = tl.load(w_ptrs, mask=rows_valid[:, None] & inside[None, :], other=0.0)
                x = tl.load(x_ptrs, mask=(m[None, :] < num_rows) & inside[:, None], other=0.0)
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
            w_ptrs += BLOCK_K
            x_ptrs += BLOCK_K
    return acc


@triton.jit
def deliver(
    acc,  # [BLOCK_N, BLOCK_M]
    partial_ptr,  # [tiles, SPLIT, num_rows, BLOCK_N] float32
    counter_ptr,  # [tiles] int32, zero between launches
    tile,
    split,
    num_rows,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write a partial sum; True for the program that arrives last and finishes the tile."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    base = partial_ptr + ((tile * SPLIT + split) * num_rows).to(tl.int64) * BLOCK_N
    tl.store(base + m[None, :] * BLOCK_N + n[:, None], acc, mask=m[None, :] < num_rows)
    tl.debug_barrier()
    is_last = True
    if SPLIT > 1:
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        is_last = arrived == SPLIT - 1
        if is_last:
            tl.store(counter_ptr + tile, 0)
    return is_last


@triton.jit
def collect(
    partial_ptr,
    tile,
    num_rows,
    offsets,  # [rows, columns] within one partial sum
    mask,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The partial sums of a tile, added in their order."""
    base = partial_ptr + (tile * SPLIT * num_rows).to(tl.int64) * BLOCK_N
    total = tl.load(base + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, SPLIT):
        total += tl.load(
            base + part * num_rows * BLOCK_N + offsets, mask=mask, other=0.0, cache_modifier=".cg"
        )
    return total


@triton.jit
def halves(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The first and the second half of each row of x [ROWS, WIDTH]."""
    return x.reshape(ROWS, 2, WIDTH // 2).permute(0, 2, 1).split()


@triton.jit
def row_sum(x):
    """Sum of each row of x [rows, columns] float32, whatever order its layout makes of it.

    A layout depends on the number of rows, and the order of a float32 sum changes its bits. In float64
    a few hundred float32 numbers are added without rounding unless they differ by 2^20 and more.
    """
    return tl.sum(x.to(tl.float64), axis=1).to(tl.float32)


@triton.jit
def row_scales(
    squares_ptr,  # [num_rows, TILES] float32
    rows,  # [rows]
    valid,  # [rows]
    eps,
    WIDTH: tl.constexpr,  # of the normed dimension
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
):
    """[rows] float32: 1 / rms of each row."""
    t = tl.arange(0, TILES_PADDED)
    squares = tl.load(
        squares_ptr + rows[:, None] * TILES + t[None, :],
        mask=valid[:, None] & (t[None, :] < TILES),
        other=0.0,
    )
    return tl.rsqrt(row_sum(squares) / WIDTH + eps)
