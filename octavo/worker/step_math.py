"""What a step computes around the forward pass: inputs before it, verification and counters after.

`StepMath` is the seam; `TorchStep` is the reference, for every device, and the oracle of the
compiled ones. No shape depends on what the device holds, and the result stays there as a `Verdict`:
on a GPU the host reads it when it is there, and may launch the next step before that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.backend import AttentionMetadata
from octavo.core.messages import Finish, RowKind, SchedulerOutput
from octavo.worker.input_batch import DeviceState

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class StepInputs:
    """What the forward pass and the sampler read. T token rows, R requests, L rows of logits.

    A sampled request with n rows of a verify has n rows of logits; a chunk has one, its last.
    """

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, -1 for padding
    metadata: AttentionMetadata | None  # None: the forward was launched with it
    num_valid: torch.Tensor  # [R] int64, rows that are not padding
    logits_rows: torch.Tensor  # [L] int64, the token row each row of logits is computed from
    logits_slots: IntArray  # [L]
    draw_positions: torch.Tensor  # [L] int64, where each row of logits draws, -1 for padding


@dataclass(slots=True)
class Verdict:
    """What a step brought, where it was computed. S sampled requests, at most W tokens each."""

    tokens: torch.Tensor  # [S, W] int64, the first num_emitted of each row count
    numbers: torch.Tensor  # [4, S] int64: tokens emitted, drafts verified, drafts accepted, Finish
    packed: torch.Tensor | None = None  # both, one behind the other, where they lie so


class StepMath(Protocol):
    """The computations of a step outside the model."""

    def change_slots(self, out: SchedulerOutput) -> None:
        """Requests leave and enter their slots, block tables grow: before `prepare`."""
        ...

    def prepare(self, out: SchedulerOutput) -> StepInputs:
        """Inputs of the forward pass, from the device's own counters."""
        ...

    def finish(self, out: SchedulerOutput, inputs: StepInputs, drawn: torch.Tensor | None) -> Verdict | None:
        """Verify drafts, cut at stop tokens and limits, and move the counters.

        drawn: [L] int64, what the target drew at each row of logits; None if nothing is sampled. A
        draft is accepted if and only if it is the token drawn at its position and all drafts before
        it were accepted; the token drawn behind the last accepted one comes for free.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step as arrays; index arithmetic that needs no device."""

    slots: IntArray  # [R]
    num_rows: IntArray  # [R]
    is_verify: npt.NDArray[np.bool_]  # [R]
    query_start_loc: IntArray  # [R + 1]
    row_request: IntArray  # [T] index into slots
    row_offset: IntArray  # [T] index within the request's rows
    sampled: IntArray  # [S] index into slots
    logits_rows: IntArray  # [L]
    logits_request: IntArray  # [L] index into sampled
    logits_column: IntArray  # [L] index within the request's rows of logits

    @classmethod
    def of(cls, out: SchedulerOutput) -> StepRows:
        """Without a loop over rows."""
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
        logits_rows = (starts[1:][sampled] - columns)[logits_request] + logits_column
        return cls(
            slots, num_rows, is_verify, starts, row_request, row_offset, sampled,
            logits_rows, logits_request, logits_column,
        )  # fmt: skip


class TorchStep:
    """In torch, on any device."""

    def __init__(self, state: DeviceState) -> None:
        self._state = state

    def change_slots(self, out: SchedulerOutput) -> None:
        """See StepMath."""
        self._state.change(out)

    def prepare(self, out: SchedulerOutput) -> StepInputs:
        """See StepMath."""
        state, to, rows = self._state, self._to_device, StepRows.of(out)
        slots, offset, request = to(rows.slots), to(rows.row_offset), to(rows.row_request)
        start = state.num_computed[slots]
        num_rows = to(rows.num_rows)
        # A verify's rows: the last token and the drafts there are, as far as the limit lets any
        # of them be emitted. Chunks are known tokens: all rows count.
        room = state.limit[slots] - state.num_tokens[slots] - 1
        drafts = torch.minimum(state.num_drafts[slots], room).clamp_(min=0)
        verify_rows = torch.minimum(1 + drafts, num_rows)
        num_valid = torch.where(to(rows.is_verify), verify_rows, num_rows)
        num_valid = num_valid.masked_fill(state.finished[slots], 0)

        valid = offset < num_valid[request]
        row_slot = slots[request]
        position = (start[request] + offset).masked_fill_(~valid, 0)
        block = state.block_table[row_slot, position // state.block_size].to(torch.int64)
        mapping = block * state.block_size + position % state.block_size
        max_blocks = max(state.num_blocks[slot] for slot in rows.slots.tolist())
        metadata = AttentionMetadata(
            query_start_loc=to(rows.query_start_loc).to(torch.int32),
            seq_lens=(start + num_valid).to(torch.int32),
            block_table=state.block_table[slots, :max_blocks],
            slot_mapping=mapping.masked_fill_(~valid, -1),
            positions=position.masked_fill(~valid, -1),
            num_reqs=len(rows.slots),
            num_tokens=len(rows.row_offset),
            max_query_len=int(rows.num_rows.max()),
            max_seq_len=max_blocks * state.block_size,
        )
        logits_rows = to(rows.logits_rows)
        drawn_from = metadata.positions[logits_rows]
        return StepInputs(
            input_ids=state.tokens[row_slot, position].to(torch.int64),
            positions=metadata.positions,
            metadata=metadata,
            num_valid=num_valid,
            logits_rows=logits_rows,
            logits_slots=rows.slots[rows.sampled][rows.logits_request],
            draw_positions=torch.where(drawn_from < 0, -1, drawn_from + 1),
        )

    def finish(self, out: SchedulerOutput, inputs: StepInputs, drawn: torch.Tensor | None) -> Verdict | None:
        """See StepMath."""
        state, to, rows = self._state, self._to_device, StepRows.of(out)
        slots = to(rows.slots)
        if drawn is None:
            state.num_computed[slots] += inputs.num_valid
            return None
        width = int(rows.logits_column.max()) + 1
        sampled, is_verify = to(rows.sampled), to(rows.is_verify)
        slot = slots[sampled]
        num_valid = inputs.num_valid[sampled]
        num_tokens = state.num_tokens[slot]
        alive = num_valid > 0
        num_drafts = torch.where(is_verify[sampled], num_valid - 1, 0).clamp_(min=0)
        column = torch.arange(width, device=state.device)
        tokens = drawn.new_full((len(rows.sampled), width), -1)
        tokens[to(rows.logits_request), to(rows.logits_column)] = drawn
        drafts = state.tokens[slot[:, None], num_tokens[:, None] + column[:-1]]
        match = (tokens[:, :-1] == drafts) & (column[:-1] < num_drafts[:, None])
        accepted = match.cumprod(1).sum(1)

        # The padding of stop_ids is -1, and so is the token of a row that had no legal one: such a
        # request stops here as well, and the runner reports the error.
        is_stop = (tokens[:, :, None] == state.stop_ids[slot][:, None, :]).any(2)
        before_stop = torch.where(is_stop, column, width).amin(1)
        room = state.limit[slot] - num_tokens
        emitted = torch.minimum(torch.minimum(accepted, before_stop) + 1, room) * alive
        finished = torch.where(emitted == room, int(Finish.LENGTH), int(Finish.NO))
        finished = torch.where(before_stop < emitted, int(Finish.STOP), finished) * alive

        target = num_tokens[:, None] + column
        old = state.tokens[slot[:, None], target]
        state.tokens[slot[:, None], target] = torch.where(
            column < emitted[:, None], tokens.to(torch.int32), old
        )
        state.num_tokens[slot] = num_tokens + emitted
        state.finished[slot] |= finished != Finish.NO
        # Chunks move by the rows they computed, verifies by what they emitted.
        advance = inputs.num_valid.masked_fill(is_verify, 0)
        advance[sampled] += emitted * is_verify[sampled]
        state.num_computed[slots] += advance
        state.num_drafts[slots] = 0
        accepted = torch.minimum(accepted, emitted)
        return Verdict(tokens, torch.stack((emitted, num_drafts, accepted, finished)))

    def _to_device(self, array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._state.device, non_blocking=True)
