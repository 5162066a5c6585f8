"""The bookkeeping around a draft pass that is one graph, as whole_step.py's is of a step.

The passes of a step share one plan, which the host sends once: how many slots and token rows each pass
has, and the tables of the first pass and of all later ones. How many passes are done stands in the plan's
first place, and the last kernel of a pass counts it up. So the same graph, launched again, computes the
next pass. Every token row of a pass gets logits and a draw; a slot takes that of its last row.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from octavo.kernels.triton.draft import PASS_COLUMNS, DraftSlots, PassRows, pass_rows
from octavo.kernels.triton.launch import begin, one_form, pdl_options, uses_pdl
from octavo.kernels.triton.step import SlotDraws

HEADER = 64  # passes done, then slots and token rows of each pass; the tables follow
DRAWS = 63  # of the header: 1 if the graphs themselves draw and take
MOST_ROWS = 16  # of a slot in a pass
BLOCK = 64
_HEADER, _MOST_ROWS, _DRAWS = tl.constexpr(HEADER), tl.constexpr(MOST_ROWS), tl.constexpr(DRAWS)


@one_form()
def rows_kernel(
    plan_ptr,  # [HEADER + 2 * table_size] int32
    tokens_ptr,
    blocks_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,
    from_model_ptr,
    slot_temperature_ptr,  # [slots] float32
    slot_seed_ptr,  # [slots] int64
    ids_ptr,
    positions_ptr,
    mapping_ptr,
    starts_ptr,
    seq_lens_ptr,
    slots_ptr,
    valid_ptr,
    makes_ptr,
    logits_rows_ptr,
    draw_positions_ptr,  # [slots]: not read
    row_positions_ptr,  # [padded_rows] int64, where each token row draws
    temperature_ptr,  # [padded_rows] float32
    seed_ptr,  # [padded_rows] int64
    tokens_stride,
    blocks_stride,
    table_size,
    padded_reqs,
    padded_rows,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0)
    depth = tl.load(plan_ptr)
    entries, num_rows = tl.load(plan_ptr + 1 + 2 * depth), tl.load(plan_ptr + 2 + 2 * depth)
    table_ptr = plan_ptr + _HEADER + tl.where(depth == 0, 0, table_size)
    pass_rows(
        entry, 0, table_ptr, tokens_ptr, blocks_ptr, num_tokens_ptr, num_computed_ptr, num_drafts_ptr,
        limit_ptr, finished_ptr, from_model_ptr, ids_ptr, positions_ptr, mapping_ptr, starts_ptr,
        seq_lens_ptr, slots_ptr, valid_ptr, makes_ptr, logits_rows_ptr, draw_positions_ptr, tokens_stride,
        blocks_stride, entries, padded_reqs, num_rows, padded_rows, depth, BLOCK_SIZE, BLOCK,
    )  # fmt: skip
    if entry < entries:
        slot = tl.load(table_ptr + entry * 6).to(tl.int64)
        j = tl.arange(0, _MOST_ROWS)
        row, inside = tl.load(table_ptr + entry * 6 + 3) + j, j < tl.load(table_ptr + entry * 6 + 4)
        nothing = tl.zeros((_MOST_ROWS,), dtype=tl.int64)
        tl.store(temperature_ptr + row, nothing + tl.load(slot_temperature_ptr + slot), mask=inside)
        tl.store(seed_ptr + row, nothing + tl.load(slot_seed_ptr + slot), mask=inside)
        tl.store(row_positions_ptr + row, tl.load(num_computed_ptr + slot) + j + 1, mask=inside)


@one_form()
def take_kernel(
    plan_ptr,
    arrived_ptr,  # [1] int32, zero
    valid_ptr,
    makes_ptr,
    drawn_ptr,  # [padded_rows] int64
    tokens_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    num_drafts_ptr,
    from_model_ptr,
    tokens_stride,
    table_size,
    num_programs,
    PDL: tl.constexpr,
):
    begin(PDL)
    if tl.load(plan_ptr + _DRAWS) == 0:
        return
    entry = tl.program_id(0)
    depth = tl.load(plan_ptr)
    table_ptr = plan_ptr + _HEADER + tl.where(depth == 0, 0, table_size)
    if entry < tl.load(plan_ptr + 1 + 2 * depth):
        slot = tl.load(table_ptr + entry * 6).to(tl.int64)
        valid = tl.load(valid_ptr + entry)
        tl.store(num_computed_ptr + slot, tl.load(num_computed_ptr + slot) + valid)
        if tl.load(table_ptr + entry * 6 + 5) >= 0:
            token = tl.load(drawn_ptr + tl.load(table_ptr + entry * 6 + 3) + tl.maximum(valid - 1, 0))
            made = (tl.load(makes_ptr + entry) != 0) & (token >= 0)
            if made:
                end = tokens_ptr + slot * tokens_stride + tl.load(num_tokens_ptr + slot) + depth
                tl.store(end, token.to(tl.int32))
                tl.store(num_drafts_ptr + slot, tl.load(num_drafts_ptr + slot) + 1)
            if depth == 0:
                tl.store(from_model_ptr + slot, made.to(tl.uint8))
    tl.debug_barrier()  # the plan was read
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_programs - 1:
        tl.store(arrived_ptr, 0)
        tl.store(plan_ptr, depth + 1)


@dataclass(frozen=True, slots=True)
class WholePassMemory:
    """What the launches of a pass's graph find at fixed places."""

    plan: torch.Tensor  # [HEADER + 2 * PASS_COLUMNS * slots] int32
    arrived: torch.Tensor  # [1] int32
    valid: torch.Tensor  # [slots] int64
    makes: torch.Tensor  # [slots] int64
    places: torch.Tensor  # [2, slots] int64
    positions: torch.Tensor  # [rows] int64
    temperature: torch.Tensor  # [rows] float32
    seed: torch.Tensor  # [rows] int64
    drawn: torch.Tensor  # [rows] int64
    counters: torch.Tensor  # [rows] int32, of the draw

    @classmethod
    def allocate(cls, rows: int, slots: int, device: torch.device) -> WholePassMemory:
        """Of passes of at most so many rows. The plan is empty."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(HEADER + 2 * PASS_COLUMNS * slots, dtype=torch.int32), zeros(1, dtype=torch.int32),
            zeros(slots), zeros(slots), zeros(2, slots), zeros(rows), zeros(rows, dtype=torch.float32),
            zeros(rows), zeros(rows), zeros(rows, dtype=torch.int32),
        )  # fmt: skip


def rows(
    memory: WholePassMemory,
    tables: DraftSlots,
    draws: SlotDraws,
    out: PassRows,
    padded_rows: int,
    padded_reqs: int,
) -> None:
    """As `draft.rows`, of the next pass of the plan."""
    if padded_rows > len(memory.drawn) or padded_reqs > len(memory.valid):
        raise ValueError(f"{padded_rows} rows of {padded_reqs} slots do not fit the memory of a pass")
    rows_kernel[(padded_reqs + 1,)](
        memory.plan, tables.tokens, tables.block_table, tables.num_tokens, tables.num_computed,
        tables.num_drafts, tables.limit, tables.finished.view(torch.uint8),
        tables.from_model.view(torch.uint8), draws.temperature, draws.seed, out.input_ids, out.positions,
        out.slot_mapping, out.query_start_loc, out.seq_lens, out.slots, memory.valid, memory.makes,
        memory.places[0], memory.places[1], memory.positions, memory.temperature, memory.seed,
        tables.tokens.stride(0), tables.block_table.stride(0), PASS_COLUMNS * len(memory.valid), padded_reqs,
        padded_rows, BLOCK_SIZE=tables.block_size, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip


def take(memory: WholePassMemory, tables: DraftSlots, padded_reqs: int) -> None:
    """As `draft.take`, and the plan goes on to the next pass."""
    pdl = uses_pdl(memory.drawn)
    take_kernel[(padded_reqs,)](
        memory.plan, memory.arrived, memory.valid, memory.makes, memory.drawn, tables.tokens,
        tables.num_tokens, tables.num_computed, tables.num_drafts, tables.from_model.view(torch.uint8),
        tables.tokens.stride(0), PASS_COLUMNS * len(memory.valid), padded_reqs, PDL=pdl, num_warps=1,
        **pdl_options(pdl),
    )  # fmt: skip
