"""Attention of one row inside of the persistent kernel.

The context is cut evenly among PARTS programs of each KV head. A program holds the keys and values of its
tokens, which earlier steps wrote, before it waits for the step's queries; the step's own key and value it
takes from there, not from the cache. The part that arrives last adds up all parts.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.attention_tile import fold, scaled_scores
from octavo.kernels.triton.persistent_sync import wait
from octavo.kernels.triton.product_sums import row_sum
from octavo.kernels.triton.qkv_kernel import kv_offsets

LEAST_SPAN = 32  # tokens of a part: fewer are not worth a program
_LEAST_SPAN = tl.constexpr(LEAST_SPAN)
_ROWS = tl.constexpr(16)  # of a tile: the query heads that share a KV head, and padding


@triton.jit
def context_parts(position, window, PARTS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """(first position seen, tokens of a part, parts): of the row at this position; -1 is padding."""
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(position - window + 1, 0)
    span = tl.maximum(tl.cdiv(position + 1 - begin, PARTS), _LEAST_SPAN)
    return begin, span, tl.maximum(tl.cdiv(position + 1 - begin, span), 1)


@triton.jit
def places_of(
    table_row, head, first, end, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """([TOKENS] where the keys from position `first` on lie in the cache, [TOKENS] which are before `end`)"""
    t = first + tl.arange(0, TOKENS)
    there = t < end
    block = tl.load(table_row + t // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    return ((block * 2 * KV_HEADS + head) * BLOCK_SIZE + t % BLOCK_SIZE) * D, there


@triton.jit
def keys_and_values(
    cache_ptr, places, there, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """(keys [D, TOKENS], values [TOKENS, D]), zeros where there are none"""
    d = tl.arange(0, D)
    k = tl.load(cache_ptr + places[None, :] + d[:, None], mask=there[None, :], other=0.0)
    values = cache_ptr + KV_HEADS * BLOCK_SIZE * D + places[:, None] + d[None, :]
    return k, tl.load(values, mask=there[:, None], other=0.0)


@triton.jit
def _sum(q, k, v, there, scale, soft_cap, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr):
    """(greatest score [rows], sum of weights [rows], weighted values [rows, D]) of some tokens"""
    scores = scaled_scores(tl.dot(q, k, input_precision=PRECISION), scale, soft_cap, HAS_CAP)
    scores = tl.where(there[None, :], scores, float("-inf"))
    most = tl.max(scores, axis=1)
    p = tl.exp2(scores - tl.where(most == float("-inf"), 0.0, most)[:, None])
    return most, tl.sum(p, axis=1), tl.dot(p.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def _rotate(
    x,  # [rows, D] float32
    other,  # [rows, D]: what each number turns with
    norm,  # [rows, D]
    norm_other,
    cos,  # [rows, D] float32
    sin,  # [rows, D], with the sign of the half
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
):
    """qk-norm and rotary of heads: [rows, D] float32."""
    if NORM:
        scale = tl.rsqrt(row_sum(x * x) / D + eps)[:, None]
        x = x * scale * norm.to(tl.float32)
        other = other * scale * norm_other.to(tl.float32)
    return x * cos + other * sin


@triton.jit
def attend_item(
    item,
    k,  # the keys and values of the item's first tokens
    v,
    there,
    done_ptr,  # of the phase before
    arrivals,
    position,  # -1: padding
    slot,
    begin,
    span,
    parts,
    table_row,  # pointer to the request's block ids
    raw_ptr,  # [(HEADS + 2 * KV_HEADS) * D] float32
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    out_ptr,  # [HEADS * D], written
    sums_ptr,  # [HEADS, PARTS, D] float32
    stats_ptr,  # [HEADS, PARTS, 2] float32
    counter_ptr,  # [KV_HEADS] int32, zero between phases
    scale,
    soft_cap,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SPINS: tl.constexpr,
):
    """One part of the context for one KV head: qk-norm, rotary, attention; the row's key and value stored."""
    SHARED: tl.constexpr = HEADS // KV_HEADS
    head, part = item % KV_HEADS, item // KV_HEADS
    dtype = cache_ptr.dtype.element_ty
    i, d = tl.arange(0, _ROWS)[:, None], tl.arange(0, D)[None, :]
    partner = tl.where(d < HALF_ROTARY, d + HALF_ROTARY, d - HALF_ROTARY)
    turns = d < 2 * HALF_ROTARY
    partner = tl.where(turns, partner, d)
    # the same in every line
    angle = tl.maximum(position, 0) * HALF_ROTARY + d % HALF_ROTARY + i * 0
    cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    sin = tl.where(d < HALF_ROTARY, -sin, sin)
    q_norm, q_other = tl.load(q_norm_ptr + d + i * 0), tl.load(q_norm_ptr + partner + i * 0)
    k_norm, k_other = tl.load(k_norm_ptr + d + i * 0), tl.load(k_norm_ptr + partner + i * 0)
    first = begin + part * span
    end = tl.minimum(first + span, position)  # the step's own key is not in the cache yet
    mine = (position >= first) & (position < first + span)
    if item < PROGRAMS:
        wait(done_ptr, arrivals, SPINS)
    raw = raw_ptr + (head * SHARED + i) * D
    x = tl.load(raw + d, mask=i < SHARED, other=0.0)
    other = tl.load(raw + partner, mask=i < SHARED, other=0.0)
    raw = raw_ptr + (HEADS + head) * D + i * 0
    new, new_other = tl.load(raw + d), tl.load(raw + partner)
    value = tl.load(raw + KV_HEADS * D + d).to(dtype)
    q = _rotate(x, other, q_norm, q_other, cos, sin, eps, D, NORM).to(dtype)
    most, weight, acc = _sum(q, k, v, there, scale, soft_cap, HAS_CAP, PRECISION)
    for start in range(first + TOKENS, end, TOKENS):
        places, there = places_of(table_row, head, start, end, KV_HEADS, D, BLOCK_SIZE, TOKENS)
        k, v = keys_and_values(cache_ptr, places, there, KV_HEADS, D, BLOCK_SIZE)
        most_g, weight_g, acc_g = _sum(q, k, v, there, scale, soft_cap, HAS_CAP, PRECISION)
        most, weight, acc = fold(most, weight, acc, most_g, weight_g, acc_g)
    if mine:
        key = _rotate(new, new_other, k_norm, k_other, cos, sin, eps, D, NORM).to(dtype)
        stored = (i == 0) & (slot >= 0)
        place = cache_ptr + kv_offsets(slot, head, 0, BLOCK_SIZE, KV_HEADS, D) + d + i * 0
        tl.store(place, key, mask=stored)
        tl.store(place + KV_HEADS * BLOCK_SIZE * D, value, mask=stored)
        own = tl.sum(q.to(tl.float32) * key.to(tl.float32), axis=1)
        own = scaled_scores(own, scale, soft_cap, HAS_CAP)
        most, weight, acc = fold(most, weight, acc, own, own * 0.0 + 1.0, value.to(tl.float32))
    rows, heads = tl.arange(0, _ROWS), head * SHARED
    if parts == 1:
        # padding sees nothing: its weight is 0, and it becomes zeros
        out = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
        tl.store(out_ptr + (heads + i) * D + d, out.to(out_ptr.dtype.element_ty), mask=i < SHARED)
    else:
        place = (heads + rows) * PARTS + part
        tl.store(sums_ptr + place[:, None] * D + d, acc, mask=i < SHARED)
        tl.store(stats_ptr + place * 2, most, mask=rows < SHARED)
        tl.store(stats_ptr + place * 2 + 1, weight, mask=rows < SHARED)
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + head, 1, sem="acq_rel") == parts - 1:
            tl.store(counter_ptr + head, 0)
            p = tl.arange(0, PARTS)
            had = p < parts
            for shared in tl.static_range(SHARED):
                place = (heads + shared) * PARTS + p
                stats, sums = stats_ptr + place * 2, sums_ptr + place[:, None] * D + d
                most = tl.load(stats, mask=had, other=float("-inf"), cache_modifier=".cg")
                weight = tl.load(stats + 1, mask=had, other=0.0, cache_modifier=".cg")
                sums = tl.load(sums, mask=had[:, None], other=0.0, cache_modifier=".cg")
                share = tl.exp2(most - tl.max(most, axis=0))
                out = tl.sum(sums * share[:, None], axis=0) / tl.sum(weight * share, axis=0)
                columns = (heads + shared) * D + tl.arange(0, D)
                tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty))
