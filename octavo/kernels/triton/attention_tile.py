"""Attention of query tiles of many rows: chunks of prompts that no other kernel takes. See attention.py.

A program computes one tile: some rows of a request and the query heads that share a KV head. Keys are read in
groups of GROUP tokens, counted from position 0; each is summed by itself and folded into the result in order.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.launch import begin, prefetch
from octavo.kernels.triton.quick import kernel


@triton.jit
def read_tile(tiles_ptr, tile):
    """(row of the block table, first token row, rows, first position seen, last + 1), see plan_kernel"""
    fields = tiles_ptr + tile * 16
    return tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4)


@triton.jit
def scaled_scores(scores, scale, soft_cap, HAS_CAP: tl.constexpr):
    """What exp2 takes: products of queries and keys times the scale, below the soft cap if there is one."""
    scores = scores * scale
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * scores / soft_cap) + 1.0)) * 1.4426950408889634
    return scores


@triton.jit
def sum_group(
    q,  # [BLOCK_Q, D]
    position,  # [BLOCK_Q], -1 for rows that see nothing
    cache_ptr,
    table_row,  # pointer to the request's block ids
    head,
    first,  # position of the group
    last,  # one behind the last position any row sees
    scale,  # times log2(e), where there is no soft cap
    soft_cap,
    window,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(greatest score [BLOCK_Q], sum of weights [BLOCK_Q], weighted values [BLOCK_Q, D]) of a group."""
    d = tl.arange(0, D_PADDED)
    kv = first + tl.arange(0, GROUP)
    there = kv < last
    block = tl.load(table_row + kv // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    where = ((block * 2 * KV_HEADS + head) * BLOCK_SIZE + kv % BLOCK_SIZE) * D
    values = cache_ptr + (where + KV_HEADS * BLOCK_SIZE * D)[:, None] + d[None, :]
    if D == D_PADDED:
        k = tl.load(cache_ptr + where[None, :] + d[:, None], mask=there[None, :], other=0.0)
        v = tl.load(values, mask=there[:, None], other=0.0)
    else:
        k = tl.load(
            cache_ptr + where[None, :] + d[:, None], mask=there[None, :] & (d[:, None] < D), other=0.0
        )
        v = tl.load(values, mask=there[:, None] & (d[None, :] < D), other=0.0)
    scores = scaled_scores(tl.dot(q, k, input_precision=PRECISION), scale, soft_cap, HAS_CAP)
    sees = kv[None, :] <= position[:, None]
    if HAS_WINDOW:
        sees = sees & (kv[None, :] > position[:, None] - window)
    scores = tl.where(sees, scores, float("-inf"))
    most = tl.max(scores, axis=1)
    p = tl.exp2(scores - tl.where(most == float("-inf"), 0.0, most)[:, None])
    weight = tl.sum(p, axis=1)
    return most, weight, tl.dot(p.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def fold(most, weight, acc, most_g, weight_g, acc_g):
    """Two disjoint sums as one; a side that saw nothing leaves the other's bits alone."""
    higher = tl.maximum(most, most_g)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    ours, theirs = tl.exp2(most - base), tl.exp2(most_g - base)
    # which of the two products is rounded is said here, so that it is the same wherever this is compiled
    acc = tl.fma(acc, tl.broadcast_to(ours[:, None], acc.shape), acc_g * theirs[:, None])
    return higher, tl.fma(weight, ours, weight_g * theirs), acc


@triton.jit
def group_places(
    table_row,  # pointer to the request's block ids
    head,
    group,
    last,  # one behind the last position any row sees
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """[GROUP] int64: where the keys of a group lie in the cache; behind the last one, where that lies."""
    kv = tl.minimum(group * GROUP + tl.arange(0, GROUP), last - 1)
    block = tl.load(table_row + kv // BLOCK_SIZE).to(tl.int64)
    return ((block * 2 * KV_HEADS + head) * BLOCK_SIZE + kv % BLOCK_SIZE) * D


@triton.jit
def prefetch_group(
    cache_ptr,
    places,  # [GROUP], as from group_places
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Ask the second-level cache for the keys and values of a group."""
    LINE: tl.constexpr = 1024 // cache_ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (D_PADDED + LINE - 1) // LINE
    lines = cache_ptr + places[:, None] + tl.minimum(tl.arange(0, LINES) * LINE, D - 1)[None, :]
    prefetch(lines)
    prefetch(lines + KV_HEADS * BLOCK_SIZE * D)


@triton.jit
def write_tile(
    column,  # [rows] int64
    valid,  # [rows]
    computed,  # [rows]: not padding
    begin_at,
    most,
    weight,
    acc,
    out_ptr,
    prefix_sums_ptr,
    prefix_stats_ptr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PREFIX_PARTS: tl.constexpr,
):
    """Fold what a shared prefix left, and write the result."""
    d = tl.arange(0, D_PADDED)
    inside = valid[:, None] & (d[None, :] < D)
    if PREFIX_PARTS > 0:  # noqa: SIM102
        if begin_at > 0:
            for step in tl.static_range(PREFIX_PARTS):
                place = column * PREFIX_PARTS + step
                most_g = tl.load(prefix_stats_ptr + place * 2, mask=computed, other=float("-inf"))
                weight_g = tl.load(prefix_stats_ptr + place * 2 + 1, mask=computed, other=0.0)
                acc_g = tl.load(
                    prefix_sums_ptr + place[:, None] * D + d[None, :],
                    mask=inside & (most_g > float("-inf"))[:, None], other=0.0,
                )  # fmt: skip
                most, weight, acc = fold(most, weight, acc, most_g, weight_g, acc_g)
    # a row that sees nothing (padding) has weight 0 and becomes zeros
    out = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(out_ptr + column[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=["table_stride", "window"])
def many_rows_kernel(
    q_ptr,  # [num_tokens, HEADS, D], rotary applied
    cache_ptr,  # [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
    out_ptr,  # [num_tokens, HEADS, D]
    table_ptr,  # [table rows, table_stride] int32
    tiles_ptr,  # [tiles, 16] int32, see plan_kernel
    positions_ptr,  # [num_tokens] int64
    prefix_sums_ptr,  # [num_tokens * HEADS, PREFIX_PARTS, D] float32, see shared.py
    prefix_stats_ptr,  # [num_tokens * HEADS, PREFIX_PARTS, 2] float32
    table_stride,
    scale,  # times log2(e), where there is no soft cap
    soft_cap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PREFIX_PARTS: tl.constexpr,  # partial sums over a shared prefix, where a tile has one; 0: none has
    EARLY: tl.constexpr,  # the plan is older than the launch before this one
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    SHARED: tl.constexpr = HEADS // KV_HEADS
    if not EARLY:
        begin(PDL)
    table_index, first_row, count, begin_at, last = read_tile(tiles_ptr, tile)
    i, d = tl.arange(0, BLOCK_Q), tl.arange(0, D_PADDED)
    valid = i < count * SHARED
    position = tl.load(positions_ptr + first_row + i // SHARED, mask=valid, other=-1).to(tl.int32)
    table_row = table_ptr + table_index.to(tl.int64) * table_stride
    first_group, num_groups = begin_at // GROUP, tl.cdiv(last, GROUP)
    if EARLY:
        if PDL:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
            if first_group < num_groups:
                # earlier steps wrote nearly all of it: the cache may fetch it during the wait
                places = group_places(table_row, head, first_group, last, KV_HEADS, D, BLOCK_SIZE, GROUP)
                prefetch_group(cache_ptr, places, KV_HEADS, D, D_PADDED, BLOCK_SIZE)
        begin(PDL)
    if count == 0:
        return
    column = (first_row + i // SHARED).to(tl.int64) * HEADS + head * SHARED + i % SHARED
    inside = valid[:, None] & (d[None, :] < D)
    q = tl.load(q_ptr + column[:, None] * D + d[None, :], mask=inside, other=0.0)
    most = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_Q, D_PADDED), dtype=tl.float32)
    for group in tl.range(first_group, num_groups, num_stages=STAGES):
        most_g, weight_g, acc_g = sum_group(
            q, position, cache_ptr, table_row, head, group * GROUP, last, scale, soft_cap, window,
            KV_HEADS, D, D_PADDED, BLOCK_SIZE, GROUP, HAS_CAP, HAS_WINDOW, PRECISION,
        )  # fmt: skip
        most, weight, acc = fold(most, weight, acc, most_g, weight_g, acc_g)
    write_tile(
        column, valid, valid & (position >= 0), begin_at, most, weight, acc, out_ptr, prefix_sums_ptr,
        prefix_stats_ptr, D, D_PADDED, PREFIX_PARTS,
    )  # fmt: skip
