"""The bookkeeping around a draft model's passes: rows before each, drafts taken behind it.

What these compute is defined by octavo/speculation/draft_passes.py's `TorchDraftPasses`. The host sends
one table a step; how far a slot's drafts have come is read from the slot tables, so a pass is launched
before the host knows what the one before brought. One program serves one slot.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.launch import one_form
from octavo.kernels.triton.step import fill_up

# Columns of a pass table, int32: slot, rows to catch up, 1 if it drafts, first token row, rows, place among
# the rows of logits or -1.
PASS_COLUMNS = 6
BLOCK = 256  # token rows of a program


@one_form()
def settle_kernel(
    slots_ptr,  # [n] int32
    num_tokens_ptr,  # [slots] int64
    num_computed_ptr,  # [slots] int64, the draft model's
    from_model_ptr,  # [slots] uint8
    count,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + i, mask=i < count, other=0).to(tl.int64)
    last = tl.load(num_tokens_ptr + slot, mask=i < count) - 1
    computed = tl.load(num_computed_ptr + slot, mask=i < count)
    tl.store(num_computed_ptr + slot, tl.minimum(computed, last), mask=i < count)
    tl.store(from_model_ptr + slot, 0, mask=i < count)


@triton.jit
def pass_rows(
    entry,
    chunk,
    table_ptr,  # [entries, 6] int32
    tokens_ptr,  # [slots, tokens_stride] int32
    blocks_ptr,  # [slots, blocks_stride] int32, the draft model's
    num_tokens_ptr,  # [slots] int64, and so are the next three
    num_computed_ptr,  # the draft model's
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,  # [slots] uint8
    from_model_ptr,  # [slots] uint8
    ids_ptr,  # [padded_rows] int64
    positions_ptr,
    mapping_ptr,
    starts_ptr,  # [padded_reqs + 1] int32
    seq_lens_ptr,  # [padded_reqs] int32
    slots_ptr,  # [padded_reqs] int32
    valid_ptr,  # [entries] int64
    makes_ptr,  # [entries] int64, 1: this slot makes a draft in this pass
    logits_rows_ptr,  # [logits] int64
    draw_positions_ptr,  # [logits] int64
    tokens_stride,
    blocks_stride,
    entries,
    padded_reqs,
    num_rows,
    padded_rows,
    depth,  # passes of this step before this one
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program of `rows`: a slot, or what fills up behind the last one."""
    if entry >= entries:
        if chunk == 0:
            fill_up(
                entry, ids_ptr, positions_ptr, mapping_ptr, starts_ptr, seq_lens_ptr, slots_ptr, padded_reqs,
                num_rows, padded_rows, BLOCK,
            )  # fmt: skip
        return
    slot = tl.load(table_ptr + entry * 6).to(tl.int64)
    first_row = tl.load(table_ptr + entry * 6 + 3)
    width = tl.load(table_ptr + entry * 6 + 4)
    known, computed = tl.load(num_tokens_ptr + slot), tl.load(num_computed_ptr + slot)
    number = tl.load(num_drafts_ptr + slot)
    # the first pass
    catch_up = tl.load(table_ptr + entry * 6 + 1).to(tl.int64)
    behind = known - computed
    begins = (tl.load(table_ptr + entry * 6 + 2) != 0) & (tl.load(finished_ptr + slot) == 0)
    begins = begins & (number == 0) & (behind <= catch_up + 2)
    # and a later one
    goes_on = (tl.load(from_model_ptr + slot) != 0) & (number == depth)
    goes_on = goes_on & (known + depth < tl.load(limit_ptr + slot))
    makes = tl.where(depth == 0, begins, goes_on)
    valid = tl.where(begins, behind, tl.minimum(catch_up, behind - 1))
    valid = tl.where(depth == 0, valid, goes_on.to(tl.int64))

    i = chunk * BLOCK + tl.arange(0, BLOCK)
    inside, there = i < width, (i < valid) & (i < width)
    position = tl.where(there, computed + i, 0)
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=inside, other=0)
    block = tl.load(blocks_ptr + slot * blocks_stride + position // BLOCK_SIZE, mask=there, other=0)
    mapping = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    row = first_row + i
    tl.store(ids_ptr + row, token.to(tl.int64), mask=inside)
    tl.store(positions_ptr + row, tl.where(there, position, -1), mask=inside)
    tl.store(mapping_ptr + row, tl.where(there, mapping, -1), mask=inside)
    if chunk == 0:
        tl.store(starts_ptr + entry + 1, first_row + width)
        tl.store(seq_lens_ptr + entry, (computed + valid).to(tl.int32))
        tl.store(slots_ptr + entry, slot.to(tl.int32))
        tl.store(valid_ptr + entry, valid)
        tl.store(makes_ptr + entry, makes.to(tl.int64))
        place = tl.load(table_ptr + entry * 6 + 5)
        if place >= 0:
            tl.store(logits_rows_ptr + place, first_row + tl.maximum(valid - 1, 0))
            tl.store(draw_positions_ptr + place, tl.where(makes, computed + valid, -1))


@one_form()
def rows_kernel(
    table_ptr,  # [entries, 6] int32
    tokens_ptr,  # [slots, tokens_stride] int32
    blocks_ptr,  # [slots, blocks_stride] int32, the draft model's
    num_tokens_ptr,  # [slots] int64, and so are the next three
    num_computed_ptr,  # the draft model's
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,  # [slots] uint8
    from_model_ptr,  # [slots] uint8
    ids_ptr,  # [padded_rows] int64
    positions_ptr,
    mapping_ptr,
    starts_ptr,  # [padded_reqs + 1] int32
    seq_lens_ptr,  # [padded_reqs] int32
    slots_ptr,  # [padded_reqs] int32
    valid_ptr,  # [entries] int64
    makes_ptr,  # [entries] int64, 1: this slot makes a draft in this pass
    logits_rows_ptr,  # [logits] int64
    draw_positions_ptr,  # [logits] int64
    tokens_stride,
    blocks_stride,
    entries,
    padded_reqs,
    num_rows,
    padded_rows,
    depth,  # passes of this step before this one
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pass_rows(
        tl.program_id(0), tl.program_id(1),
        table_ptr, tokens_ptr, blocks_ptr, num_tokens_ptr, num_computed_ptr, num_drafts_ptr, limit_ptr,
        finished_ptr, from_model_ptr, ids_ptr, positions_ptr, mapping_ptr, starts_ptr, seq_lens_ptr,
        slots_ptr, valid_ptr, makes_ptr, logits_rows_ptr, draw_positions_ptr, tokens_stride, blocks_stride,
        entries, padded_reqs, num_rows, padded_rows, depth, BLOCK_SIZE, BLOCK,
    )  # fmt: skip


@one_form()
def take_kernel(
    table_ptr,  # [entries, 6] int32
    valid_ptr,  # [entries] int64
    makes_ptr,  # [entries] int64
    drawn_ptr,  # [logits] int64
    tokens_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    num_drafts_ptr,
    from_model_ptr,
    tokens_stride,
    depth,
    DRAWS: tl.constexpr,
):
    entry = tl.program_id(0)
    slot = tl.load(table_ptr + entry * 6).to(tl.int64)
    computed = tl.load(num_computed_ptr + slot)
    tl.store(num_computed_ptr + slot, computed + tl.load(valid_ptr + entry))
    if DRAWS:
        place = tl.load(table_ptr + entry * 6 + 5)
        if place >= 0:
            token = tl.load(drawn_ptr + place)
            made = (tl.load(makes_ptr + entry) != 0) & (token >= 0)
            if made:
                end = tokens_ptr + slot * tokens_stride + tl.load(num_tokens_ptr + slot) + depth
                tl.store(end, token.to(tl.int32))
                tl.store(num_drafts_ptr + slot, tl.load(num_drafts_ptr + slot) + 1)
            if depth == 0:
                tl.store(from_model_ptr + slot, made.to(tl.uint8))


@dataclass(frozen=True, slots=True)
class DraftSlots:
    """The slot tables a draft model reads and writes: the target's, and its own."""

    tokens: torch.Tensor  # [slots, width] int32
    num_tokens: torch.Tensor  # [slots] int64
    num_drafts: torch.Tensor  # [slots] int64
    limit: torch.Tensor  # [slots] int64
    finished: torch.Tensor  # [slots] bool
    block_table: torch.Tensor  # [slots, blocks] int32, its own
    num_computed: torch.Tensor  # [slots] int64, its own
    from_model: torch.Tensor  # [slots] bool, its own
    block_size: int


@dataclass(frozen=True, slots=True)
class PassRows:
    """Where `rows` writes. The first six may be longer than the pass: graphs read them where they are."""

    input_ids: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64
    slot_mapping: torch.Tensor  # [rows] int64
    query_start_loc: torch.Tensor  # [requests + 1] int32
    seq_lens: torch.Tensor  # [requests] int32
    slots: torch.Tensor  # [requests] int32
    valid: torch.Tensor  # [entries] int64, rows that are not padding
    makes: torch.Tensor  # [entries] int64, 1 where a draft is made
    logits_rows: torch.Tensor  # [logits] int64
    draw_positions: torch.Tensor  # [logits] int64, -1: no draft is made after all


def settle(tables: DraftSlots, slots: torch.Tensor) -> None:
    """Forget the KV of refused drafts; slots [n] int32, no slot twice."""
    if len(slots):
        settle_kernel[(-(-len(slots) // BLOCK),)](
            slots, tables.num_tokens, tables.num_computed, tables.from_model.view(torch.uint8), len(slots),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def rows(
    tables: DraftSlots,
    table: torch.Tensor,  # [entries, 6] int32
    out: PassRows,
    depth: int,
    num_rows: int,
    longest: int,  # most rows of one slot
    padded_rows: int,  # rows and requests to fill up to
    padded_reqs: int,
) -> None:
    """The token rows of a pass and the places of its rows of logits."""
    entries = len(table)
    if table.shape != (entries, PASS_COLUMNS) or table.dtype != torch.int32 or not table.is_contiguous():
        raise ValueError(f"a pass table is int32 [n, {PASS_COLUMNS}], not {table.dtype} {tuple(table.shape)}")
    if max(padded_rows, num_rows) > len(out.input_ids) or not entries <= padded_reqs <= len(out.seq_lens):
        raise ValueError(f"{padded_rows} rows of {padded_reqs} requests do not fit the buffers")
    rows_kernel[(padded_reqs + 1, -(-longest // BLOCK))](
        table, tables.tokens, tables.block_table, tables.num_tokens, tables.num_computed, tables.num_drafts,
        tables.limit, tables.finished.view(torch.uint8), tables.from_model.view(torch.uint8), out.input_ids,
        out.positions, out.slot_mapping, out.query_start_loc, out.seq_lens, out.slots, out.valid, out.makes,
        out.logits_rows, out.draw_positions, tables.tokens.stride(0), tables.block_table.stride(0), entries,
        padded_reqs, num_rows, padded_rows, depth, BLOCK_SIZE=tables.block_size, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def take(
    tables: DraftSlots,
    table: torch.Tensor,  # [entries, 6] int32
    out: PassRows,
    drawn: torch.Tensor | None,  # [logits] int64; None: the pass only caught up
    depth: int,
) -> None:
    """A pass was computed: count its rows and write its drafts behind the known tokens."""
    take_kernel[(len(table),)](
        table, out.valid, out.makes, out.valid if drawn is None else drawn, tables.tokens, tables.num_tokens,
        tables.num_computed, tables.num_drafts, tables.from_model.view(torch.uint8), tables.tokens.stride(0),
        depth, DRAWS=drawn is not None, num_warps=1,
    )  # fmt: skip
