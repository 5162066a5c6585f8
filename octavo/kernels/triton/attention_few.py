"""Attention of query tiles of few rows: decode and verify rows, and all that must not depend on others.

Such rows cost what reading their keys and values costs. TOKENS of them are on their way at a time, by
asynchronous copies, STAGES - 1 times over; their block ids are read a turn before. The copies begin before
the launch waits for the one before it, which makes the queries: only tokens older than the step are read so
(the plan says how many there are). Tokens are rows of the matrix unit and the query heads its columns, since
there are few of them.

Within a span of the context the softmax runs on; spans are folded in order, whether one program reads all of
them or several share them (then the last to arrive folds what lies in the workspace). Where spans end is a
matter of the position alone, so a row's result depends on nothing but the row. They are short at first, so
that many programs can share a short context, and double with the position, so that there are few to fold.
What the first of several programs read is folded already: it leaves one sum.
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

SHORT_SPANS = 8  # a power of two: so many spans of SPAN tokens from position 0 on, then as many a doubling
_SHORT_SPANS = tl.constexpr(SHORT_SPANS)


def spans_of(tokens: int, span: int) -> int:
    """How many spans so many tokens reach into."""
    doublings = max(0, (max(tokens - 1, 0) // (SHORT_SPANS * span)).bit_length() - 1)
    return SHORT_SPANS * doublings + -(-tokens // (span << doublings))


@triton.jit
def doublings_at(position, SPAN: tl.constexpr):
    """How often the spans' length has doubled at a position below 2**24."""
    exponent = (tl.maximum(position // (_SHORT_SPANS * SPAN), 1)).to(tl.float32).to(tl.int32, bitcast=True)
    return (exponent >> 23) - 127


@triton.jit
def span_at(position, SPAN: tl.constexpr):
    """The number of the span that a position lies in."""
    doublings = doublings_at(position, SPAN)
    return doublings * _SHORT_SPANS + position // (SPAN << doublings)


@triton.jit
def part_begin(part, parts, first, last, SPAN: tl.constexpr):
    """Where a part of the positions from first to last begins.

    That is where a span begins, the nearest to an even cut. The first part is never empty.
    """
    even = first + part * tl.cdiv(last - first, parts)
    span = SPAN << doublings_at(even, SPAN)
    span_of_first = SPAN << doublings_at(first, SPAN)
    edge = tl.maximum((even + span // 2) // span * span, (first // span_of_first + 1) * span_of_first)
    return tl.where(part == 0, first, tl.where(part < parts, tl.minimum(edge, last), last))


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
    stats = stats_ptr + column * max_spans * 2
    sums = sums_ptr + (column * max_spans * D)[:, None] + d[None, :]
    for start in range(first_span, num_spans, AT_ONCE):
        stats_of, sums_of = stats + start * 2, sums + start * D
        for step in tl.static_range(AT_ONCE):
            there = start + step < num_spans
            known = valid & there
            most_s = tl.load(stats_of + step * 2, mask=known, other=float("-inf"), cache_modifier=".cg")
            weight_s = tl.load(stats_of + step * 2 + 1, mask=known, other=0.0, cache_modifier=".cg")
            acc_s = tl.load(sums_of + step * D, mask=inside & there, other=0.0, cache_modifier=".cg")
            most, weight, acc = fold(most, weight, acc, most_s, weight_s, acc_s)
    return most, weight, acc


@triton.jit
def _place(first_row, i, head, max_spans, span, HEADS: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr):
    """[rows] int64: where the sum of a span lies."""
    if PDL:
        # else the compiler computes addresses before the loop, and registers are filled with what few use
        first_row = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [first_row], dtype=tl.int32, is_pure=False, pack=1
        )
    column = (first_row + i // SHARED).to(tl.int64) * HEADS + head * SHARED + i % SHARED
    return column * max_spans + span


@kernel(do_not_specialize=["table_stride", "max_spans", "window"])
def few_rows_kernel(
    q_ptr,  # [num_tokens, HEADS, D], rotary applied
    cache_ptr,  # [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
    out_ptr,  # [num_tokens, HEADS, D]
    table_ptr,  # [table rows, table_stride] int32
    items_ptr,  # [items, 16] int32, see plan_kernel
    positions_ptr,  # [num_tokens] int64
    sums_ptr,  # [num_tokens * HEADS, max_spans, D] float32
    stats_ptr,  # [num_tokens * HEADS, max_spans, 2] float32
    counter_ptr,  # [num_tokens, KV_HEADS] int32, zero between launches
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
    SHARES: tl.constexpr,  # several programs may share a tile
    STAGES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PREFIX_PARTS: tl.constexpr,  # partial sums over a shared prefix, where a tile has one; 0: none has
    EARLY: tl.constexpr,  # the plan is older than the launch before this one
    AHEAD: tl.constexpr,  # with EARLY: keys and values are read before the wait
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    item, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    SHARED: tl.constexpr = HEADS // KV_HEADS
    SHARED_PADDED: tl.constexpr = triton.next_power_of_2(SHARED)
    if not EARLY:
        begin(PDL)
    table_index, first_row, count, begin_at, last = read_tile(items_ptr, item)
    if count == 0:
        # nobody waits for a program with nothing to do; but a launch must not end before the one before it
        if EARLY:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
            if item == 0:
                begin(PDL)
        return
    i, d, t = tl.arange(0, BLOCK_Q), tl.arange(0, D_PADDED), tl.arange(0, TOKENS)
    valid = i < count * SHARED
    position = tl.load(positions_ptr + first_row + i // SHARED, mask=valid, other=-1).to(tl.int32)
    table_row = table_ptr + table_index.to(tl.int64) * table_stride
    column = (first_row + i // SHARED).to(tl.int64) * HEADS + head * SHARED + i % SHARED
    first = begin_at // TOKENS * TOKENS
    low, high, alone, end_of_first = first, last, True, last
    if SHARES:
        end_of_first = tl.load(items_ptr + item * 16 + 8)
        low, high = tl.load(items_ptr + item * 16 + 5), tl.load(items_ptr + item * 16 + 6)
        low = tl.where(low < high, low // TOKENS * TOKENS, high)
        alone = (high - low) == (last - first)
    if EARLY:
        if AHEAD:
            # the loop below waits in its first turn, but for what it cannot read before
            old = tl.load(items_ptr + item * 16 + 7)
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
        if (behind >= high) | ((behind & ((SPAN << doublings_at(at, SPAN)) - 1)) == 0):
            most, weight, acc = _fold(most, weight, acc, most_s, weight_s, acc_s)
            if SHARES:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
                if low > first:
                    place = _place(first_row, i, head, max_spans, span_at(at, SPAN), HEADS, SHARED, PDL)
                    tl.store(sums_ptr + place[None, :] * D + d[:, None], acc_s, mask=inside)
                    tl.store(stats_ptr + place * 2, most_s, mask=valid)
                    tl.store(stats_ptr + place * 2 + 1, weight_s, mask=valid)
            most_s = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
            weight_s = tl.zeros((BLOCK_Q,), dtype=tl.float32)
            acc_s = tl.zeros((D_PADDED, BLOCK_Q), dtype=tl.float32)

    if SHARES:
        finishes = False
        if (not alone) & (low < high):
            if low <= first:  # its spans are the first to be folded, and they are: one sum for all of them
                place = _place(first_row, i, head, max_spans, span_at(high - 1, SPAN), HEADS, SHARED, PDL)
                tl.store(sums_ptr + place[None, :] * D + d[:, None], acc, mask=inside)
                tl.store(stats_ptr + place * 2, most, mask=valid)
                tl.store(stats_ptr + place * 2 + 1, weight, mask=valid)
            tl.debug_barrier()
            # the counter counts tokens, so nobody needs to know how many programs there are
            counter = counter_ptr + first_row * KV_HEADS + head
            finishes = tl.atomic_add(counter, high - low, sem="acq_rel") == (last - first) - (high - low)
            if finishes:
                tl.store(counter, 0)
        if finishes:
            first_span = span_at(end_of_first - 1, SPAN)
            num_spans = span_at(last - 1, SPAN) + 1
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
    # one program has all of it, or there is nothing to see: zeros
    if (alone & (low < high)) | (last <= first):
        write_tile(
            column, valid, valid & (position >= 0), begin_at, most, weight, tl.trans(acc), out_ptr,
            prefix_sums_ptr, prefix_stats_ptr, D, D_PADDED, PREFIX_PARTS,
        )  # fmt: skip
