"""The bookkeeping around a step that is one graph: nothing comes as an argument of a launch.

A captured launch repeats its arguments, so what differs from step to step is read from memory. The host
writes a step into the next place of a ring in its own page-locked memory, which the device reads where
it is, and finds the answer in a second ring. Which place is next, the device counts itself: a step that
was captured once runs any number of times, one behind the other, without a copy in between.

    header of a step   requests, token rows, 1 if the graph itself draws and decides
    then its rows      as in octavo/kernels/triton/step.py

A step that does not draw by itself (filters, penalties, masks) ends with its logits; its draw and its
verdict are launched behind the graph.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from octavo.kernels.triton.launch import begin, one_form, pdl_options, uses_pdl
from octavo.kernels.triton.step import (
    ROW_COLUMNS,
    SlotDraws,
    SlotTables,
    StepOutputs,
    finish_request,
    prepare_request,
)

PLACES = 8  # of the rings: more than steps are ever under way
HEADER = 4  # numbers before the rows of a step
TOKENS = 16  # of an answer, before its numbers: emitted, drafts, accepted, Finish
ANSWER = TOKENS + 4
_PLACES, _HEADER = tl.constexpr(PLACES), tl.constexpr(HEADER)
_TOKENS, _ANSWER = tl.constexpr(TOKENS), tl.constexpr(ANSWER)
BLOCK = 64  # token rows of a program; a request of such a step has at most 16


@one_form()
def prepare_kernel(
    ring_ptr,  # [PLACES, ring_stride] int32, the host's
    turn_ptr,  # [1] int64: steps so far
    rows_ptr,  # [padded_reqs, 6] int32, on the device: this step's rows
    facts_ptr,  # [2] int32: whether the graph draws, and requests
    tokens_ptr,  # the slot tables, as in step.py
    blocks_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,
    slot_temperature_ptr,  # [slots] float32
    slot_seed_ptr,  # [slots] int64
    ids_ptr,
    positions_ptr,
    mapping_ptr,
    starts_ptr,
    seq_lens_ptr,
    slots_ptr,
    num_valid_ptr,
    logits_rows_ptr,
    draw_positions_ptr,
    temperature_ptr,  # [padded_rows] float32, of each row of logits
    seed_ptr,  # [padded_rows] int64
    tokens_stride,
    blocks_stride,
    ring_stride,
    padded_reqs,
    padded_rows,
    BLOCK_SIZE: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    step_ptr = ring_ptr + (tl.load(turn_ptr) % _PLACES) * ring_stride
    num_reqs, num_rows, draws = tl.load(step_ptr), tl.load(step_ptr + 1), tl.load(step_ptr + 2)
    # To read the host's memory takes as long as a small kernel: once, and all at a time.
    c = tl.arange(0, 8)
    mine = tl.load(step_ptr + _HEADER + request * 6 + c, mask=(c < 6) & (request < num_reqs), other=0)
    tl.store(rows_ptr + request * 6 + c, mine, mask=(c < 6) & (request < num_reqs))
    tl.debug_barrier()
    prepare_request(
        request, 0, rows_ptr, tokens_ptr, blocks_ptr, num_tokens_ptr, num_computed_ptr, num_drafts_ptr,
        limit_ptr, finished_ptr, ids_ptr, positions_ptr, mapping_ptr, starts_ptr, seq_lens_ptr, slots_ptr,
        num_valid_ptr, logits_rows_ptr, draw_positions_ptr, tokens_stride, blocks_stride, num_reqs,
        padded_reqs, num_rows, padded_rows, BLOCK_SIZE, LOGITS, BLOCK,
    )  # fmt: skip
    if request == padded_reqs:
        tl.store(facts_ptr, draws)
        tl.store(facts_ptr + 1, num_reqs)
    if request < num_reqs:  # noqa: SIM102  (Triton has no short-circuit)
        if tl.load(rows_ptr + request * 6 + 5) >= 0:
            slot = tl.load(rows_ptr + request * 6).to(tl.int64)
            columns = tl.where(
                tl.load(rows_ptr + request * 6 + 2) != 0, tl.load(rows_ptr + request * 6 + 1), 1
            )
            j = tl.arange(0, LOGITS)
            row = tl.load(rows_ptr + request * 6 + 4) + j
            nothing = tl.zeros((LOGITS,), dtype=tl.int64)
            tl.store(temperature_ptr + row, nothing + tl.load(slot_temperature_ptr + slot), mask=j < columns)
            tl.store(seed_ptr + row, nothing + tl.load(slot_seed_ptr + slot), mask=j < columns)


@one_form()
def finish_kernel(
    answers_ptr,  # [PLACES, answers_stride] int64, the host's
    turn_ptr,  # [1] int64
    arrived_ptr,  # [1] int32, zero
    rows_ptr,  # [padded_reqs, 6] int32, on the device
    facts_ptr,  # [2] int32
    num_valid_ptr,
    drawn_ptr,  # [padded_rows] int64
    tokens_ptr,
    stop_ids_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,
    coins_ptr,
    rates_ptr,
    tokens_stride,
    num_stop,
    coins_stride,
    answers_stride,
    num_programs,
    STOPS: tl.constexpr,
    SYNTHETIC: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    request = tl.program_id(0)
    turn = tl.load(turn_ptr)
    if (tl.load(facts_ptr) != 0) & (request < tl.load(facts_ptr + 1)):
        answer_ptr = answers_ptr + (turn % _PLACES) * answers_stride
        finish_request(
            request, rows_ptr, num_valid_ptr, drawn_ptr, tokens_ptr, stop_ids_ptr, num_tokens_ptr,
            num_computed_ptr, num_drafts_ptr, limit_ptr, finished_ptr, coins_ptr, rates_ptr, answer_ptr,
            answer_ptr + _TOKENS, tokens_stride, num_stop, coins_stride, _ANSWER, 1, _ANSWER, _TOKENS,
            _TOKENS, STOPS, SYNTHETIC,
        )  # fmt: skip
    tl.debug_barrier()  # the turn was read
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_programs - 1:
        tl.store(arrived_ptr, 0)
        tl.store(turn_ptr, turn + 1)


@dataclass(frozen=True, slots=True)
class WholeStepMemory:
    """What the launches of a step's graph find at fixed places."""

    ring: torch.Tensor  # [PLACES, HEADER + 6 * requests] int32, page-locked
    answers: torch.Tensor  # [PLACES, requests, ANSWER] int64, page-locked
    turn: torch.Tensor  # [1] int64
    arrived: torch.Tensor  # [1] int32
    facts: torch.Tensor  # [2] int32: whether the graph draws, and requests
    rows: torch.Tensor  # [requests, 6] int32
    num_valid: torch.Tensor  # [requests] int64
    logits_rows: torch.Tensor  # [rows] int64
    draw_positions: torch.Tensor  # [rows] int64
    temperature: torch.Tensor  # [rows] float32
    seed: torch.Tensor  # [rows] int64
    drawn: torch.Tensor  # [rows] int64

    @classmethod
    def allocate(cls, rows: int, requests: int, device: torch.device) -> WholeStepMemory:
        """Of steps of at most so many rows and requests. Everything is empty."""
        pinned = device.type == "cuda"

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        width = HEADER + ROW_COLUMNS * requests
        return cls(
            torch.zeros(PLACES, width, dtype=torch.int32, pin_memory=pinned),
            torch.zeros(PLACES, requests, ANSWER, dtype=torch.int64, pin_memory=pinned),
            zeros(1), zeros(1, dtype=torch.int32), zeros(2, dtype=torch.int32),
            zeros(requests, ROW_COLUMNS, dtype=torch.int32), zeros(requests), zeros(rows), zeros(rows),
            zeros(rows, dtype=torch.float32), zeros(rows), zeros(rows),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Coins:
    """Synthetic acceptance: a draft is accepted if its coin is below its place's rate."""

    table: torch.Tensor  # [slots, width] float32
    rates: torch.Tensor  # [TOKENS] float32


def prepare(
    memory: WholeStepMemory,
    tables: SlotTables,
    draws: SlotDraws,
    out: StepOutputs,
    padded_rows: int,
    padded_reqs: int,
) -> None:
    """As `step.prepare`, for the step at the ring's next place."""
    if padded_rows > len(memory.drawn) or padded_reqs > len(memory.rows):
        raise ValueError(f"{padded_rows} rows of {padded_reqs} requests do not fit the step's memory")
    prepare_kernel[(padded_reqs + 1,)](
        memory.ring, memory.turn, memory.rows, memory.facts, tables.tokens, tables.block_table,
        *tables.counters, draws.temperature, draws.seed, out.input_ids, out.positions, out.slot_mapping,
        out.query_start_loc, out.seq_lens, out.slots, memory.num_valid, memory.logits_rows,
        memory.draw_positions, memory.temperature, memory.seed, tables.tokens.stride(0),
        tables.block_table.stride(0), memory.ring.stride(0), padded_reqs, padded_rows,
        BLOCK_SIZE=tables.block_size, LOGITS=TOKENS, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip


def finish(memory: WholeStepMemory, tables: SlotTables, coins: Coins | None, padded_reqs: int) -> None:
    """As `step.finish`, of what was drawn, where the graph draws; and the turn goes to the next step."""
    pdl = uses_pdl(memory.drawn)
    finish_kernel[(padded_reqs,)](
        memory.answers, memory.turn, memory.arrived, memory.rows, memory.facts, memory.num_valid,
        memory.drawn, tables.tokens, tables.stop_ids, *tables.counters,
        memory.seed if coins is None else coins.table, memory.seed if coins is None else coins.rates,
        tables.tokens.stride(0), tables.stop_ids.shape[1], 0 if coins is None else coins.table.stride(0),
        memory.answers.stride(0), padded_reqs, STOPS=8, SYNTHETIC=coins is not None,
        PDL=pdl, num_warps=1, **pdl_options(pdl),
    )  # fmt: skip
