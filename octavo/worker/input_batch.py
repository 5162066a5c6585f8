"""The device's own memory of the running requests, and one step of it in tensors.

`DeviceState` keeps a row for every slot: tokens, counters, limits, block table. From it and the
rows of a step, `prepare` computes ids, positions and slot mappings, and `finish` turns the drawn
tokens into accepted ones and moves the counters. So the host can launch a step before it knows
what the last one brought: it says only which slots get how many rows.

Drafts lie in the token table right behind the confirmed tokens:

    tokens[slot]   t0 t1 ... tn-1 | d0 d1 .. dk-1 | whatever was there
                   num_tokens = n   num_drafts = k

so a row's input is always tokens[slot, position], and the draft that row checks is the token that
follows it. Nothing here waits for the host: no shape depends on data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.backend import AttentionMetadata
from octavo.core.messages import Finish, NewSlot, RowKind, SchedulerOutput

MAX_DRAFTS = 16
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step as the host knows them: who gets how many, and which are sampled.

    R requests have T token rows; S of them are sampled, on L rows of logits. A sampled request
    with n rows of a verify has n rows of logits; a chunk has one, its last.
    """

    slots: IntArray  # [R]
    num_rows: IntArray  # [R]
    is_verify: npt.NDArray[np.bool_]  # [R]
    query_start_loc: IntArray  # [R + 1]
    row_request: IntArray  # [T] index into slots
    row_offset: IntArray  # [T] index within the request's rows
    sampled: IntArray  # [S] index into slots
    logits_rows: IntArray  # [L] token row each row of logits is computed from
    logits_request: IntArray  # [L] index into sampled
    logits_column: IntArray  # [L] index within the request's rows of logits

    @property
    def num_columns(self) -> int:
        """The most rows of logits any request has: 1 + its drafts."""
        return int(self.logits_column.max()) + 1 if len(self.logits_column) else 0

    @classmethod
    def of(cls, out: SchedulerOutput) -> StepRows:
        """Read the rows of `out`; every array is computed once, without a loop over rows."""
        table = np.array(out.rows, dtype=np.int64)  # [R, 4]: slot, num_rows, kind, samples
        slots, num_rows = table[:, 0], table[:, 1]
        is_verify = table[:, 2] == RowKind.VERIFY
        starts = np.zeros(len(slots) + 1, dtype=np.int64)
        np.cumsum(num_rows, out=starts[1:])
        row_request = np.repeat(np.arange(len(slots)), num_rows)
        row_offset = np.arange(starts[-1]) - starts[row_request]
        sampled = np.flatnonzero(table[:, 3])
        columns = np.where(is_verify[sampled], num_rows[sampled], 1)
        logits_request = np.repeat(np.arange(len(sampled)), columns)
        logits_column = np.arange(len(logits_request)) - np.repeat(np.cumsum(columns) - columns, columns)
        ends = starts[1:][sampled]
        logits_rows = (ends - columns)[logits_request] + logits_column
        return cls(
            slots, num_rows, is_verify, starts, row_request, row_offset, sampled,
            logits_rows, logits_request, logits_column,
        )  # fmt: skip


@dataclass(slots=True)
class StepInputs:
    """What the forward pass of a step reads."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, -1 for padding
    metadata: AttentionMetadata
    num_valid: torch.Tensor  # [R] int64, rows that are not padding


@dataclass(slots=True)
class StepResult:
    """What a step brought, still on the device. S sampled requests, at most W tokens each."""

    tokens: torch.Tensor  # [S, W] int64, the first num_emitted of each row count
    num_emitted: torch.Tensor  # [S] int64
    num_drafts: torch.Tensor  # [S] int64, drafts really verified
    num_accepted: torch.Tensor  # [S] int64
    finished: torch.Tensor  # [S] int64, Finish


class DeviceState:
    """One row of every table for each slot. Free slots hold stale values that nothing reads."""

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        width = max_model_len + MAX_DRAFTS + 1
        self.tokens = torch.zeros(num_slots, width, dtype=torch.int32, device=device)
        self.num_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.num_computed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.num_drafts = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.limit = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.finished = torch.ones(num_slots, dtype=torch.bool, device=device)
        self.stop_ids = torch.full((num_slots, 8), -1, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(num_slots, -(-width // block_size), dtype=torch.int32, device=device)
        self.num_blocks = [0] * num_slots  # the host's: how far each block table is filled

    def put(self, new: NewSlot) -> None:
        """A request enters a slot."""
        slot, count = new.slot, len(new.token_ids)
        self.tokens[slot, :count] = torch.tensor(new.token_ids, dtype=torch.int32)
        self.num_tokens[slot] = count
        self.num_computed[slot] = new.num_computed_tokens
        self.num_drafts[slot] = 0
        self.limit[slot] = new.limit
        self.finished[slot] = False
        stop = new.stop_token_ids
        if len(stop) > self.stop_ids.shape[1]:
            wider = self.stop_ids.new_full((len(self.stop_ids), len(stop)), -1)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[slot] = -1
        if stop:
            self.stop_ids[slot, : len(stop)] = torch.tensor(stop, dtype=torch.int64)
        self.num_blocks[slot] = 0
        self.append_blocks(slot, new.block_ids)

    def append_blocks(self, slot: int, block_ids: list[int]) -> None:
        """The block table of a slot grows."""
        start = self.num_blocks[slot]
        end = start + len(block_ids)
        if end > start:
            self.block_table[slot, start:end] = torch.tensor(block_ids, dtype=torch.int32)
        self.num_blocks[slot] = end

    def remove(self, slot: int) -> None:
        """The request of a slot has left."""
        self.finished[slot] = True

    def prepare(self, rows: StepRows) -> StepInputs:
        """Inputs of the forward pass, from the device's own counters."""
        to = self._to_device
        slots, offset, request = to(rows.slots), to(rows.row_offset), to(rows.row_request)
        start = self.num_computed[slots]
        num_rows = to(rows.num_rows)
        # A verify's rows: the last token and the drafts there are, as far as the limit lets any
        # of them be emitted. Chunks are known tokens: all rows count.
        room = self.limit[slots] - self.num_tokens[slots] - 1
        drafts = torch.minimum(self.num_drafts[slots], room).clamp_(min=0)
        verify_rows = torch.minimum(1 + drafts, num_rows)
        num_valid = torch.where(to(rows.is_verify), verify_rows, num_rows)
        num_valid = num_valid.masked_fill(self.finished[slots], 0)

        valid = offset < num_valid[request]
        row_slot = slots[request]
        position = (start[request] + offset).masked_fill_(~valid, 0)
        block = self.block_table[row_slot, position // self.block_size].to(torch.int64)
        mapping = block * self.block_size + position % self.block_size
        max_blocks = max(self.num_blocks[slot] for slot in rows.slots.tolist())
        metadata = AttentionMetadata(
            query_start_loc=to(rows.query_start_loc).to(torch.int32),
            seq_lens=(start + num_valid).to(torch.int32),
            block_table=self.block_table[slots, :max_blocks],
            slot_mapping=mapping.masked_fill_(~valid, -1),
            positions=position.masked_fill(~valid, -1),
            num_reqs=len(rows.slots),
            num_tokens=len(rows.row_offset),
            max_query_len=int(rows.num_rows.max()),
            max_seq_len=max_blocks * self.block_size,
        )
        input_ids = self.tokens[row_slot, position].to(torch.int64)
        return StepInputs(input_ids, metadata.positions, metadata, num_valid)

    def finish(self, rows: StepRows, inputs: StepInputs, drawn: torch.Tensor) -> StepResult:
        """Verify drafts, cut at stop tokens and limits, and move the counters.

        drawn: [L] int64, what the target drew at each row of logits. A draft is accepted if and
        only if it is the token drawn at its position and all drafts before it were accepted; the
        token drawn behind the last accepted one comes for free.
        """
        to = self._to_device
        width = rows.num_columns
        slots, sampled = to(rows.slots), to(rows.sampled)
        is_verify = to(rows.is_verify)
        slot = slots[sampled]
        num_valid = inputs.num_valid[sampled]
        num_tokens = self.num_tokens[slot]
        alive = num_valid > 0
        num_drafts = torch.where(is_verify[sampled], num_valid - 1, 0).clamp_(min=0)
        column = torch.arange(width, device=self.device)
        if width == 1:
            tokens = drawn[:, None]
            accepted = torch.zeros_like(num_tokens)
        else:
            tokens = drawn.new_full((len(rows.sampled), width), -1)
            tokens[to(rows.logits_request), to(rows.logits_column)] = drawn
            drafts = self.tokens[slot[:, None], num_tokens[:, None] + column[:-1]]
            match = (tokens[:, :-1] == drafts) & (column[:-1] < num_drafts[:, None])
            accepted = match.cumprod(1).sum(1)

        # The padding of stop_ids is -1, and so is the token of a row that had no legal one: such a
        # request stops here as well, and the runner reports the error.
        is_stop = (tokens[:, :, None] == self.stop_ids[slot][:, None, :]).any(2)
        before_stop = torch.where(is_stop, column, width).amin(1)
        room = self.limit[slot] - num_tokens
        emitted = torch.minimum(torch.minimum(accepted, before_stop) + 1, room) * alive
        finished = torch.where(emitted == room, int(Finish.LENGTH), int(Finish.NO))
        finished = torch.where(before_stop < emitted, int(Finish.STOP), finished) * alive

        target = num_tokens[:, None] + column
        kept = torch.where(
            column < emitted[:, None], tokens.to(torch.int32), self.tokens[slot[:, None], target]
        )
        self.tokens[slot[:, None], target] = kept
        self.num_tokens[slot] = num_tokens + emitted
        self.finished[slot] |= finished != Finish.NO
        # Chunks move by the rows they computed, verifies by what they emitted.
        advance = inputs.num_valid.masked_fill(is_verify, 0)
        advance[sampled] += emitted * is_verify[sampled]
        self.num_computed[slots] += advance
        self.num_drafts[slots] = 0
        return StepResult(tokens, emitted, num_drafts, torch.minimum(accepted, emitted), finished)

    def _to_device(self, array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
