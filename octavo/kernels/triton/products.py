"""Products of few rows with a weight, each with what follows it in a decoder layer.

A step of 1 to 128 rows is bound by reading the weights, so a kernel here is a stream of one weight
through the matrix unit. A program owns BLOCK_N rows of the weight and one part of the K dimension;
the rows of the step, padded to BLOCK_M, are the narrow side of its product. Partial sums go to a
workspace in float32, and the last program to arrive at a tile adds the parts in their order and
does the rest of the work:

    plain      + bias                                          qkv and others where nothing is fused; logits
    residual   residual += product; also (residual * weight of the next norm) and its sums of squares
    gate_up    silu(gate) * up
    qkv        bias, qk-norm, rotary; q into its buffer, k and v into the KV cache

The parts of K depend on the weight's shape alone, never on the number of rows, and each element is
summed in one order: a row's result has the same bits alone and among 127 others.

A norm is split between its neighbours. Its scale 1/rms(x) is one number a row, so it can be applied
to the product's result; its weight is applied by whoever writes x. The kernel before writes
x * weight and, for every 64 columns, the sum of squares of x; the kernel after adds those up.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.triton.launch import dot_precision, next_power_of_2, pdl_options, prefetch, uses_pdl

MAX_ROWS = 128  # the most rows these kernels take
SQUARES_WIDTH = 64  # columns behind one sum of squares


@triton.jit
def _accumulate(
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
def _deliver(
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
def _collect(
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


@triton.jit(do_not_specialize=["num_rows"])
def plain_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,  # [num_rows, N]
    partial_ptr,
    counter_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    K_PART: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _accumulate(
        x_ptr, w_ptr, rows, rows < N, split, num_rows, K, K_PART, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
        EARLY, PREFETCH, EVEN, PRECISION, PDL,
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    if SPLIT == 1:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        out = out_ptr + m[None, :].to(tl.int64) * N + rows[:, None]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m[None, :] < num_rows) & (rows[:, None] < N))
    else:
        if _deliver(acc, partial_ptr, counter_ptr, tile, split, num_rows, SPLIT, BLOCK_N, BLOCK_M):
            n = tl.arange(0, BLOCK_N)
            valid = (m[:, None] < num_rows) & (rows[None, :] < N)
            total = _collect(
                partial_ptr, tile, num_rows, m[:, None] * BLOCK_N + n[None, :], valid, SPLIT, BLOCK_N
            )
            if HAS_BIAS:
                total += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
            out = out_ptr + m[:, None].to(tl.int64) * N + rows[None, :]
            tl.store(out, total.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def residual_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,  # [num_rows, N], changed in place
    norm_ptr,  # [N] weight of the norm that comes next
    scaled_ptr,  # [num_rows, N]
    squares_ptr,  # [num_rows, N / SQUARES] float32
    partial_ptr,
    counter_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    K_PART: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SQUARES: tl.constexpr,  # columns of one sum of squares; BLOCK_N is a multiple of it
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _accumulate(
        x_ptr, w_ptr, rows, rows < N, split, num_rows, K, K_PART, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
        EARLY, PREFETCH, EVEN, PRECISION, PDL,
    )  # fmt: skip
    if _deliver(acc, partial_ptr, counter_ptr, tile, split, num_rows, SPLIT, BLOCK_N, BLOCK_M):
        m = tl.arange(0, BLOCK_M)
        valid = m[:, None] < num_rows
        for piece in tl.static_range(BLOCK_N // SQUARES):
            n = piece * SQUARES + tl.arange(0, SQUARES)
            columns = tile * BLOCK_N + n
            where = m[:, None] * N + columns[None, :]
            before = tl.load(residual_ptr + where, mask=valid, other=0.0).to(tl.float32)
            norm = tl.load(norm_ptr + columns).to(tl.float32)
            total = _collect(
                partial_ptr, tile, num_rows, m[:, None] * BLOCK_N + n[None, :], valid, SPLIT, BLOCK_N
            )
            if HAS_BIAS:
                total += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
            after = (before + total).to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + where, after, mask=valid)
            wide = after.to(tl.float32)
            scaled = (wide * norm[None, :]).to(scaled_ptr.dtype.element_ty)
            tl.store(scaled_ptr + where, scaled, mask=valid)
            squares = row_sum(wide * wide)
            place = tile * (BLOCK_N // SQUARES) + piece
            tl.store(squares_ptr + m * (N // SQUARES) + place, squares, mask=m < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def gate_up_kernel(
    x_ptr,  # [num_rows, K], scaled by the norm's weight
    w_ptr,  # [2 * N, K], gate rows above up rows
    bias_ptr,  # [2 * N]
    squares_ptr,  # [num_rows, SQUARES] float32
    out_ptr,  # [num_rows, N]
    partial_ptr,
    counter_ptr,
    num_rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    K_PART: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,  # x comes with sums of squares
    SQUARES: tl.constexpr,
    SQUARES_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,  # weight rows of a program: half gate, half up
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = BLOCK_N // 2
    n = tl.arange(0, BLOCK_N)
    column = tile * HALF + n % HALF
    weight_rows = tl.where(n < HALF, column, N + column)
    acc = _accumulate(
        x_ptr, w_ptr, weight_rows, column < N, split, num_rows, K, K_PART, BLOCK_N, BLOCK_M, BLOCK_K,
        STAGES, EARLY, PREFETCH, EVEN, PRECISION, PDL,
    )  # fmt: skip
    if _deliver(acc, partial_ptr, counter_ptr, tile, split, num_rows, SPLIT, BLOCK_N, BLOCK_M):
        m, h = tl.arange(0, BLOCK_M), tl.arange(0, HALF)
        columns = tile * HALF + h
        valid = (m[:, None] < num_rows) & (columns[None, :] < N)
        where = m[:, None] * BLOCK_N + h[None, :]
        gate = _collect(partial_ptr, tile, num_rows, where, valid, SPLIT, BLOCK_N)
        up = _collect(partial_ptr, tile, num_rows, where + HALF, valid, SPLIT, BLOCK_N)
        if NORMED:
            scale = row_scales(squares_ptr, m, m < num_rows, eps, K, SQUARES, SQUARES_PADDED)
            gate, up = gate * scale[:, None], up * scale[:, None]
        if HAS_BIAS:
            gate += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        out = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out_ptr + m[:, None] * N + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def rotate_head(
    x,  # [rows, D_PADDED] float32, one head
    other,  # [rows, D_PADDED] float32: what each number turns with
    norm_ptr,  # [D]
    cos_ptr,  # [positions, HALF_ROTARY] float32
    sin_ptr,
    positions,  # [rows], >= 0
    valid,
    eps,
    D: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    NORM: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """qk-norm (if there is one) and rotary of a head: [rows, D_PADDED] float32. Numbers beyond D are 0."""
    d = tl.arange(0, D_PADDED)
    partner = tl.where(d < HALF_ROTARY, d + HALF_ROTARY, d - HALF_ROTARY)
    turns = d < 2 * HALF_ROTARY
    if NORM:
        scale = tl.rsqrt(row_sum(x * x) / D + eps)[:, None]
        x = x * scale * tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        other = other * scale * tl.load(norm_ptr + partner, mask=turns, other=0.0).to(tl.float32)[None, :]
    angle = positions[:, None] * HALF_ROTARY + (d % HALF_ROTARY)[None, :]
    mask = valid[:, None] & turns[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    sign = tl.where(d < HALF_ROTARY, -1.0, 1.0)
    return tl.where(turns[None, :], x * cos + other * sin * sign[None, :], x)


@triton.jit
def _rotate_halves(
    low,  # [rows, D / 2] float32, the first half of a head
    high,  # [rows, D / 2] float32
    norm_ptr,  # [D]
    cos_ptr,  # [positions, HALF_ROTARY] float32
    sin_ptr,
    positions,  # [rows], >= 0
    valid,
    eps,
    D: tl.constexpr,
    HALF_ROTARY: tl.constexpr,  # D / 2
    NORM: tl.constexpr,
):
    """As `rotate_head`, for heads that turn as a whole."""
    h = tl.arange(0, HALF_ROTARY)
    if NORM:
        squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        low = low * scale * tl.load(norm_ptr + h).to(tl.float32)[None, :]
        high = high * scale * tl.load(norm_ptr + HALF_ROTARY + h).to(tl.float32)[None, :]
    angle = positions[:, None] * HALF_ROTARY + h[None, :]
    cos = tl.load(cos_ptr + angle, mask=valid[:, None], other=1.0)
    sin = tl.load(sin_ptr + angle, mask=valid[:, None], other=0.0)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def kv_offsets(slots, head, half, BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr):
    """int64 offset of a slot's head in the cache [blocks, 2, KV_HEADS, BLOCK_SIZE, D]."""
    block = (slots // BLOCK_SIZE).to(tl.int64)
    return (((block * 2 + half) * KV_HEADS + head) * BLOCK_SIZE + slots % BLOCK_SIZE) * D


@triton.jit(do_not_specialize=["num_rows"])
def qkv_kernel(
    x_ptr,  # [num_rows, K], scaled by the norm's weight
    w_ptr,  # [(HEADS + 2 * KV_HEADS) * D, K]
    bias_ptr,
    squares_ptr,  # [num_rows, SQUARES] float32
    q_norm_ptr,  # [D]
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,  # [num_rows] int64, -1 for padding
    slots_ptr,  # [num_rows] int64, -1 for padding
    q_ptr,  # [num_rows, HEADS, D]
    cache_ptr,  # [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
    partial_ptr,
    counter_ptr,
    num_rows,
    eps,
    K: tl.constexpr,
    K_PART: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SQUARES: tl.constexpr,
    SQUARES_PADDED: tl.constexpr,
    NORM: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # one head
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,  # rows finished at a time
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _accumulate(
        x_ptr, w_ptr, rows, rows >= 0, split, num_rows, K, K_PART, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
        EARLY, PREFETCH, EVEN, PRECISION, PDL,
    )  # fmt: skip
    if _deliver(acc, partial_ptr, counter_ptr, tile, split, num_rows, SPLIT, BLOCK_N, BLOCK_M):
        D: tl.constexpr = BLOCK_N
        for first in tl.static_range(0, BLOCK_M, BLOCK_E):
            if first < num_rows:
                m = first + tl.arange(0, BLOCK_E)
                valid = m < num_rows
                scale = row_scales(squares_ptr, m, valid, eps, K, SQUARES, SQUARES_PADDED)
                slots = tl.load(slots_ptr + m, mask=valid, other=-1)
                is_value = tile >= HEADS + KV_HEADS
                head = tl.where(is_value, tile - HEADS - KV_HEADS, tile - HEADS)
                there = kv_offsets(slots, head, tl.where(is_value, 1, 0), BLOCK_SIZE, KV_HEADS, D)
                position = tl.maximum(tl.load(positions_ptr + m, mask=valid, other=0), 0)
                norm_ptr = q_norm_ptr
                if tile >= HEADS:
                    norm_ptr = k_norm_ptr
                if 2 * HALF_ROTARY == D:
                    # the two halves of a head turn with each other: each is read once
                    h = tl.arange(0, HALF_ROTARY)
                    mask = valid[:, None] & (h[None, :] < HALF_ROTARY)
                    where = m[:, None] * BLOCK_N + h[None, :]
                    low = _collect(partial_ptr, tile, num_rows, where, mask, SPLIT, BLOCK_N)
                    high = _collect(partial_ptr, tile, num_rows, where + HALF_ROTARY, mask, SPLIT, BLOCK_N)
                    low, high = low * scale[:, None], high * scale[:, None]
                    if HAS_BIAS:
                        low += tl.load(bias_ptr + tile * D + h).to(tl.float32)[None, :]
                        high += tl.load(bias_ptr + tile * D + HALF_ROTARY + h).to(tl.float32)[None, :]
                    if not is_value:
                        low, high = _rotate_halves(
                            low, high, norm_ptr, cos_ptr, sin_ptr, position, valid, eps, D, HALF_ROTARY, NORM
                        )
                    if tile < HEADS:
                        out = q_ptr + (m[:, None] * HEADS + tile) * D + h[None, :]
                        tl.store(out, low.to(q_ptr.dtype.element_ty), mask=mask)
                        tl.store(out + HALF_ROTARY, high.to(q_ptr.dtype.element_ty), mask=mask)
                    else:
                        stored = mask & (slots >= 0)[:, None]
                        out = cache_ptr + there[:, None] + h[None, :]
                        tl.store(out, low.to(cache_ptr.dtype.element_ty), mask=stored)
                        tl.store(out + HALF_ROTARY, high.to(cache_ptr.dtype.element_ty), mask=stored)
                else:
                    d = tl.arange(0, D)
                    partner = tl.where(d < HALF_ROTARY, d + HALF_ROTARY, d - HALF_ROTARY)
                    partner = tl.where(d < 2 * HALF_ROTARY, partner, d)
                    mask = valid[:, None] & (d[None, :] < D)
                    where = m[:, None] * BLOCK_N + d[None, :]
                    x = _collect(partial_ptr, tile, num_rows, where, mask, SPLIT, BLOCK_N) * scale[:, None]
                    if HAS_BIAS:
                        x += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
                    if not is_value:
                        where = m[:, None] * BLOCK_N + partner[None, :]
                        other = _collect(partial_ptr, tile, num_rows, where, mask, SPLIT, BLOCK_N)
                        other = other * scale[:, None]
                        if HAS_BIAS:
                            other += tl.load(bias_ptr + tile * D + partner).to(tl.float32)[None, :]
                        x = rotate_head(
                            x, other, norm_ptr, cos_ptr, sin_ptr, position, valid, eps, D, HALF_ROTARY, NORM,
                            D,
                        )  # fmt: skip
                    if tile < HEADS:
                        out = q_ptr + (m[:, None] * HEADS + tile) * D + d[None, :]
                        tl.store(out, x.to(q_ptr.dtype.element_ty), mask=mask)
                    else:
                        out = cache_ptr + there[:, None] + d[None, :]
                        tl.store(out, x.to(cache_ptr.dtype.element_ty), mask=mask & (slots >= 0)[:, None])


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut. `split` must not depend on the number of rows."""

    block_n: int
    split: int
    block_k: int = 128
    stages: int = 4
    warps: int = 4
    prefetch: int = 0  # lines of 128 bytes a weight row fetched into the cache early, at most
    early: int = 0  # columns of a part loaded before the launch before is complete; a power of two


@dataclass(slots=True)
class Workspace:
    """Partial sums and counters, shared by all products of one stream."""

    partial: torch.Tensor  # float32
    counters: torch.Tensor  # int32, zero between launches

    @classmethod
    def allocate(cls, elements: int, tiles: int, device: torch.device) -> Workspace:
        """Room for so many partial sums and so many tiles."""
        return cls(
            torch.empty(elements, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )

    def check(self, elements: int, tiles: int) -> None:
        """Raise if a product needs more."""
        if elements > self.partial.numel() or tiles > self.counters.numel():
            raise ValueError(f"the workspace holds {self.partial.numel()} sums, {elements} are needed")


def padded_rows(num_rows: int) -> int:
    """Rows of the tile that holds num_rows of them: 16, 32, 64 or 128."""
    if not 0 < num_rows <= MAX_ROWS:
        raise ValueError(f"{num_rows} rows: these kernels take 1 to {MAX_ROWS}")
    return max(16, next_power_of_2(num_rows))


def choose_tiling(kind: str, n: int, k: int, num_rows: int) -> Tiling:
    """A cut that measured well on one H200; `split` is the same whatever the number of rows.

    About a hundred programs fill the card: fewer, larger ones end sooner than many whose parts
    have to be added up.
    """
    if kind == "head":
        return Tiling(64, 1, stages=3) if num_rows <= 16 else Tiling(128, 1, 64, 4 if num_rows > 64 else 6)
    if kind != "gate_up" and n * k <= 1 << 23 and k % 512 == 0:
        # a small weight: every program holds its part of it before the wait ends
        split = k // 512
        if kind == "qkv" and num_rows > 64:
            return Tiling(64, split, 64, 4, warps=8)
        if kind == "residual" and num_rows > 32 and split > 4:
            return Tiling(64, split, 64, 6, warps=8)
        return Tiling(64, split, 64, 1, warps=8, early=512)
    tiles = -(-n // (128 if kind == "qkv" else 64))
    split = 1
    while k % (split * 2 * 64) == 0 and k // split > 256 and (tiles * split < 96 or k // split > 4096):
        if split == 4 and k <= 4096:
            break
        split *= 2
    if num_rows > 16 or kind == "qkv" or k // split <= 1024:
        tiling = Tiling(64, split, 64, 6)
    else:
        tiling = Tiling(64, split, 128, 4 if kind == "residual" else 3)
        if kind == "residual" and k > 2 * n:  # one long part a program: begin it early
            tiling = replace(tiling, stages=3, early=256)
    if num_rows > 32:
        if kind == "qkv":
            tiling = replace(tiling, block_k=128, stages=3, warps=8)
        elif kind == "gate_up" and n >= 16384:
            tiling = replace(tiling, stages=4)
        elif kind == "residual" and k >= 4096:
            tiling = replace(tiling, block_k=128, stages=3, warps=8)
    return tiling


def _grid_options(
    x: torch.Tensor, n: int, k: int, tiling: Tiling, num_rows: int
) -> tuple[int, bool, dict[str, Any]]:
    """(tiles, pdl, arguments that all products share)"""
    if x.element_size() == 4:  # twice as wide: half as deep, or the buffers do not fit
        tiling = replace(tiling, block_k=min(tiling.block_k, 32), stages=min(tiling.stages, 3), early=0)
    tiles = -(-n // tiling.block_n)
    k_part = -(-k // (tiling.split * tiling.block_k)) * tiling.block_k
    even = n % tiling.block_n == 0 and k % (tiling.split * tiling.block_k) == 0
    pdl = uses_pdl(x)
    lines = k_part * x.element_size() // 128
    options: dict[str, Any] = {
        "K": k,
        "K_PART": k_part,
        "SPLIT": tiling.split,
        "BLOCK_N": tiling.block_n,
        "BLOCK_M": padded_rows(num_rows),
        "BLOCK_K": tiling.block_k,
        "STAGES": tiling.stages,
        "EARLY": tiling.early if even else 0,
        "PREFETCH": 0 if lines < 1 else min(tiling.prefetch, 1 << (lines.bit_length() - 1)),
        "EVEN": even,
        "PRECISION": dot_precision(x.dtype),
        "PDL": pdl,
        "num_warps": tiling.warps,
        **pdl_options(pdl),
    }
    return tiles, pdl, options


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(weight.shape)} do not multiply")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"{x.dtype} on {x.device} times {weight.dtype} on {weight.device}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError("x and weight must be contiguous")


def plain(
    x: torch.Tensor,  # [num_rows, K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None,
    out: torch.Tensor,  # [num_rows, N], any dtype
    workspace: Workspace,
    tiling: Tiling | None = None,
) -> None:
    """out = x W^T + bias"""
    _check(x, weight)
    num_rows, (n, k) = x.shape[0], weight.shape
    tiling = tiling or choose_tiling("plain", n, k, num_rows)
    tiles, _, options = _grid_options(x, n, k, tiling, num_rows)
    if tiling.split > 1:
        workspace.check(tiles * tiling.split * num_rows * tiling.block_n, tiles)
    plain_kernel[(tiles, tiling.split)](
        x, weight, x if bias is None else bias, out, workspace.partial, workspace.counters, num_rows,
        N=n, HAS_BIAS=bias is not None, **options,
    )  # fmt: skip


def residual(
    x: torch.Tensor,  # [num_rows, K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None,
    stream: torch.Tensor,  # [num_rows, N], changed in place
    next_norm: torch.Tensor,  # [N]
    scaled: torch.Tensor,  # [num_rows, N], written: stream * next_norm
    squares: torch.Tensor,  # [num_rows, N / 64] float32, written
    workspace: Workspace,
    tiling: Tiling | None = None,
) -> None:
    """stream += x W^T + bias, and what the next norm needs."""
    _check(x, weight)
    num_rows, (n, k) = x.shape[0], weight.shape
    if n % SQUARES_WIDTH:
        raise ValueError(f"a residual stream of {n} is not a multiple of {SQUARES_WIDTH}")
    tiling = tiling or choose_tiling("residual", n, k, num_rows)
    if n % tiling.block_n or tiling.block_n % SQUARES_WIDTH:
        raise ValueError(f"tiles of {tiling.block_n} do not cut a residual stream of {n}")
    tiles, _, options = _grid_options(x, n, k, tiling, num_rows)
    workspace.check(tiles * tiling.split * num_rows * tiling.block_n, tiles)
    residual_kernel[(tiles, tiling.split)](
        x, weight, x if bias is None else bias, stream, next_norm, scaled, squares, workspace.partial,
        workspace.counters, num_rows, N=n, HAS_BIAS=bias is not None, SQUARES=SQUARES_WIDTH,
        **options,
    )  # fmt: skip


def gate_up(
    x: torch.Tensor,  # [num_rows, K]
    weight: torch.Tensor,  # [2 * N, K]
    bias: torch.Tensor | None,
    squares: torch.Tensor | None,  # [num_rows, K / 64] float32 of the stream behind x; None: x is normed
    eps: float,
    out: torch.Tensor,  # [num_rows, N]
    workspace: Workspace,
    tiling: Tiling | None = None,
) -> None:
    """out = silu(gate) * up"""
    _check(x, weight)
    num_rows, (n, k) = x.shape[0], weight.shape
    tiling = tiling or choose_tiling("gate_up", n, k, num_rows)
    tiles, _, options = _grid_options(x, n, k, tiling, num_rows)
    workspace.check(tiles * tiling.split * num_rows * tiling.block_n, tiles)
    count = 1 if squares is None else squares.shape[1]
    gate_up_kernel[(tiles, tiling.split)](
        x, weight, x if bias is None else bias, x if squares is None else squares, out, workspace.partial,
        workspace.counters, num_rows, eps, N=n // 2, HAS_BIAS=bias is not None, NORMED=squares is not None,
        SQUARES=count, SQUARES_PADDED=next_power_of_2(count), **options,
    )  # fmt: skip


def qkv(
    x: torch.Tensor,  # [num_rows, K]
    weight: torch.Tensor,  # [(heads + 2 * kv_heads) * head_dim, K]
    bias: torch.Tensor | None,
    squares: torch.Tensor,  # [num_rows, K / 64] float32
    eps: float,
    norms: tuple[torch.Tensor, torch.Tensor] | None,  # of q and k, [head_dim]
    cos: torch.Tensor,  # [positions, rotary_dim / 2] float32
    sin: torch.Tensor,
    positions: torch.Tensor,  # [num_rows] int64
    slots: torch.Tensor,  # [num_rows] int64
    q: torch.Tensor,  # [num_rows, heads, head_dim], written
    kv_cache: torch.Tensor,  # [blocks, 2, kv_heads, block_size, head_dim], written
    workspace: Workspace,
    tiling: Tiling | None = None,
) -> None:
    """Queries into q, keys and values into the cache; head_dim is a power of two from 16 on."""
    _check(x, weight)
    num_rows, (n, k) = x.shape[0], weight.shape
    _, _, kv_heads, block_size, head_dim = kv_cache.shape
    heads = n // head_dim - 2 * kv_heads
    if head_dim != next_power_of_2(head_dim) or head_dim < 16 or q.shape != (num_rows, heads, head_dim):
        raise ValueError(f"q {tuple(q.shape)} does not go with {heads} heads of {head_dim}")
    tiling = replace(tiling or choose_tiling("qkv", n, k, num_rows), block_n=head_dim)
    if head_dim > 128:  # a whole head does not leave room for deep buffers
        tiling = replace(tiling, block_k=64, stages=3, early=0, warps=8)
    tiles, _, options = _grid_options(x, n, k, tiling, num_rows)
    workspace.check(tiles * tiling.split * num_rows * tiling.block_n, tiles)
    q_norm, k_norm = norms or (x, x)
    qkv_kernel[(tiles, tiling.split)](
        x, weight, x if bias is None else bias, squares, q_norm, k_norm, cos, sin, positions, slots, q,
        kv_cache, workspace.partial, workspace.counters, num_rows, eps,
        HAS_BIAS=bias is not None, SQUARES=squares.shape[1], SQUARES_PADDED=next_power_of_2(squares.shape[1]),
        NORM=norms is not None, HALF_ROTARY=cos.shape[1], HEADS=heads, KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size, BLOCK_E=min(8 * tiling.warps, padded_rows(num_rows)), **options,
    )  # fmt: skip
