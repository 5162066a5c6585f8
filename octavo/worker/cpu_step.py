"""`StepMath` for CPUs with Octavo's C kernels: two calls a step instead of some sixty torch ones."""

from __future__ import annotations

import numpy as np
import torch

from octavo.attention.backend import AttentionMetadata
from octavo.core.messages import RowKind, SchedulerOutput
from octavo.kernels.cpu import step as kernels
from octavo.worker.input_batch import DeviceState
from octavo.worker.step_math import StepInputs, Verdict


class CpuStep:
    """See StepMath. Raises CpuLibraryError if the kernels were not built."""

    def __init__(self, state: DeviceState) -> None:
        self._state = state
        self._rows = torch.empty(0, 4, dtype=torch.int64)  # of the step being computed
        self._num_sampled = 0
        self._width = 0
        self._stop_ids = state.stop_ids
        self.tables = self._view_tables()

    def change_slots(self, out: SchedulerOutput) -> None:
        """See StepMath."""
        self._state.change(out)

    def prepare(self, out: SchedulerOutput) -> StepInputs:
        """See StepMath."""
        state = self._state
        if state.stop_ids is not self._stop_ids:  # it was replaced by a wider one
            self._stop_ids = state.stop_ids
            self.tables = self._view_tables()
        num_tokens = num_logits = longest = 0
        self._num_sampled, self._width, max_blocks = 0, 1, 1
        num_blocks = state.num_blocks
        for slot, num_rows, kind, samples in out.rows:
            num_tokens += num_rows
            longest = max(longest, num_rows)
            max_blocks = max(max_blocks, num_blocks[slot])
            if samples:
                self._num_sampled += 1
                columns = num_rows if kind == RowKind.VERIFY else 1
                num_logits += columns
                self._width = max(self._width, columns)
        self._rows = torch.from_numpy(np.array(out.rows, dtype=np.int64))
        step = kernels.prepare(self.tables, self._rows, num_tokens, num_logits, max_blocks)
        metadata = AttentionMetadata(
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            block_table=step.block_table,
            slot_mapping=step.slot_mapping,
            positions=step.positions,
            num_reqs=len(out.rows),
            num_tokens=num_tokens,
            max_query_len=longest,
            max_seq_len=max_blocks * state.block_size,
        )
        return StepInputs(
            input_ids=step.input_ids,
            positions=step.positions,
            metadata=metadata,
            num_valid=step.num_valid,
            logits_rows=step.logits_rows,
            logits_slots=step.logits_slots.numpy(),
            draw_positions=step.draw_positions,
        )

    def finish(self, out: SchedulerOutput, inputs: StepInputs, drawn: torch.Tensor | None) -> Verdict | None:
        """See StepMath."""
        sampled = drawn is not None
        if drawn is None:
            drawn = torch.empty(0, dtype=torch.int64)
        tokens, numbers = kernels.finish(
            self.tables, self._rows, inputs.num_valid, drawn, self._num_sampled, self._width
        )
        return Verdict(tokens, numbers) if sampled else None

    def _view_tables(self) -> kernels.SlotTables:
        state = self._state
        return kernels.SlotTables(
            state.tokens,
            state.num_tokens,
            state.num_computed,
            state.num_drafts,
            state.limit,
            state.finished,
            state.stop_ids,
            state.block_table,
            state.block_size,
        )
