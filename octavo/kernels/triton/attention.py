"""Attention over paged keys and values, for any mix of chunk, decode and verify rows in one launch.

The rows of a request are cut into query tiles: ROWS token rows times the query heads that share a
KV head, packed so that the matrix unit gets BLOCK_Q rows. `plan` says which rows each tile holds;
it runs once a step, reads query_start_loc on the device, and leaves no trace on the host.

Keys are read in groups of GROUP tokens, counted from position 0. Each group is summed by itself
and folded into the result in order, whether one program reads all groups or PARTS programs share
them (then the last to arrive folds what lies in the workspace). So a row's result depends on
nothing but the row: not on the number of rows, of requests, or of programs.

KV cache: [blocks, 2, kv_heads, block_size, head_dim], a head's share of a block in one piece.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.triton.attention_tile import attend_tile, group_places, prefetch_group
from octavo.kernels.triton.launch import begin, dot_precision, next_power_of_2, pdl_options, uses_pdl
from octavo.kernels.triton.shared import PARTS, SharedScratch

GROUP = 128  # tokens summed by themselves; part of the definition of a row's bits
FULL = 128  # programs that fill a card
LOG2_E = 1.4426950408889634
NO_LIMIT = 2**31 - 1


@triton.jit(do_not_specialize=["num_tiles", "window", "num_reqs", "least", "most", "whole"])
def plan_kernel(
    starts_ptr,  # [num_reqs + 1] int32
    positions_ptr,  # [num_tokens] int64
    table_rows_ptr,  # [num_reqs] int32, each request's row of the block table; None: row r is request r's
    prefixes_ptr,  # [num_reqs] int32, tokens of a prefix that is attended to elsewhere; None: there are none
    tiles_ptr,  # [num_tiles, 6] int32: table row, first row, rows, first position seen, last + 1, parts
    num_tiles,
    window,
    num_reqs,
    least,  # requests of fewer rows get no rows here
    most,  # nor those of more
    whole,  # nor do those of so many rows or more that begin with their first row
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PARTS: tl.constexpr,  # programs that may share a tile
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    REQUESTS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tiles = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, REQUESTS)
    starts = tl.load(starts_ptr + r, mask=r < num_reqs, other=0)
    first_tile = tl.where(r < num_reqs, starts // ROWS + r, 2147483647)
    request = tl.sum((first_tile[None, :] <= tiles[:, None]).to(tl.int32), axis=1) - 1
    start = tl.load(starts_ptr + request)
    end = tl.load(starts_ptr + request + 1)
    first = start + (tiles - (start // ROWS + request)) * ROWS
    count = tl.minimum(tl.maximum(end - first, 0), ROWS)
    mine = (end - start >= least) & (end - start <= most)
    begins = tl.load(positions_ptr + start, mask=end > start, other=-1) == 0
    mine = mine & ~(begins & (end - start >= whole))
    count = tl.where(mine, count, 0)
    i = tl.arange(0, ROWS_PADDED)
    position = tl.load(
        positions_ptr + first[:, None] + i[None, :], mask=i[None, :] < count[:, None], other=-1
    ).to(tl.int32)
    last = tl.max(position, axis=1) + 1
    lowest = tl.zeros((BLOCK_T,), dtype=tl.int32)
    if HAS_WINDOW:
        lowest = tl.min(tl.where(position >= 0, position, 2147483647), axis=1)
        lowest = tl.where(last > 0, tl.maximum(lowest - window + 1, 0), 0)
    valid = tiles < num_tiles
    if prefixes_ptr is not None:
        lowest = tl.load(prefixes_ptr + request, mask=valid & (request < num_reqs), other=0)
    parts = tl.full((BLOCK_T,), 1, dtype=tl.int32)
    if PARTS > 1:
        # To share costs a few microseconds: it pays where few programs would run, or long ones.
        ends = tl.load(starts_ptr + r + 1, mask=r < num_reqs, other=0)
        programs = tl.sum(tl.where(r < num_reqs, tl.cdiv(ends - starts, ROWS), 0), axis=0) * KV_HEADS
        alone = (programs >= FULL) | ((programs >= FULL // 2) & (last - lowest <= 8 * GROUP))
        parts = tl.where(alone, 1, PARTS)
    table_row = request
    if table_rows_ptr is not None:
        table_row = tl.load(table_rows_ptr + request, mask=valid & (request < num_reqs), other=0)
    tl.store(tiles_ptr + tiles * 6, table_row, mask=valid)
    tl.store(tiles_ptr + tiles * 6 + 1, first, mask=valid)
    tl.store(tiles_ptr + tiles * 6 + 2, count, mask=valid)
    tl.store(tiles_ptr + tiles * 6 + 3, lowest, mask=valid)
    tl.store(tiles_ptr + tiles * 6 + 4, last, mask=valid)
    tl.store(tiles_ptr + tiles * 6 + 5, parts, mask=valid)


@triton.jit(do_not_specialize=["table_stride", "max_groups", "window"])
def attention_kernel(
    q_ptr,  # [num_tokens, HEADS, D], rotary applied
    cache_ptr,  # [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
    out_ptr,  # [num_tokens, HEADS, D]
    table_ptr,  # [table rows, table_stride] int32
    tiles_ptr,  # [tiles, 6] int32
    positions_ptr,  # [num_tokens] int64
    sums_ptr,  # [num_tokens * HEADS, max_groups, D] float32
    stats_ptr,  # [num_tokens * HEADS, max_groups, 2] float32
    counter_ptr,  # [tiles, KV_HEADS] int32, zero between launches
    prefix_sums_ptr,  # [num_tokens * HEADS, PREFIX_PARTS, D] float32, see shared.py
    prefix_stats_ptr,  # [num_tokens * HEADS, PREFIX_PARTS, 2] float32
    table_stride,
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
    PREFIX_PARTS: tl.constexpr,  # partial sums over a shared prefix, where a tile has one; 0: none has
    EARLY: tl.constexpr,  # the plan is older than the launch before this one
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SHARED: tl.constexpr = HEADS // KV_HEADS
    if not EARLY:
        begin(PDL)
    table_index = tl.load(tiles_ptr + tile * 6)
    first_row = tl.load(tiles_ptr + tile * 6 + 1)
    count = tl.load(tiles_ptr + tile * 6 + 2)
    begin_at = tl.load(tiles_ptr + tile * 6 + 3)
    last = tl.load(tiles_ptr + tile * 6 + 4)
    i, d = tl.arange(0, BLOCK_Q), tl.arange(0, D_PADDED)
    position = tl.load(positions_ptr + first_row + i // SHARED, mask=i < count * SHARED, other=-1)
    table_row = table_ptr + table_index.to(tl.int64) * table_stride
    if EARLY:
        if PDL:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
            if begin_at // GROUP + part < tl.cdiv(last, GROUP):
                # earlier steps wrote nearly all of it: the cache may fetch it during the wait
                group = begin_at // GROUP + part
                places = group_places(table_row, head, group, last, KV_HEADS, D, BLOCK_SIZE, GROUP)
                prefetch_group(cache_ptr, places, KV_HEADS, D, D_PADDED, BLOCK_SIZE)
        begin(PDL)
    parts = 1
    if PARTS > 1:
        parts = tl.load(tiles_ptr + tile * 6 + 5)
    if (count == 0) | (part >= parts):
        return
    column = (first_row + i // SHARED).to(tl.int64) * HEADS + head * SHARED + i % SHARED
    inside = (i < count * SHARED)[:, None] & (d[None, :] < D)
    q = tl.load(q_ptr + column[:, None] * D + d[None, :], mask=inside, other=0.0)
    attend_tile(
        tile, head, part, parts, first_row, count, begin_at, last, position.to(tl.int32), table_row, q,
        cache_ptr, out_ptr, sums_ptr, stats_ptr, counter_ptr, prefix_sums_ptr, prefix_stats_ptr,
        max_groups, scale, soft_cap, window, HEADS, KV_HEADS, D, D_PADDED, BLOCK_SIZE, BLOCK_Q, GROUP,
        PARTS, STAGES, HAS_CAP, HAS_WINDOW, PREFIX_PARTS, PRECISION,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class QueryTiling:
    """How query rows are packed. One is used for a whole launch."""

    block_q: int = 16
    stages: int = 4  # keys are found through the block table, so two make one buffer
    warps: int = 4
    group: int | None = None  # tokens summed by themselves; None: GROUP

    def rows(self, spec: AttentionSpec) -> int:
        """Token rows of a tile."""
        return max(1, self.block_q // (spec.num_heads // spec.num_kv_heads))


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Which rows each query tile of a step holds."""

    tiles: torch.Tensor  # [num_tiles, 6] int32
    tiling: QueryTiling
    parts: int  # programs that share a tile's groups


@dataclass(slots=True)
class Scratch:
    """Sums of groups that several programs share; empty as long as nothing needs it."""

    sums: torch.Tensor
    stats: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def allocate(
        cls, num_rows: int, max_len: int, spec: AttentionSpec, max_tiles: int, device: torch.device
    ) -> Scratch:
        """For steps of up to num_rows rows whose tiles are shared."""
        places = num_rows * spec.num_heads * -(-max_len // GROUP)
        return cls(
            torch.empty(places * spec.head_dim, dtype=torch.float32, device=device),
            torch.empty(places * 2, dtype=torch.float32, device=device),
            torch.zeros(max_tiles * spec.num_kv_heads, dtype=torch.int32, device=device),
        )


def plan(
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    tiling: QueryTiling,
    parts: int = 1,
    least: int = 0,
    most: int = NO_LIMIT,
    pdl: bool | None = None,
    whole: int = NO_LIMIT,
) -> TilePlan:
    """Cut the rows of a step into tiles; `least` and `most` choose requests by their number of rows.

    `whole`: requests that begin in this step with so many rows or more are left out.
    """
    rows = tiling.rows(spec)
    starts = metadata.query_start_loc
    num_reqs = metadata.num_reqs
    num_tiles = metadata.num_tokens // rows + num_reqs
    tiles = torch.empty(num_tiles, 6, dtype=torch.int32, device=starts.device)
    pdl = uses_pdl(starts) if pdl is None else pdl
    block_t = 16
    plan_kernel[(-(-num_tiles // block_t),)](
        starts, metadata.positions, metadata.table_rows,
        None if metadata.shared is None else metadata.shared.lengths, tiles, num_tiles,
        spec.sliding_window or 0, num_reqs, least, most, whole, ROWS=rows,
        ROWS_PADDED=next_power_of_2(rows),
        HAS_WINDOW=spec.sliding_window is not None, PARTS=parts, KV_HEADS=spec.num_kv_heads, GROUP=GROUP,
        FULL=FULL, BLOCK_T=block_t,
        REQUESTS=max(16, next_power_of_2(num_reqs)), PDL=pdl, num_warps=4, **pdl_options(pdl),
    )  # fmt: skip
    return TilePlan(tiles, tiling, parts)


def attend(
    q: torch.Tensor,  # [num_tokens, heads, head_dim]
    kv_cache: torch.Tensor,  # [blocks, 2, kv_heads, block_size, head_dim]
    out: torch.Tensor,  # [num_tokens, heads, head_dim], written where the plan has rows
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    plan: TilePlan,
    scratch: Scratch | None = None,
    early: bool = False,
    prefixes: SharedScratch | None = None,
) -> None:
    """Attention of all rows of the plan.

    `early` says that at least one launch lies between the plan's and this one. `prefixes` is what
    `shared.attend` left, where the step has shared prefixes.
    """
    _, two, kv_heads, block_size, head_dim = kv_cache.shape
    if (two, kv_heads, head_dim) != (2, spec.num_kv_heads, spec.head_dim):
        raise ValueError(f"the KV cache {tuple(kv_cache.shape)} is not that of {spec}")
    if q.shape != (metadata.num_tokens, spec.num_heads, spec.head_dim) or not q.is_contiguous():
        raise ValueError(f"queries {tuple(q.shape)} do not fit {spec}")
    if metadata.block_table.stride(1) != 1:
        raise ValueError("a row of the block table must be contiguous")
    if (prefixes is None) != (metadata.shared is None):
        raise ValueError("shared prefixes and their sums go together")
    max_groups = -(-metadata.max_seq_len // GROUP)
    parts, tiling = plan.parts, plan.tiling
    if parts > 1:
        places = metadata.num_tokens * spec.num_heads * max_groups
        if scratch is None or scratch.stats.numel() < places * 2:
            raise ValueError(f"{places} sums of groups do not fit the scratch memory")
        if scratch.counters.numel() < len(plan.tiles) * kv_heads:
            raise ValueError("too many query tiles for the scratch memory's counters")
    pdl = uses_pdl(q)
    has_cap = spec.soft_cap is not None
    attention_kernel[(len(plan.tiles), kv_heads, parts)](
        q, kv_cache, out, metadata.block_table, plan.tiles, metadata.positions,
        out if scratch is None else scratch.sums, out if scratch is None else scratch.stats,
        plan.tiles if scratch is None else scratch.counters,
        out if prefixes is None else prefixes.sums, out if prefixes is None else prefixes.stats,
        metadata.block_table.stride(0), max_groups, spec.scale * (1.0 if has_cap else LOG2_E),
        spec.soft_cap or 1.0, spec.sliding_window or 0,
        HEADS=spec.num_heads, KV_HEADS=kv_heads, D=head_dim, D_PADDED=max(16, next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size, BLOCK_Q=tiling.block_q, GROUP=tiling.group or GROUP, PARTS=parts,
        PREFIX_PARTS=0 if prefixes is None else PARTS, EARLY=early, STAGES=tiling.stages, HAS_CAP=has_cap,
        HAS_WINDOW=spec.sliding_window is not None,
        PRECISION=dot_precision(q.dtype), PDL=pdl, num_warps=tiling.warps, **pdl_options(pdl),
    )  # fmt: skip
