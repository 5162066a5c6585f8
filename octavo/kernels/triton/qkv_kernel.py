"""Queries, keys and values: their product with qk-norm, rotary and the store into the KV cache behind it."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.product_sums import accumulate, collect, deliver, row_scales, row_sum
from octavo.kernels.triton.quick import kernel


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
    return tl.where(turns[None, :], tl.fma(x, cos, other * sin * sign[None, :]), x)


@triton.jit
def turn(low, high, cos, sin):
    """Rotary of the two halves of a head, as float32.

    Which of two products is rounded before they are added is said here: left to the compiler, it was one of
    them for 16 rows and the other for 32.
    """
    return tl.fma(low, cos, -(high * sin)), tl.fma(high, cos, low * sin)


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
        squares = row_sum(low * low) + row_sum(high * high)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        low = low * scale * tl.load(norm_ptr + h).to(tl.float32)[None, :]
        high = high * scale * tl.load(norm_ptr + HALF_ROTARY + h).to(tl.float32)[None, :]
    angle = positions[:, None] * HALF_ROTARY + h[None, :]
    cos = tl.load(cos_ptr + angle, mask=valid[:, None], other=1.0)
    sin = tl.load(sin_ptr + angle, mask=valid[:, None], other=0.0)
    return turn(low, high, cos, sin)


@triton.jit
def kv_offsets(slots, head, half, BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr):
    """int64 offset of a slot's head in the cache [blocks, 2, KV_HEADS, BLOCK_SIZE, D]."""
    block = (slots // BLOCK_SIZE).to(tl.int64)
    return (((block * 2 + half) * KV_HEADS + head) * BLOCK_SIZE + slots % BLOCK_SIZE) * D


@kernel(do_not_specialize=["num_rows"])
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
    acc = accumulate(
        x_ptr, w_ptr, rows, rows >= 0, split, num_rows, K, K_PART, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
        EARLY, PREFETCH, EVEN, PRECISION, PDL,
    )  # fmt: skip
    if deliver(acc, partial_ptr, counter_ptr, tile, split, num_rows, SPLIT, BLOCK_N, BLOCK_M):
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
                    low = collect(partial_ptr, tile, num_rows, where, mask, SPLIT, BLOCK_N)
                    high = collect(partial_ptr, tile, num_rows, where + HALF_ROTARY, mask, SPLIT, BLOCK_N)
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
                    x = collect(partial_ptr, tile, num_rows, where, mask, SPLIT, BLOCK_N) * scale[:, None]
                    if HAS_BIAS:
                        x += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
                    if not is_value:
                        where = m[:, None] * BLOCK_N + partner[None, :]
                        other = collect(partial_ptr, tile, num_rows, where, mask, SPLIT, BLOCK_N)
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
