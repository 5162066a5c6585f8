"""The products of a decoder layer with what follows them, apart from that of queries, keys and values."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton.language as tl

from octavo.kernels.triton.product_sums import (
    accumulate,
    collect,
    deliver,
    halves,
    row_scales,
    row_sum,
)
from octavo.kernels.triton.quick import kernel


@kernel(do_not_specialize=["num_rows"])
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
    acc = accumulate(
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
        if deliver(acc, partial_ptr, counter_ptr, tile, split, num_rows, SPLIT, BLOCK_N, BLOCK_M):
            n = tl.arange(0, BLOCK_N)
            valid = (m[:, None] < num_rows) & (rows[None, :] < N)
            total = collect(
                partial_ptr, tile, num_rows, m[:, None] * BLOCK_N + n[None, :], valid, SPLIT, BLOCK_N
            )
            if HAS_BIAS:
                total += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
            out = out_ptr + m[:, None].to(tl.int64) * N + rows[None, :]
            tl.store(out, total.to(out_ptr.dtype.element_ty), mask=valid)


@kernel(do_not_specialize=["num_rows"])
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
    acc = accumulate(
        x_ptr, w_ptr, rows, rows < N, split, num_rows, K, K_PART, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
        EARLY, PREFETCH, EVEN, PRECISION, PDL,
    )  # fmt: skip
    if deliver(acc, partial_ptr, counter_ptr, tile, split, num_rows, SPLIT, BLOCK_N, BLOCK_M):
        m = tl.arange(0, BLOCK_M)
        valid = m[:, None] < num_rows
        for piece in tl.static_range(BLOCK_N // SQUARES):
            n = piece * SQUARES + tl.arange(0, SQUARES)
            columns = tile * BLOCK_N + n
            where = m[:, None] * N + columns[None, :]
            before = tl.load(residual_ptr + where, mask=valid, other=0.0).to(tl.float32)
            norm = tl.load(norm_ptr + columns).to(tl.float32)
            total = collect(
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


@kernel(do_not_specialize=["num_rows"])
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
    acc = accumulate(
        x_ptr, w_ptr, weight_rows, column < N, split, num_rows, K, K_PART, BLOCK_N, BLOCK_M, BLOCK_K,
        STAGES, EARLY, PREFETCH, EVEN, PRECISION, PDL,
    )  # fmt: skip
    finishes = True
    if SPLIT > 1:
        finishes = deliver(acc, partial_ptr, counter_ptr, tile, split, num_rows, SPLIT, BLOCK_N, BLOCK_M)
    if finishes:
        m, h = tl.arange(0, BLOCK_M), tl.arange(0, HALF)
        columns = tile * HALF + h
        valid = (m[:, None] < num_rows) & (columns[None, :] < N)
        if SPLIT == 1:
            gate, up = halves(tl.trans(acc), BLOCK_M, BLOCK_N)
        else:
            where = m[:, None] * BLOCK_N + h[None, :]
            gate = collect(partial_ptr, tile, num_rows, where, valid, SPLIT, BLOCK_N)
            up = collect(partial_ptr, tile, num_rows, where + HALF, valid, SPLIT, BLOCK_N)
        if NORMED:
            scale = row_scales(squares_ptr, m, m < num_rows, eps, K, SQUARES, SQUARES_PADDED)
            gate, up = gate * scale[:, None], up * scale[:, None]
        if HAS_BIAS:
            gate += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        out = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out_ptr + m[:, None] * N + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=valid)
