"""Attention over paged keys and values, for any mix of chunk, decode and verify rows in one launch.

The rows of a request are cut into query tiles: some token rows times the query heads that share a KV head.
`plan` says which rows each tile holds; it runs once a step, reads query_start_loc on the device, and leaves
no trace on the host. Tiles of few rows have a kernel of their own (attention_few.py), and so have those of
many (attention_tile.py).

In tiles of few rows a row's result depends on nothing but the row: not on the number of rows, of requests,
or of programs. The context is summed in spans whose ends are the same for all, and these are folded in order.
How many columns of the matrix unit a tile fills changes no bit either; the tests on the GPU hold that.

KV cache: [blocks, 2, kv_heads, block_size, head_dim], a head's share of a block in one piece.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.triton.attention_few import few_rows_kernel, part_begin, spans_of
from octavo.kernels.triton.attention_tile import many_rows_kernel
from octavo.kernels.triton.launch import begin, dot_precision, next_power_of_2, pdl_options, uses_pdl
from octavo.kernels.triton.quick import kernel
from octavo.kernels.triton.shared import PARTS, SharedScratch

GROUP = 128  # tokens of a span, or summed by themselves; part of the definition of a row's bits
MOST_FEW = 32  # columns of the matrix unit that the kernel for few rows fills at most
FULL = 128  # programs that fill a card
CROWDED_SHARE = 5  # spans' lengths that a program takes at least, where so many programs run anyway
LOG2_E = 1.4426950408889634
NO_LIMIT = 2**31 - 1


@kernel(
    do_not_specialize=[
        "num_items", "window", "num_reqs", "least", "most", "whole", "extra", "crowded_share", "table_stride",
    ]
)  # fmt: skip
def plan_kernel(
    starts_ptr,  # [num_reqs + 1] int32
    positions_ptr,  # [num_tokens] int64
    table_rows_ptr,  # [num_reqs] int32, each request's row of the block table; None: row r is request r's
    prefixes_ptr,  # [num_reqs] int32, tokens of a prefix that is attended to elsewhere; None: there are none
    table_ptr,  # [table rows, table_stride] int32, the block table; None: nothing is known to be old
    # [num_items, 16] int32, a program's share of a tile: table row, first row, rows, first position that the
    # tile sees, last + 1, the share's beginning and end, and how many tokens of the request this step does
    # not write
    items_ptr,
    table_stride,
    num_items,
    window,
    num_reqs,
    least,  # requests of fewer rows get no rows here
    most,  # nor those of more
    whole,  # nor do those of so many rows or more that begin with their first row
    extra,  # items beyond one a tile
    crowded_share,  # tokens of a share at least, where many programs run anyway
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SHARES: tl.constexpr,  # tiles may be shared
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    REQUESTS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    items = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, REQUESTS)
    starts = tl.load(starts_ptr + r, mask=r < num_reqs, other=0)
    ends = tl.load(starts_ptr + r + 1, mask=r < num_reqs, other=0)
    each = tl.cdiv(ends - starts, ROWS)
    parts = tl.full((REQUESTS,), 1, dtype=tl.int32)
    if SHARES:
        begins = tl.load(positions_ptr + starts, mask=ends > starts, other=-1).to(tl.int32)
        seen = tl.where(begins >= 0, begins + ends - starts, 0)
        if HAS_WINDOW:
            seen = tl.minimum(seen, window + ROWS)
        if prefixes_ptr is not None:
            seen = tl.maximum(seen - tl.load(prefixes_ptr + r, mask=r < num_reqs, other=0), 0)
        seen = tl.where((ends - starts >= least) & (ends - starts <= most), seen, 0)
        # To share costs a few microseconds: where many programs run anyway, only longer shares pay. Shares of
        # `even` tokens never need more items than there are; shorter ones do not where few contexts are long.
        programs = tl.sum(tl.where(seen > 0, each, 0), axis=0) * KV_HEADS
        share = tl.where(programs >= FULL, crowded_share, GROUP)
        behind = tl.maximum(seen - 1, 0)
        even = tl.maximum(tl.cdiv(tl.sum(behind * each, axis=0), extra), share)
        shorter = tl.maximum(tl.sum(tl.where(behind >= even, behind, 0) * each, axis=0) // extra, share)
        fits = tl.sum(behind // shorter * each, axis=0) <= extra
        parts = 1 + behind // tl.where(fits, shorter, even)
    # items without rows come last: a program with nothing to do has a place until the launch before ends
    own = each * parts
    first_item = tl.where(r < num_reqs, tl.cumsum(own) - own, 2147483647)
    request = tl.sum((first_item[None, :] <= items[:, None]).to(tl.int32), axis=1) - 1
    start = tl.load(starts_ptr + request)
    end = tl.load(starts_ptr + request + 1)
    is_its = r[None, :] == request[:, None]
    local = items - tl.sum(tl.where(r[None, :] < request[:, None], own[None, :], 0), axis=1)
    parts = tl.sum(tl.where(is_its, parts[None, :], 0), axis=1)
    part = local % parts
    first = start + local // parts * ROWS
    count = tl.minimum(tl.maximum(end - first, 0), ROWS)
    mine = (end - start >= least) & (end - start <= most)
    old = tl.load(positions_ptr + start, mask=end > start, other=-1).to(tl.int32)
    mine = mine & ~((old == 0) & (end - start >= whole))
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
    valid = items < num_items
    if prefixes_ptr is not None:
        lowest = tl.load(prefixes_ptr + request, mask=valid & (request < num_reqs), other=0)
    low = part_begin(part, parts, lowest, last, GROUP)
    high = part_begin(part + 1, parts, lowest, last, GROUP)
    table_row = request
    if table_rows_ptr is not None:
        table_row = tl.load(table_rows_ptr + request, mask=valid & (request < num_reqs), other=0)
    if table_ptr is None:
        old = tl.zeros((BLOCK_T,), dtype=tl.int32)
    else:
        # A request that begins in this step may share blocks which another one writes in this step. Shared
        # blocks are the same from the first on, so the block that the other one writes first tells.
        theirs = tl.load(positions_ptr + starts, mask=(r < num_reqs) & (ends > starts), other=-1).to(tl.int32)
        their_row = r
        if table_rows_ptr is not None:
            their_row = tl.load(table_rows_ptr + r, mask=r < num_reqs, other=0)
        block = tl.where(theirs >= 0, theirs // BLOCK_SIZE, 0)
        written = table_ptr + their_row.to(tl.int64) * table_stride + block
        written = tl.load(written, mask=theirs >= 0, other=-1)
        asked = valid[:, None] & (theirs >= 0)[None, :] & (r[None, :] != request[:, None])
        asked = asked & (theirs[None, :] < old[:, None])
        ours = table_ptr + (table_row.to(tl.int64) * table_stride)[:, None] + block[None, :]
        same = tl.load(ours, mask=asked, other=-2) == written[None, :]
        old = tl.minimum(old, tl.min(tl.where(same, (block * BLOCK_SIZE)[None, :], 2147483647), axis=1))
    tl.store(items_ptr + items * 16, table_row, mask=valid)
    tl.store(items_ptr + items * 16 + 1, first, mask=valid)
    tl.store(items_ptr + items * 16 + 2, count, mask=valid)
    tl.store(items_ptr + items * 16 + 3, lowest, mask=valid)
    tl.store(items_ptr + items * 16 + 4, last, mask=valid)
    tl.store(items_ptr + items * 16 + 5, low, mask=valid)
    tl.store(items_ptr + items * 16 + 6, high, mask=valid)
    tl.store(items_ptr + items * 16 + 7, old, mask=valid)
    tl.store(items_ptr + items * 16 + 8, part_begin(1, parts, lowest, last, GROUP), mask=valid)


@dataclass(frozen=True, slots=True)
class QueryTiling:
    """How query rows are packed. One is used for a whole launch.

    `block_q` of at most MOST_FEW goes to the kernel for few rows.
    """

    block_q: int = 8
    stages: int = 3
    warps: int = 4
    registers: int | None = None  # a thread may have at most; None: the compiler's choice

    def rows(self, spec: AttentionSpec) -> int:
        """Token rows of a tile."""
        return max(1, self.block_q // (spec.num_heads // spec.num_kv_heads))


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Which rows each query tile of a step holds."""

    tiles: torch.Tensor  # [num_items, 16] int32, see plan_kernel
    tiling: QueryTiling
    extra: int  # items beyond one a tile, for tiles of long contexts


@dataclass(slots=True)
class Scratch:
    """Sums of spans that several programs share; empty as long as nothing needs it."""

    sums: torch.Tensor
    stats: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def allocate(cls, num_rows: int, max_len: int, spec: AttentionSpec, device: torch.device) -> Scratch:
        """For steps of up to num_rows rows whose tiles are shared."""
        places = num_rows * spec.num_heads * spans_of(max_len, GROUP)
        return cls(
            torch.empty(places * spec.head_dim, dtype=torch.float32, device=device),
            torch.empty(places * 2, dtype=torch.float32, device=device),
            torch.zeros(num_rows * spec.num_kv_heads, dtype=torch.int32, device=device),
        )


def plan(
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    tiling: QueryTiling,
    extra: int = 0,
    least: int = 0,
    most: int = NO_LIMIT,
    pdl: bool | None = None,
    whole: int = NO_LIMIT,
    block_size: int | None = None,
    room: int = 16,
) -> TilePlan:
    """Cut the rows of a step into tiles; `least` and `most` choose requests by their number of rows.

    `whole`: requests that begin in this step with so many rows or more are left out. `block_size`: tokens of
    a KV block; with it, keys and values older than the step are read before the step's own are written.
    `room`: a power of two; any number of requests up to it takes the same compiled kernel.
    """
    rows = tiling.rows(spec)
    starts = metadata.query_start_loc
    num_reqs = metadata.num_reqs
    num_items = min(metadata.num_tokens, metadata.num_tokens // rows + num_reqs) + extra
    tiles = torch.empty(num_items, 16, dtype=torch.int32, device=starts.device)
    pdl = uses_pdl(starts) if pdl is None else pdl
    block_t = 16
    plan_kernel[(-(-num_items // block_t),)](
        starts, metadata.positions, metadata.table_rows,
        None if metadata.shared is None else metadata.shared.lengths,
        None if block_size is None else metadata.block_table, tiles, metadata.block_table.stride(0),
        num_items, spec.sliding_window or 0, num_reqs, least, most, whole, extra,
        CROWDED_SHARE * GROUP, ROWS=rows,
        ROWS_PADDED=next_power_of_2(rows),
        HAS_WINDOW=spec.sliding_window is not None, SHARES=extra > 0, KV_HEADS=spec.num_kv_heads, GROUP=GROUP,
        FULL=FULL, BLOCK_SIZE=block_size or 1, BLOCK_T=block_t,
        REQUESTS=max(room, next_power_of_2(num_reqs)), PDL=pdl, num_warps=4, **pdl_options(pdl),
    )  # fmt: skip
    return TilePlan(tiles, tiling, extra)


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
    shares, tiling = plan.extra > 0, plan.tiling
    is_few = tiling.block_q <= MOST_FEW
    if shares and not is_few:
        raise ValueError("tiles of many rows have one program each")
    max_spans = spans_of(metadata.max_seq_len, GROUP)
    if shares:
        places = metadata.num_tokens * spec.num_heads * max_spans
        if scratch is None or scratch.stats.numel() < places * 2:
            raise ValueError(f"{places} sums of spans do not fit the scratch memory")
    pdl = uses_pdl(q)
    has_cap = spec.soft_cap is not None
    scale = spec.scale * (1.0 if has_cap else LOG2_E)
    shape = {
        "HEADS": spec.num_heads, "KV_HEADS": kv_heads, "D": head_dim,
        "D_PADDED": max(16, next_power_of_2(head_dim)), "BLOCK_SIZE": block_size, "BLOCK_Q": tiling.block_q,
        "STAGES": tiling.stages, "HAS_CAP": has_cap, "HAS_WINDOW": spec.sliding_window is not None,
        "PREFIX_PARTS": 0 if prefixes is None else PARTS, "EARLY": early,
        "PRECISION": dot_precision(q.dtype), "PDL": pdl, "num_warps": tiling.warps, **pdl_options(pdl),
    }  # fmt: skip
    if tiling.registers is not None:
        shape["maxnreg"] = tiling.registers
    of_prefixes = (out, out) if prefixes is None else (prefixes.sums, prefixes.stats)
    if not is_few:
        many_rows_kernel[(len(plan.tiles), kv_heads)](
            q, kv_cache, out, metadata.block_table, plan.tiles, metadata.positions, *of_prefixes,
            metadata.block_table.stride(0), scale, spec.soft_cap or 1.0, spec.sliding_window or 0,
            GROUP=GROUP, **shape,
        )  # fmt: skip
        return
    sums = (out, out, plan.tiles) if scratch is None else (scratch.sums, scratch.stats, scratch.counters)
    few_rows_kernel[(len(plan.tiles) * kv_heads,)](
        q, kv_cache, out, metadata.block_table, plan.tiles, metadata.positions, *sums, *of_prefixes,
        metadata.block_table.stride(0), max_spans, scale, spec.soft_cap or 1.0, spec.sliding_window or 0,
        TOKENS=min(GROUP, tokens_at_once(q.dtype, head_dim)), SPAN=GROUP, SHARES=shares,
        AHEAD=tiling.block_q == 8, **shape,
    )  # fmt: skip


def tokens_at_once(dtype: torch.dtype, head_dim: int) -> int:
    """Tokens whose keys and values a program of few rows takes at a time; part of a row's bits."""
    return 64 // (2 if head_dim > 128 else 1) // (dtype.itemsize // 2)
