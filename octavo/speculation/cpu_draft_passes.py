"""`TorchDraftPasses` for a CPU: the host can look, so no row is computed in vain.

All of it is arithmetic on a few numbers a slot, which numpy does in a tenth of torch's time. The
columns are views of the tensors that others read and write.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.backend import AttentionMetadata
from octavo.core.messages import DraftGroup, DraftRows
from octavo.speculation.draft_passes import BlockTables, IntArray, PassInputs
from octavo.speculation.proposer import DraftTables as SlotTables


class CpuDraftPasses:
    """See DraftPasses."""

    masks_rows = False

    def __init__(self, slots: SlotTables, block_size: int) -> None:
        num_slots, width = slots.tokens.shape
        self._blocks = BlockTables(num_slots, -(-width // block_size), block_size, slots.tokens.device)
        self._block_table = self._blocks.table.numpy()
        self._from_model = torch.zeros(num_slots, dtype=torch.bool)
        self._is_from_model = self._from_model.numpy()
        self._num_computed = np.zeros(num_slots, dtype=np.int64)
        self._tokens = slots.tokens.numpy()
        self._num_tokens, self._num_drafts = slots.num_tokens.numpy(), slots.num_drafts.numpy()
        self._limit, self._finished = slots.limit.numpy(), slots.finished.numpy()
        self._slots = self._wanted = np.empty(0, dtype=np.int64)  # of the drafting slots, and their drafts
        self._depth = 0
        self._max_blocks = 1

    @property
    def from_model(self) -> torch.Tensor:
        """See DraftPasses."""
        return self._from_model

    def change(self, group: DraftGroup) -> None:
        """See DraftPasses."""
        self._blocks.change(group)
        for slot, num_computed, _ in group.entered:
            self._num_computed[slot] = num_computed

    def settle(self, slots: IntArray) -> None:
        """See DraftPasses."""
        self._num_computed[slots] = np.minimum(self._num_computed[slots], self._num_tokens[slots] - 1)
        self._is_from_model[slots] = False

    def first(self, rows: Sequence[DraftRows]) -> PassInputs | None:
        """See DraftPasses."""
        slots, catch_up, counts = np.array(rows, dtype=np.int64).T
        known, start = self._num_tokens[slots], self._num_computed[slots]
        behind = known - start
        drafts = (counts > 0) & (behind <= catch_up + 2)
        drafts &= ~self._finished[slots] & (self._num_drafts[slots] == 0)
        num_rows = np.where(drafts, behind, np.minimum(catch_up, behind - 1))
        self._depth = 0
        self._slots = slots[drafts]
        room = np.maximum(self._limit[self._slots] - known[drafts], 1)
        self._wanted = np.minimum(counts[drafts], room)
        self._max_blocks = max(self._blocks.filled[slot] for slot in slots.tolist())
        if not num_rows.all():
            some = num_rows > 0
            slots, start, num_rows, drafts = slots[some], start[some], num_rows[some], drafts[some]
            if not len(slots):
                return None
        self._num_computed[slots] += num_rows
        return self._inputs(slots, start, num_rows, drafts)

    def next(self) -> PassInputs | None:
        """See DraftPasses."""
        self._depth += 1
        more = self._wanted > self._depth
        if not more.all():
            self._slots, self._wanted = self._slots[more], self._wanted[more]
        slots = self._slots
        if not len(slots):
            return None
        start = self._num_computed[slots]
        self._num_computed[slots] = start + 1
        return self._inputs(slots, start, None, None)

    def time(self, num_rows: int) -> bool:
        """See DraftPasses."""
        return False

    def draft(self, inputs: PassInputs, drawn: torch.Tensor | None) -> None:
        """See DraftPasses."""
        if drawn is None:
            return
        slots, tokens = self._slots, drawn.numpy()
        made = tokens >= 0
        if not made.all():  # no token was legal there: the draft model has no more to say
            self._slots, self._wanted = slots[made], self._wanted[made]
            slots, tokens = self._slots, tokens[made]
        self._tokens[slots, self._num_tokens[slots] + self._depth] = tokens
        self._num_drafts[slots] = self._depth + 1
        self._is_from_model[slots] = True

    def _inputs(
        self,
        slots: IntArray,  # [S]
        start: IntArray,  # [S] position of each slot's first row
        num_rows: IntArray | None,  # [S]; None: one each
        drafts: npt.NDArray[np.bool_] | None,  # [S] slots with a row of logits, their last; None: all
    ) -> PassInputs:
        block_size, count = self._blocks.block_size, len(slots)
        slot, position = slots, start
        ends = np.arange(1, count + 1) if num_rows is None else np.cumsum(num_rows)
        starts = np.zeros(count + 1, dtype=np.int32)
        starts[1:] = ends
        seq_lens = start + 1 if num_rows is None else start + num_rows
        if num_rows is not None:
            slot = np.repeat(slots, num_rows)
            position = np.arange(ends[-1]) + np.repeat(start + num_rows - ends, num_rows)
        block, offset = np.divmod(position, block_size)
        mapping = self._block_table[slot, block].astype(np.int64) * block_size + offset
        longest = 1 if num_rows is None else int(num_rows.max())
        metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(starts),
            seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
            block_table=torch.from_numpy(self._block_table[slots, : self._max_blocks]),
            slot_mapping=torch.from_numpy(mapping),
            positions=torch.from_numpy(position),
            num_reqs=count,
            num_tokens=len(position),
            max_query_len=longest,
            max_seq_len=self._max_blocks * block_size,
        )
        if drafts is not None and not drafts.all():
            ends, seq_lens, slots = ends[drafts], seq_lens[drafts], slots[drafts]
        return PassInputs(
            input_ids=torch.from_numpy(self._tokens[slot, position].astype(np.int64)),
            metadata=metadata,
            logits_rows=torch.from_numpy(ends - 1),
            logits_slots=slots,
            draw_positions=torch.from_numpy(seq_lens),
        )
