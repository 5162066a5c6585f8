"""One query tile of paged attention: some rows of a request, one KV head, one part of the tile's groups.

The attention kernel computes a tile a program; the persistent decoder walks over them. See attention.py.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.launch import prefetch


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
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        capped = 1.0 - 2.0 / (tl.exp(2.0 * scores / soft_cap) + 1.0)
        scores = soft_cap * capped * 1.4426950408889634
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
    acc = acc * ours[:, None] + acc_g * theirs[:, None]
    return higher, weight * ours + weight_g * theirs, acc


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
def fold_groups(
    column,  # [rows] int64: row of the step and head, as one number
    valid,  # [rows]
    first_group,
    num_groups,
    sums_ptr,
    stats_ptr,
    max_groups,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,  # groups on their way at once
):
    """The sums of groups that several programs left, folded in their order."""
    d = tl.arange(0, D_PADDED)
    inside = valid[:, None] & (d[None, :] < D)
    most = tl.full(column.shape, float("-inf"), dtype=tl.float32)
    weight = tl.zeros(column.shape, dtype=tl.float32)
    acc = tl.zeros((column.shape[0], D_PADDED), dtype=tl.float32)
    for start in range(first_group, num_groups, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            group = start + step
            place = column * max_groups + group
            there = valid & (group < num_groups)
            most_g = tl.load(stats_ptr + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
            weight_g = tl.load(stats_ptr + place * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            acc_g = tl.load(
                sums_ptr + place[:, None] * D + d[None, :], mask=inside & (group < num_groups), other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            most, weight, acc = fold(most, weight, acc, most_g, weight_g, acc_g)
    return most, weight, acc


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


@triton.jit
def attend_tile(
    tile,
    head,
    part,
    parts,  # programs that share the tile
    first_row,
    count,  # token rows, not 0
    begin_at,  # first position seen
    last,  # one behind the last
    position,  # [BLOCK_Q] int32, -1 for rows that see nothing
    table_row,  # pointer to the request's block ids
    q,  # [BLOCK_Q, D_PADDED]
    cache_ptr,  # the rest as in the attention kernel
    out_ptr,
    sums_ptr,
    stats_ptr,
    counter_ptr,
    prefix_sums_ptr,
    prefix_stats_ptr,
    max_groups,
    scale,
    soft_cap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PREFIX_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum a part's groups; the part that arrives last writes the tile's result."""
    SHARED: tl.constexpr = HEADS // KV_HEADS
    SHARED_PADDED: tl.constexpr = triton.next_power_of_2(SHARED)
    i, d = tl.arange(0, BLOCK_Q), tl.arange(0, D_PADDED)
    row = first_row + i // SHARED
    valid = i < count * SHARED
    column = row.to(tl.int64) * HEADS + head * SHARED + i % SHARED
    inside = valid[:, None] & (d[None, :] < D)
    first_group = begin_at // GROUP
    num_groups = tl.cdiv(last, GROUP)
    most = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_Q, D_PADDED), dtype=tl.float32)
    for group in tl.range(first_group + part, num_groups, parts, num_stages=STAGES):
        most_g, weight_g, acc_g = sum_group(
            q, position, cache_ptr, table_row, head, group * GROUP, last, scale, soft_cap, window,
            KV_HEADS, D, D_PADDED, BLOCK_SIZE, GROUP, HAS_CAP, HAS_WINDOW, PRECISION,
        )  # fmt: skip
        most, weight, acc = fold(most, weight, acc, most_g, weight_g, acc_g)
        if PARTS > 1:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
            if parts > 1:
                place = column * max_groups + group
                tl.store(sums_ptr + place[:, None] * D + d[None, :], acc_g, mask=inside)
                tl.store(stats_ptr + place * 2, most_g, mask=valid)
                tl.store(stats_ptr + place * 2 + 1, weight_g, mask=valid)

    writes = part == 0
    if PARTS > 1:
        num_parts = tl.minimum(num_groups - first_group, parts)
        if (parts > 1) & (num_parts > 0):  # 0: all rows are padding
            writes, finishes = False, False
            if part < num_parts:
                tl.debug_barrier()
                finishes = True
                if num_parts > 1:
                    counter = counter_ptr + tile * KV_HEADS + head
                    finishes = tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1
                    if finishes:
                        tl.store(counter, 0)
            if finishes:
                if count == 1:
                    # a decode row: its heads alone are a small tile, and leave room for many groups
                    few = tl.arange(0, SHARED_PADDED)
                    place = first_row.to(tl.int64) * HEADS + head * SHARED + few
                    valid_few = few < SHARED
                    most_few, weight_few, acc_few = fold_groups(
                        place, valid_few, first_group, num_groups, sums_ptr, stats_ptr, max_groups, D,
                        D_PADDED, 16,
                    )  # fmt: skip
                    write_tile(
                        place, valid_few, valid_few & (tl.max(position) >= 0), begin_at, most_few, weight_few,
                        acc_few, out_ptr, prefix_sums_ptr, prefix_stats_ptr, D, D_PADDED, PREFIX_PARTS,
                    )  # fmt: skip
                else:
                    most, weight, acc = fold_groups(
                        column, valid, first_group, num_groups, sums_ptr, stats_ptr, max_groups, D, D_PADDED,
                        4,
                    )  # fmt: skip
                    write_tile(
                        column, valid, valid & (position >= 0), begin_at, most, weight, acc, out_ptr,
                        prefix_sums_ptr, prefix_stats_ptr, D, D_PADDED, PREFIX_PARTS,
                    )  # fmt: skip
    if writes:
        write_tile(
            column, valid, valid & (position >= 0), begin_at, most, weight, acc, out_ptr, prefix_sums_ptr,
            prefix_stats_ptr, D, D_PADDED, PREFIX_PARTS,
        )  # fmt: skip
