"""Attention over a prefix that several requests share: its keys and values are read once for all of them.

Requests whose block tables begin with the same blocks form a group. The rows of a group are packed into
query tiles, whichever request they are of, since each of them sees the whole prefix: no key is masked.
PARTS programs share the prefix of a tile, and each leaves its running softmax in the scratch memory. The
attention kernel then begins behind the prefix, and folds the parts into a row's result in their order.

Which blocks are shared depends on who else runs, and the matrix unit adds up in another order here than in
tiles of few rows: so the last bits of a row depend on its neighbours, and deterministic engines do not group.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.triton.attention_tile import scaled_scores
from octavo.kernels.triton.launch import begin, dot_precision, next_power_of_2, pdl_options, uses_pdl
from octavo.kernels.triton.quick import kernel

PARTS = 8  # programs that share a tile's prefix
TILE_HEADS = 64  # query heads of a tile, over all its rows: what the matrix unit takes at once
BLOCK_KV = 64
LOG2_E = 1.4426950408889634


@kernel(do_not_specialize=["table_stride"])
def shared_kernel(
    q_ptr,  # [num_tokens, HEADS, D], rotary applied
    cache_ptr,  # [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
    table_ptr,  # [table rows, table_stride] int32
    rows_ptr,  # [tiles * BLOCK_Q / SHARED] int32, the token rows of each tile, -1: none
    tiles_ptr,  # [tiles, 2] int32: a row of the block table that has the prefix, tokens of the prefix
    sums_ptr,  # [num_tokens * HEADS, PARTS, D] float32, written
    stats_ptr,  # [num_tokens * HEADS, PARTS, 2] float32, written
    table_stride,
    scale,  # times log2(e), where there is no soft cap
    soft_cap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,  # token rows of a tile
    BLOCK_KV: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SHARED: tl.constexpr = HEADS // KV_HEADS
    begin(PDL)
    table_index = tl.load(tiles_ptr + tile * 2)
    length = tl.load(tiles_ptr + tile * 2 + 1)
    if length == 0:
        return
    i, d = tl.arange(0, BLOCK_Q), tl.arange(0, D_PADDED)
    row = tl.load(rows_ptr + tile * ROWS + i // SHARED, mask=i < ROWS * SHARED, other=-1)
    valid = row >= 0
    column = row.to(tl.int64) * HEADS + head * SHARED + i % SHARED
    inside = valid[:, None] & (d[None, :] < D)
    q = tl.load(q_ptr + column[:, None] * D + d[None, :], mask=inside, other=0.0)
    most = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_Q, D_PADDED), dtype=tl.float32)
    table_row = table_ptr + table_index.to(tl.int64) * table_stride
    a_part = tl.cdiv(tl.cdiv(length, PARTS), BLOCK_KV) * BLOCK_KV
    last = tl.minimum((part + 1) * a_part, length)
    for first in tl.range(part * a_part, last, BLOCK_KV, num_stages=STAGES):
        kv = first + tl.arange(0, BLOCK_KV)
        there = kv < last
        block = tl.load(table_row + kv // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        where = ((block * 2 * KV_HEADS + head) * BLOCK_SIZE + kv % BLOCK_SIZE) * D
        keys = cache_ptr + where[None, :] + d[:, None]
        values = cache_ptr + (where + KV_HEADS * BLOCK_SIZE * D)[:, None] + d[None, :]
        if D == D_PADDED:
            k = tl.load(keys, mask=there[None, :], other=0.0)
            v = tl.load(values, mask=there[:, None], other=0.0)
        else:
            k = tl.load(keys, mask=there[None, :] & (d[:, None] < D), other=0.0)
            v = tl.load(values, mask=there[:, None] & (d[None, :] < D), other=0.0)
        scores = scaled_scores(tl.dot(q, k, input_precision=PRECISION), scale, soft_cap, HAS_CAP)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))  # some key is there: never -inf
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        weight = weight * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        most = higher
    place = column * PARTS + part
    tl.store(sums_ptr + place[:, None] * D + d[None, :], acc, mask=inside)
    tl.store(stats_ptr + place * 2, most, mask=valid)
    tl.store(stats_ptr + place * 2 + 1, weight, mask=valid)


@dataclass(slots=True)
class SharedScratch:
    """What the parts of shared prefixes leave for the attention kernel."""

    sums: torch.Tensor  # [rows * heads * PARTS * head_dim] float32
    stats: torch.Tensor  # [rows * heads * PARTS * 2] float32

    @classmethod
    def allocate(cls, num_rows: int, spec: AttentionSpec, device: torch.device) -> SharedScratch:
        """For steps of up to num_rows rows."""
        places = num_rows * spec.num_heads * PARTS
        return cls(
            torch.empty(places * spec.head_dim, dtype=torch.float32, device=device),
            torch.empty(places * 2, dtype=torch.float32, device=device),
        )


def tile_rows(heads_a_kv_head: int) -> int:
    """Token rows of a tile."""
    return max(1, TILE_HEADS // heads_a_kv_head)


def attend(
    q: torch.Tensor,  # [num_tokens, heads, head_dim]
    kv_cache: torch.Tensor,  # [blocks, 2, kv_heads, block_size, head_dim]
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    scratch: SharedScratch,
) -> None:
    """Each row's attention to the prefix its group shares, into the scratch memory."""
    prefixes = metadata.shared
    _, two, kv_heads, block_size, head_dim = kv_cache.shape
    if prefixes is None or spec.sliding_window is not None:
        raise ValueError("no prefixes are shared, or a window hides them")
    if (two, kv_heads, head_dim) != (2, spec.num_kv_heads, spec.head_dim):
        raise ValueError(f"the KV cache {tuple(kv_cache.shape)} is not that of {spec}")
    if q.shape != (metadata.num_tokens, spec.num_heads, spec.head_dim) or not q.is_contiguous():
        raise ValueError(f"queries {tuple(q.shape)} do not fit {spec}")
    shared = spec.num_heads // spec.num_kv_heads
    rows, num_tiles = tile_rows(shared), len(prefixes.tiles)
    if prefixes.rows.shape != (num_tiles * rows,) or prefixes.tiles.shape != (num_tiles, 2):
        raise ValueError(f"{num_tiles} tiles of {rows} rows do not go with {tuple(prefixes.rows.shape)}")
    if scratch.stats.numel() < metadata.num_tokens * spec.num_heads * PARTS * 2:
        raise ValueError(f"{metadata.num_tokens} rows do not fit the scratch memory")
    if metadata.block_table.stride(1) != 1:
        raise ValueError("a row of the block table must be contiguous")
    pdl = uses_pdl(q)
    has_cap = spec.soft_cap is not None
    wide = q.element_size() == 4 or head_dim > 128
    shared_kernel[(num_tiles, kv_heads, PARTS)](
        q, kv_cache, metadata.block_table, prefixes.rows, prefixes.tiles, scratch.sums, scratch.stats,
        metadata.block_table.stride(0), spec.scale * (1.0 if has_cap else LOG2_E), spec.soft_cap or 1.0,
        HEADS=spec.num_heads, KV_HEADS=kv_heads, D=head_dim, D_PADDED=max(16, next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size, BLOCK_Q=max(16, next_power_of_2(rows * shared)), ROWS=rows, BLOCK_KV=BLOCK_KV,
        PARTS=PARTS, STAGES=1 if wide else 3, HAS_CAP=has_cap, PRECISION=dot_precision(q.dtype), PDL=pdl,
        num_warps=4, **pdl_options(pdl),
    )  # fmt: skip
