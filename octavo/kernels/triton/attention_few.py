"""Attention of query tiles of few rows: decode and verify rows, and all that must not depend on others.

Such rows cost what reading their keys and values costs. TOKENS of them are on their way at a time, by
asynchronous copies, STAGES - 1 times over; their block ids are read a turn before. The copies begin before
the launch waits for the one before it, which makes the queries: only tokens older than the step are read so
(the plan says how many there are). Tokens are rows of the matrix unit and the query heads its columns, since
there are few of them.

Within a span of the context the softmax runs on; spans are folded in order, whether one program reads all of
them or several share them (then the last to arrive folds what lies in the workspace). Where spans end is a
matter of the position alone, so a row's result depends on nothing but the row.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.attention_tile import (
    fold,
    group_places,
    prefetch_group,
    read_tile,
    scaled_scores,
    write_tile,
)
from octavo.kernels.triton.launch import begin
from octavo.kernels.triton.quick import kernel

SHORT_SPANS = 16  # spans of SPAN tokens, from position 0 on; those behind them are LONGER times as long
LONGER = 4
_SHORT_SPANS, _LONGER = tl.constexpr(SHORT_SPANS), tl.constexpr(LONGER)


def spans_of(tokens: int, span: int) -> int:
    """How many spans so many tokens reach into."""
    return min(-(-tokens // span), SHORT_SPANS + max(0, -(-(tokens - SHORT_SPANS * span) // (LONGER * span))))


@triton.jit
def span_at(position, SPAN: tl.constexpr):
    """The number of the span that a position lies in."""
    behind = (position - _SHORT_SPANS * SPAN) // (_LONGER * SPAN) + _SHORT_SPANS
    return tl.where(position < _SHORT_SPANS * SPAN, position // SPAN, behind)


@triton.jit
def next_span(position, SPAN: tl.constexpr):
    """Where the first span begins that does not begin before this position."""
    longer = tl.cdiv(position, _LONGER * SPAN) * (_LONGER * SPAN)
    return tl.where(position <= _SHORT_SPANS * SPAN, tl.cdiv(position, SPAN) * SPAN, longer)


@triton.jit
def part_begin(part, parts, first, last, SPAN: tl.constexpr):
    """Where a part of the positions from first to last begins: a span's beginning, but for the first part."""
    edge = next_span(first + part * tl.cdiv(last - first, parts), SPAN)
    return tl.where(part == 0, first, tl.minimum(edge, last))


@triton.jit
def block_ids(table_row, first, last, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """The blocks of TOKENS tokens: one number a block where whole blocks make them up, else one a token."""
    if TOKENS % BLOCK_SIZE == 0:
        block = first // BLOCK_SIZE + tl.arange(0, TOKENS // BLOCK_SIZE)
        there = block * BLOCK_SIZE < last
    else:
        token = first + tl.arange(0, TOKENS)
        block, there = token // BLOCK_SIZE, token < last
    return tl.load(table_row + block, mask=there, other=0)


@triton.jit
def _of_tokens(ids, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """[TOKENS] int64, the block of each token."""
    if TOKENS % BLOCK_SIZE == 0:
        ids = tl.broadcast_to(ids[:, None], (TOKENS // BLOCK_SIZE, BLOCK_SIZE)).reshape(TOKENS)
    return ids.to(tl.int64)


@triton.jit
def _fold(most, weight, acc, most_s, weight_s, acc_s):
    """As `fold`, with the rows along the second axis."""
    higher = tl.maximum(most, most_s)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    ours, theirs = tl.exp2(most - base), tl.exp2(most_s - base)
    acc = tl.fma(acc, tl.broadcast_to(ours[None, :], acc.shape), acc_s * theirs[None, :])
    return higher, tl.fma(weight, ours, weight_s * theirs), acc


@triton.jit
def _fold_spans(
    column,  # [rows] int64: row of the step and head, as one number
    valid,  # [rows]
    first_span,
    num_spans,
    sums_ptr,
    stats_ptr,
    max_spans,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,  # spans on their way at once
):
    """The sums of spans that several programs left, folded in their order."""
    d = tl.arange(0, D_PADDED)
    inside = valid[:, None] & (d[None, :] < D)
    most = tl.full(column.shape, float("-inf"), dtype=tl.float32)
    weight = tl.zeros(column.shape, dtype=tl.float32)
    acc = tl.zeros((column.shape[0], D_PADDED), dtype=tl.float32)
    for start in range(first_span, num_spans, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            span = start + step
            place = column * max_spans + span
            there = valid & (span < num_spans)
            most_s = tl.load(stats_ptr + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
            weight_s = tl.load(stats_ptr + place * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            acc_s = tl.load(
                sums_ptr + place[:, None] * D + d[None, :], mask=inside & (span < num_spans), other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            most, weight, acc = fold(most, weight, acc, most_s, weight_s, acc_s)
    return most, weight, acc


@kernel(do_not_specialize=["table_stride", "max_spans", "window"])
def few_rows_kernel(
    q_ptr,  # [num_tokens, HEADS, D], rotary applied
    cache_ptr,  # [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
    out_ptr,  # [num_tokens, HEADS, D]
    table_ptr,  # [table rows, table_stride] int32
    tiles_ptr,  # [tiles, 8] int32, see plan_kernel
    positions_ptr,  # [num_tokens] int64
    sums_ptr,  # [num_tokens * HEADS, max_spans, D] float32
    stats_ptr,  # [num_tokens * HEADS, max_spans, 2] float32
    counter_ptr,  # [tiles, KV_HEADS] int32, zero between launches
    prefix_sums_ptr,  # [num_tokens * HEADS, PREFIX_PARTS, D] float32, see shared.py
    prefix_stats_ptr,  # [num_tokens * HEADS, PREFIX_PARTS, 2] float32
    table_stride,
    max_spans,
    scale,  # times log2(e), where there is no soft cap
    soft_cap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,  # a multiple of TOKENS
    PARTS: tl.constexpr,  # programs that may share a tile
    STAGES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PREFIX_PARTS: tl.constexpr,  # partial sums over a shared prefix, where a tile has one; 0: none has
    EARLY: tl.constexpr,  # the plan is older than the launch before this one
    AHEAD: tl.constexpr,  # with EARLY: keys and values are read before the wait
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, head, part = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    SHARED: tl.constexpr = HEADS // KV_HEADS
    SHARED_PADDED: tl.constexpr = triton.next_power_of_2(SHARED)
    LONG_FROM: tl.constexpr = _SHORT_SPANS * SPAN
    if not EARLY:
        begin(PDL)
    table_index, first_row, count, begin_at, last = read_tile(tiles_ptr, tile)
    i, d, t = tl.arange(0, BLOCK_Q), tl.arange(0, D_PADDED), tl.arange(0, TOKENS)
    valid = i < count * SHARED
    position = tl.load(positions_ptr + first_row + i // SHARED, mask=valid, other=-1).to(tl.int32)
    table_row = table_ptr + table_index.to(tl.int64) * table_stride
    column = (first_row + i // SHARED).to(tl.int64) * HEADS + head * SHARED + i % SHARED
    first = begin_at // TOKENS * TOKENS
    low, high, active = first, last, 1
    if PARTS > 1:
        parts = tl.load(tiles_ptr + tile * 8 + 5)
        low = part_begin(part, parts, first, last, SPAN)
        high = part_begin(part + 1, parts, first, last, SPAN)
        every = tl.arange(0, PARTS)
        begins = part_begin(every, parts, first, last, SPAN)
        active = tl.sum((begins < part_begin(every + 1, parts, first, last, SPAN)).to(tl.int32), axis=0)
    if EARLY:
        if AHEAD:
            # the loop below waits in its first turn, but for what it cannot read before
            old = tl.load(tiles_ptr + tile * 8 + 6)
            if tl.minimum(high, low + STAGES * TOKENS) > old:
                if PDL:  # noqa: SIM102
                    if low < high:
                        # nearly all of it is old: the second-level cache may fetch it during the wait
                        span = low // SPAN
                        places = group_places(table_row, head, span, last, KV_HEADS, D, BLOCK_SIZE, SPAN)
                        prefetch_group(cache_ptr, places, KV_HEADS, D, D_PADDED, BLOCK_SIZE)
                begin(PDL)
            elif low >= high:
                begin(PDL)
        else:
            begin(PDL)
    if count == 0:
        return
    inside = valid[None, :] & (d[:, None] < D)
    queries = q_ptr + column[None, :] * D + d[:, None]
    q = tl.zeros((D_PADDED, BLOCK_Q), dtype=q_ptr.dtype.element_ty)
    if not (EARLY and AHEAD):
        q = tl.load(queries, mask=inside, other=0.0)

    most = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = tl.zeros((D_PADDED, BLOCK_Q), dtype=tl.float32)
    most_s, weight_s, acc_s = most, weight, acc
    of_head = cache_ptr + head * (BLOCK_SIZE * D)
    ids = block_ids(table_row, low, last, BLOCK_SIZE, TOKENS)
    for at in tl.range(low, high, TOKENS, num_stages=STAGES):
        kv = at + t
        there = kv < last
        where = _of_tokens(ids, BLOCK_SIZE, TOKENS) * (2 * KV_HEADS * BLOCK_SIZE * D) + kv % BLOCK_SIZE * D
        ids = block_ids(table_row, at + TOKENS, last, BLOCK_SIZE, TOKENS)
        keys = of_head + where[:, None] + d[None, :]
        values = tl.trans(keys + KV_HEADS * BLOCK_SIZE * D)
        if D == D_PADDED:
            k = tl.load(keys, mask=there[:, None], other=0.0)
            v = tl.load(values, mask=there[None, :], other=0.0)
        else:
            k = tl.load(keys, mask=there[:, None] & (d[None, :] < D), other=0.0)
            v = tl.load(values, mask=there[None, :] & (d[:, None] < D), other=0.0)
        if EARLY and AHEAD:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
            # wait and load in one branch: the compiler moves statements of this loop past one another
            if at == low:
                begin(PDL)
                q = tl.load(queries, mask=inside, other=0.0)
        scores = scaled_scores(tl.dot(k, q, input_precision=PRECISION), scale, soft_cap, HAS_CAP)
        sees = kv[:, None] <= position[None, :]
        if HAS_WINDOW:
            sees = sees & (kv[:, None] > position[None, :] - window)
        scores = tl.where(sees, scores, float("-inf"))
        higher = tl.maximum(most_s, tl.max(scores, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - base[None, :])
        shrink = tl.exp2(most_s - base)
        most_s = higher
        weight_s = tl.fma(weight_s, shrink, tl.sum(p, axis=0))
        acc_s = tl.dot(v, p.to(v.dtype), acc_s * shrink[None, :], input_precision=PRECISION)
        behind = at + TOKENS
        if (behind >= high) | (behind % tl.where(behind < LONG_FROM, SPAN, _LONGER * SPAN) == 0):
            most, weight, acc = _fold(most, weight, acc, most_s, weight_s, acc_s)
            if PARTS > 1:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
                if active > 1:
                    place = column * max_spans + span_at(at, SPAN)
                    tl.store(sums_ptr + place[None, :] * D + d[:, None], acc_s, mask=inside)
                    tl.store(stats_ptr + place * 2, most_s, mask=valid)
                    tl.store(stats_ptr + place * 2 + 1, weight_s, mask=valid)
            most_s = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
            weight_s = tl.zeros((BLOCK_Q,), dtype=tl.float32)
            acc_s = tl.zeros((D_PADDED, BLOCK_Q), dtype=tl.float32)

    if PARTS > 1:
        finishes = False
        if (active > 1) & (low < high):
            tl.debug_barrier()
            counter = counter_ptr + tile * KV_HEADS + head
            finishes = tl.atomic_add(counter, 1, sem="acq_rel") == active - 1
            if finishes:
                tl.store(counter, 0)
        if finishes:
            first_span, num_spans = span_at(first, SPAN), span_at(last - 1, SPAN) + 1
            if count == 1:
                # a decode row: its heads alone are a small tile, and leave room for many spans
                few = tl.arange(0, SHARED_PADDED)
                place = first_row.to(tl.int64) * HEADS + head * SHARED + few
                valid_few = few < SHARED
                most_few, weight_few, acc_few = _fold_spans(
                    place, valid_few, first_span, num_spans, sums_ptr, stats_ptr, max_spans, D, D_PADDED, 16
                )
                write_tile(
                    place, valid_few, valid_few & (tl.max(position) >= 0), begin_at, most_few, weight_few,
                    acc_few, out_ptr, prefix_sums_ptr, prefix_stats_ptr, D, D_PADDED, PREFIX_PARTS,
                )  # fmt: skip
            else:
                most_all, weight_all, acc_all = _fold_spans(
                    column, valid, first_span, num_spans, sums_ptr, stats_ptr, max_spans, D, D_PADDED, 4
                )
                write_tile(
                    column, valid, valid & (position >= 0), begin_at, most_all, weight_all, acc_all, out_ptr,
                    prefix_sums_ptr, prefix_stats_ptr, D, D_PADDED, PREFIX_PARTS,
                )  # fmt: skip
    # one program has all of it; where there is nothing to see, the first writes zeros
    if (active <= 1) & ((low < high) | ((part == 0) & (last <= first))):
        write_tile(
            column, valid, valid & (position >= 0), begin_at, most, weight, tl.trans(acc), out_ptr,
            prefix_sums_ptr, prefix_stats_ptr, D, D_PADDED, PREFIX_PARTS,
        )  # fmt: skip
