"""A step's bookkeeping on the device: slot changes, inputs, and the verdict on what was drawn.

What these compute is defined by octavo/worker/step_math.py's `TorchStep`, to the bit. The host sends
one small table a kernel, which says which slots get how many rows; everything else is read from the
slot tables, so the host need not know what the step before brought. One program serves one request.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.launch import next_power_of_2, one_form

# Columns of a row table, int32: slot, rows, 1 for a verify, first token row, first row of logits,
# place among the sampled requests or -1.
ROW_COLUMNS = 6
# Columns of a table of changes, int32: what, slot, first index, count, where the values begin.
CHANGE_COLUMNS = 5
SET_TOKENS, SET_BLOCKS, ENTER, LEAVE = range(4)
# Values of ENTER, before the stop ids: tokens, computed tokens, limit, the bits of the temperature, the low
# and the high half of the seed.
ENTER_VALUES = 6
BLOCK = 256  # token rows of a program


@one_form()
def change_kernel(
    changes_ptr,  # [changes, 5] int32
    values_ptr,  # int32
    tokens_ptr,  # [slots, tokens_stride] int32
    blocks_ptr,  # [slots, blocks_stride] int32
    stop_ids_ptr,  # [slots, num_stop] int64
    num_tokens_ptr,  # [slots] int64, and so are the next three
    num_computed_ptr,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,  # [slots] uint8
    temperature_ptr,  # [slots] float32
    seed_ptr,  # [slots] int64
    tokens_stride,
    blocks_stride,
    num_stop,
    BLOCK: tl.constexpr,
):
    change, chunk = tl.program_id(0), tl.program_id(1)
    what = tl.load(changes_ptr + change * 5)
    slot = tl.load(changes_ptr + change * 5 + 1).to(tl.int64)
    first = tl.load(changes_ptr + change * 5 + 2)
    count = tl.load(changes_ptr + change * 5 + 3)
    source = values_ptr + tl.load(changes_ptr + change * 5 + 4)
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    if what <= 1:
        value = tl.load(source + i, mask=i < count)
        if what == 0:
            tl.store(tokens_ptr + slot * tokens_stride + first + i, value, mask=i < count)
        else:
            tl.store(blocks_ptr + slot * blocks_stride + first + i, value, mask=i < count)
    elif chunk == 0:
        if what == 2:
            tl.store(num_tokens_ptr + slot, tl.load(source).to(tl.int64))
            tl.store(num_computed_ptr + slot, tl.load(source + 1).to(tl.int64))
            tl.store(limit_ptr + slot, tl.load(source + 2).to(tl.int64))
            tl.store(num_drafts_ptr + slot, 0)
            tl.store(finished_ptr + slot, 0)
            tl.store(temperature_ptr + slot, tl.load(source + 3).to(tl.float32, bitcast=True))
            low = tl.load(source + 4).to(tl.uint32, bitcast=True).to(tl.int64)
            tl.store(seed_ptr + slot, low | (tl.load(source + 5).to(tl.int64) << 32))
            for start in range(0, num_stop, BLOCK):
                j = start + tl.arange(0, BLOCK)
                stop = tl.load(source + 6 + j, mask=j < count, other=-1).to(tl.int64)
                tl.store(stop_ids_ptr + slot * num_stop + j, stop, mask=j < num_stop)
        else:
            tl.store(finished_ptr + slot, 1)


@triton.jit
def fill_up(
    request,
    ids_ptr,  # [padded_rows] int64, and so are the next two
    positions_ptr,
    mapping_ptr,
    starts_ptr,  # [padded_reqs + 1] int32
    seq_lens_ptr,  # [padded_reqs] int32
    slots_ptr,  # [padded_reqs] int32
    padded_reqs,
    num_rows,
    padded_rows,
    BLOCK: tl.constexpr,
):
    """What only fills up the size of a graph: a request without rows, or behind the last one the rows."""
    if request == padded_reqs:
        nothing = tl.zeros((BLOCK,), dtype=tl.int64)
        for start in range(num_rows, padded_rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            tl.store(ids_ptr + row, nothing, mask=row < padded_rows)
            tl.store(positions_ptr + row, nothing - 1, mask=row < padded_rows)
            tl.store(mapping_ptr + row, nothing - 1, mask=row < padded_rows)
        tl.store(starts_ptr, 0)
    else:
        tl.store(starts_ptr + request + 1, num_rows)
        tl.store(seq_lens_ptr + request, 0)
        tl.store(slots_ptr + request, 0)


@triton.jit
def prepare_request(
    request,
    chunk,
    rows_ptr,  # [num_reqs, 6] int32
    tokens_ptr,  # the slot tables, as above
    blocks_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,
    ids_ptr,  # [padded_rows] int64
    positions_ptr,  # [padded_rows] int64
    mapping_ptr,  # [padded_rows] int64
    starts_ptr,  # [padded_reqs + 1] int32
    seq_lens_ptr,  # [padded_reqs] int32
    slots_ptr,  # [padded_reqs] int32
    num_valid_ptr,  # [num_reqs] int64
    logits_rows_ptr,  # [num_logits] int64
    draw_positions_ptr,  # [num_logits] int64
    tokens_stride,
    blocks_stride,
    num_reqs,
    padded_reqs,
    num_rows,
    padded_rows,
    BLOCK_SIZE: tl.constexpr,
    LOGITS: tl.constexpr,  # most rows of logits of a request, padded
    BLOCK: tl.constexpr,
):
    """One program of `prepare`: a request, or what fills up behind the last one."""
    if request >= num_reqs:
        if chunk == 0:
            fill_up(
                request, ids_ptr, positions_ptr, mapping_ptr, starts_ptr, seq_lens_ptr, slots_ptr,
                padded_reqs, num_rows, padded_rows, BLOCK,
            )  # fmt: skip
        return
    slot = tl.load(rows_ptr + request * 6).to(tl.int64)
    count = tl.load(rows_ptr + request * 6 + 1)
    is_verify = tl.load(rows_ptr + request * 6 + 2) != 0
    first_row = tl.load(rows_ptr + request * 6 + 3)
    start = tl.load(num_computed_ptr + slot)
    num_valid = count.to(tl.int64)
    if is_verify:
        # the last token and the drafts there are, as far as the limit lets any be emitted
        room = tl.load(limit_ptr + slot) - tl.load(num_tokens_ptr + slot) - 1
        drafts = tl.maximum(tl.minimum(tl.load(num_drafts_ptr + slot), room), 0)
        num_valid = tl.minimum(1 + drafts, num_valid)
    if tl.load(finished_ptr + slot) != 0:
        num_valid = tl.zeros_like(num_valid)

    i = chunk * BLOCK + tl.arange(0, BLOCK)
    inside, valid = i < count, i < num_valid
    position = tl.where(valid, start + i, 0)
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=inside, other=0)
    block = tl.load(blocks_ptr + slot * blocks_stride + position // BLOCK_SIZE, mask=valid, other=0)
    mapping = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    row = first_row + i
    tl.store(ids_ptr + row, token.to(tl.int64), mask=inside)
    tl.store(positions_ptr + row, tl.where(valid, position, -1), mask=inside)
    tl.store(mapping_ptr + row, tl.where(valid, mapping, -1), mask=inside)

    if chunk == 0:
        tl.store(starts_ptr + request + 1, first_row + count)
        tl.store(seq_lens_ptr + request, (start + num_valid).to(tl.int32))
        tl.store(slots_ptr + request, slot.to(tl.int32))
        tl.store(num_valid_ptr + request, num_valid)
        if tl.load(rows_ptr + request * 6 + 5) >= 0:
            columns = tl.where(is_verify, count, 1)
            j = tl.arange(0, LOGITS)
            offset = count - columns + j
            where = tl.load(rows_ptr + request * 6 + 4) + j
            tl.store(logits_rows_ptr + where, (first_row + offset).to(tl.int64), mask=j < columns)
            draws = tl.where(offset < num_valid, start + offset + 1, -1)
            tl.store(draw_positions_ptr + where, draws, mask=j < columns)


@one_form()
def prepare_kernel(
    rows_ptr,  # [num_reqs, 6] int32
    tokens_ptr,  # the slot tables, as above
    blocks_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,
    ids_ptr,  # [padded_rows] int64
    positions_ptr,  # [padded_rows] int64
    mapping_ptr,  # [padded_rows] int64
    starts_ptr,  # [padded_reqs + 1] int32
    seq_lens_ptr,  # [padded_reqs] int32
    slots_ptr,  # [padded_reqs] int32
    num_valid_ptr,  # [num_reqs] int64
    logits_rows_ptr,  # [num_logits] int64
    draw_positions_ptr,  # [num_logits] int64
    tokens_stride,
    blocks_stride,
    num_reqs,
    padded_reqs,
    num_rows,
    padded_rows,
    BLOCK_SIZE: tl.constexpr,
    LOGITS: tl.constexpr,  # most rows of logits of a request, padded
    BLOCK: tl.constexpr,
):
    prepare_request(
        tl.program_id(0), tl.program_id(1),
        rows_ptr, tokens_ptr, blocks_ptr, num_tokens_ptr, num_computed_ptr, num_drafts_ptr, limit_ptr,
        finished_ptr, ids_ptr, positions_ptr, mapping_ptr, starts_ptr, seq_lens_ptr, slots_ptr,
        num_valid_ptr, logits_rows_ptr, draw_positions_ptr, tokens_stride, blocks_stride, num_reqs,
        padded_reqs, num_rows, padded_rows, BLOCK_SIZE, LOGITS, BLOCK,
    )  # fmt: skip


@triton.jit
def finish_request(
    request,
    rows_ptr,  # [num_reqs, 6] int32
    num_valid_ptr,  # [num_reqs] int64
    drawn_ptr,  # [num_logits] int64
    tokens_ptr,  # the slot tables, as above
    stop_ids_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,
    coins_ptr,  # [slots, coins_stride] float32, with SYNTHETIC
    rates_ptr,  # [COLUMNS] float32
    out_ptr,  # int64, the tokens of a sampled request, out_stride apart
    numbers_ptr,  # int64: emitted, drafts, accepted, Finish
    tokens_stride,
    num_stop,
    coins_stride,
    out_stride,
    number_stride,  # from one number to the next
    sampled_stride,  # from one sampled request to the next
    width,
    COLUMNS: tl.constexpr,  # width, padded
    STOPS: tl.constexpr,  # stop ids compared at a time
    SYNTHETIC: tl.constexpr,  # drafts are accepted by coins, see octavo/speculation/acceptance.py
):
    """One program of `finish`."""
    slot = tl.load(rows_ptr + request * 6).to(tl.int64)
    is_verify = tl.load(rows_ptr + request * 6 + 2) != 0
    sampled = tl.load(rows_ptr + request * 6 + 5)
    num_valid = tl.load(num_valid_ptr + request)
    advance = num_valid
    if sampled >= 0:
        columns = tl.where(is_verify, tl.load(rows_ptr + request * 6 + 1), 1)
        first = tl.load(rows_ptr + request * 6 + 4)
        known = tl.load(num_tokens_ptr + slot)
        room = tl.load(limit_ptr + slot) - known
        drafts = tl.where(is_verify, tl.maximum(num_valid - 1, 0), 0)
        j = tl.arange(0, COLUMNS)
        token = tl.load(drawn_ptr + first + j, mask=j < columns, other=-1)
        text = tokens_ptr + slot * tokens_stride + known
        draft = tl.load(text + j, mask=j < drafts, other=-1)
        if SYNTHETIC:
            coin = tl.load(coins_ptr + slot * coins_stride + known + j, mask=j < drafts, other=1.0)
            draft = tl.where(coin < tl.load(rates_ptr + j), token.to(tl.int32), -2)
        right = (token == draft.to(tl.int64)) & (j < drafts)
        accepted = tl.min(tl.where(right, COLUMNS, j), axis=0).to(tl.int64)

        # The padding of stop ids is -1, and so is the token of a row that had no legal one.
        is_stop = j < 0
        for start in range(0, num_stop, STOPS):
            s = start + tl.arange(0, STOPS)
            stop = tl.load(stop_ids_ptr + slot * num_stop + s, mask=s < num_stop, other=-2)
            is_stop = is_stop | (tl.max((token[:, None] == stop[None, :]).to(tl.int32), axis=1) > 0)
        before_stop = tl.min(tl.where(is_stop & (j < width), j, width), axis=0).to(tl.int64)
        emitted = tl.minimum(tl.minimum(accepted, before_stop) + 1, room)
        emitted = tl.where(num_valid > 0, emitted, 0)
        finish = tl.where(emitted == room, 2, 0)
        finish = tl.where(before_stop < emitted, 1, finish)
        finish = tl.where(num_valid > 0, finish, 0)

        tl.debug_barrier()  # drafts are read before tokens take their place
        tl.store(text + j, token.to(tl.int32), mask=j < emitted)
        tl.store(out_ptr + sampled.to(tl.int64) * out_stride + j, token, mask=j < width)
        numbers = numbers_ptr + sampled * sampled_stride
        tl.store(numbers, emitted)
        tl.store(numbers + number_stride, drafts)
        tl.store(numbers + 2 * number_stride, tl.minimum(accepted, emitted))
        tl.store(numbers + 3 * number_stride, finish.to(tl.int64))
        tl.store(num_tokens_ptr + slot, known + emitted)
        if finish != 0:
            tl.store(finished_ptr + slot, 1)
        advance = tl.where(is_verify, emitted, advance)
    tl.store(num_computed_ptr + slot, tl.load(num_computed_ptr + slot) + advance)
    tl.store(num_drafts_ptr + slot, 0)


@one_form()
def finish_kernel(
    rows_ptr,  # [num_reqs, 6] int32
    num_valid_ptr,  # [num_reqs] int64
    drawn_ptr,  # [num_logits] int64
    tokens_ptr,  # the slot tables, as above
    stop_ids_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,
    out_ptr,  # [num_sampled, width] int64
    numbers_ptr,  # [4, num_sampled] int64: emitted, drafts, accepted, Finish
    tokens_stride,
    num_stop,
    num_sampled,
    width,
    COLUMNS: tl.constexpr,  # width, padded
    STOPS: tl.constexpr,  # stop ids compared at a time
):
    finish_request(
        tl.program_id(0), rows_ptr, num_valid_ptr, drawn_ptr, tokens_ptr, stop_ids_ptr, num_tokens_ptr,
        num_computed_ptr, num_drafts_ptr, limit_ptr, finished_ptr, drawn_ptr, drawn_ptr, out_ptr, numbers_ptr,
        tokens_stride, num_stop, 0, width, num_sampled, 1, width, COLUMNS, STOPS, False,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SlotTables:
    """The device's memory of running requests; octavo/worker/input_batch.py says what each holds."""

    tokens: torch.Tensor  # [slots, width] int32
    block_table: torch.Tensor  # [slots, blocks] int32
    stop_ids: torch.Tensor  # [slots, num_stop] int64
    num_tokens: torch.Tensor  # [slots] int64, and so are the next three
    num_computed: torch.Tensor
    num_drafts: torch.Tensor
    limit: torch.Tensor
    finished: torch.Tensor  # [slots] bool
    block_size: int

    @property
    def counters(self) -> tuple[torch.Tensor, ...]:
        """What every request has one number of; `finished` as bytes."""
        return (
            self.num_tokens, self.num_computed, self.num_drafts, self.limit, self.finished.view(torch.uint8),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Where `prepare` writes. The first six may be longer than the step: graphs read them where they are."""

    input_ids: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64
    slot_mapping: torch.Tensor  # [rows] int64
    query_start_loc: torch.Tensor  # [requests + 1] int32
    seq_lens: torch.Tensor  # [requests] int32
    slots: torch.Tensor  # [requests] int32
    num_valid: torch.Tensor  # [num_reqs] int64
    logits_rows: torch.Tensor  # [num_logits] int64
    draw_positions: torch.Tensor  # [num_logits] int64


@dataclass(frozen=True, slots=True)
class SlotDraws:
    """How each slot draws, as far as a graph's own draw knows it: by temperature alone."""

    temperature: torch.Tensor  # [slots] float32, 0 is greedy
    seed: torch.Tensor  # [slots] int64

    @classmethod
    def allocate(cls, num_slots: int, device: torch.device) -> SlotDraws:
        """All greedy."""
        return cls(
            torch.zeros(num_slots, dtype=torch.float32, device=device),
            torch.zeros(num_slots, dtype=torch.int64, device=device),
        )


def change(
    tables: SlotTables, draws: SlotDraws, changes: torch.Tensor, values: torch.Tensor, longest: int
) -> None:
    """Carry out changes [n, 5] whose values lie in `values`; no two may write to the same place.

    longest: the greatest count among them.
    """
    if changes.dim() != 2 or changes.shape[1] != CHANGE_COLUMNS or changes.dtype != torch.int32:
        raise ValueError(f"changes are int32 [n, {CHANGE_COLUMNS}], not {tuple(changes.shape)}")
    if not len(changes):
        return
    block = 1024
    change_kernel[(len(changes), max(1, -(-longest // block)))](
        changes, values, tables.tokens, tables.block_table, tables.stop_ids, *tables.counters,
        draws.temperature, draws.seed, tables.tokens.stride(0), tables.block_table.stride(0),
        tables.stop_ids.shape[1], BLOCK=block,
        num_warps=4,
    )  # fmt: skip


def prepare(
    tables: SlotTables,
    rows: torch.Tensor,  # [num_reqs, 6] int32
    out: StepOutputs,
    num_rows: int,
    longest: int,  # most rows of one request
    padded_rows: int,  # rows and requests to fill up to
    padded_reqs: int,
    most_logits: int,  # most rows of logits of one request
) -> None:
    """Inputs of the forward and the places of the rows of logits."""
    num_reqs = len(rows)
    if rows.shape != (num_reqs, ROW_COLUMNS) or rows.dtype != torch.int32 or not rows.is_contiguous():
        raise ValueError(f"rows are int32 [n, {ROW_COLUMNS}], not {rows.dtype} {tuple(rows.shape)}")
    if max(padded_rows, num_rows) > len(out.input_ids) or not num_reqs <= padded_reqs <= len(out.seq_lens):
        raise ValueError(f"{padded_rows} rows of {padded_reqs} requests do not fit the buffers")
    prepare_kernel[(padded_reqs + 1, -(-longest // BLOCK))](
        rows, tables.tokens, tables.block_table, *tables.counters, out.input_ids, out.positions,
        out.slot_mapping, out.query_start_loc, out.seq_lens, out.slots, out.num_valid, out.logits_rows,
        out.draw_positions, tables.tokens.stride(0), tables.block_table.stride(0), num_reqs, padded_reqs,
        num_rows, padded_rows, BLOCK_SIZE=tables.block_size, LOGITS=max(16, next_power_of_2(most_logits)),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def finish(
    tables: SlotTables,
    rows: torch.Tensor,  # [num_reqs, 6] int32
    num_valid: torch.Tensor,  # [num_reqs] int64
    drawn: torch.Tensor,  # [num_logits] int64
    tokens: torch.Tensor,  # [num_sampled, width] int64, written
    numbers: torch.Tensor,  # [4, num_sampled] int64, written
) -> None:
    """Verify drafts, cut at stop tokens and limits, move the counters."""
    num_sampled, width = tokens.shape
    if numbers.shape != (4, num_sampled) or not (tokens.is_contiguous() and numbers.is_contiguous()):
        raise ValueError(f"numbers {tuple(numbers.shape)} do not go with tokens {tuple(tokens.shape)}")
    if tokens.dtype != torch.int64 or numbers.dtype != torch.int64 or drawn.dtype != torch.int64:
        raise ValueError("tokens, numbers and drawn are int64")
    finish_kernel[(len(rows),)](
        rows, num_valid, drawn, tables.tokens, tables.stop_ids, *tables.counters, tokens, numbers,
        tables.tokens.stride(0), tables.stop_ids.shape[1], num_sampled, width,
        COLUMNS=max(16, next_power_of_2(width)), STOPS=8, num_warps=1,
    )  # fmt: skip
