"""`TorchDraftPasses` for a CPU: exact rows, and the C kernels of a step around each pass.

To those kernels the draft model's pass is a step of chunks: the rows of a slot follow its count of
computed tokens, and the token that a chunk draws at its end is written behind the known ones. Only the
columns are the draft model's own, so that the target's counters stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo.attention.backend import AttentionMetadata
from octavo.core.messages import DraftGroup, DraftRows, RowKind
from octavo.kernels.cpu import step as kernels
from octavo.speculation.draft_passes import BlockTables, IntArray, PassInputs
from octavo.speculation.proposer import DraftTables as SlotTables

_NO_LIMIT = 1 << 40


class CpuDraftPasses:
    """See DraftPasses. Raises CpuLibraryError if the kernels were not built."""

    masks_rows = False

    def __init__(self, slots: SlotTables, block_size: int) -> None:
        num_slots, width = slots.tokens.shape
        self._blocks = BlockTables(num_slots, -(-width // block_size), block_size, slots.tokens.device)

        def column() -> torch.Tensor:
            return torch.zeros(num_slots, dtype=torch.int64)

        length, num_computed, unused = column(), column(), column()
        ended = torch.zeros(num_slots, dtype=torch.bool)
        self._from_model = torch.zeros(num_slots, dtype=torch.bool)
        self._tables = kernels.SlotTables(
            slots.tokens,
            length,
            num_computed,
            unused,
            torch.full((num_slots,), _NO_LIMIT),
            ended,
            torch.full((num_slots, 1), -1),  # what is drawn where no token is legal: it ends the slot's round
            self._blocks.table,
            block_size,
        )
        # The same memory for numpy, which looks at a few numbers in a tenth of the time.
        self._length, self._num_computed = length.numpy(), num_computed.numpy()
        self._ended = ended.numpy()
        self._is_from_model = self._from_model.numpy()
        self._num_tokens, self._num_drafts = slots.num_tokens.numpy(), slots.num_drafts.numpy()
        self._limit, self._finished = slots.limit.numpy(), slots.finished.numpy()
        self._wanted = np.empty((0, 2), dtype=np.int64)  # [drafting slots, 2]: slot, number of drafts
        self._depth = 0
        self._rows = torch.empty(0, 4, dtype=torch.int64)  # of the pass, as the kernels take them
        self._num_valid = torch.empty(0, dtype=torch.int64)

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
        slots, catch_up, counts = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        known = self._num_tokens[slots]
        behind = known - self._num_computed[slots]
        drafts = (counts > 0) & ~self._finished[slots] & (self._num_drafts[slots] == 0)
        drafts &= behind <= catch_up + 2
        valid = np.where(drafts, behind, np.minimum(catch_up, behind - 1))
        self._depth = 0
        chosen = slots[drafts]
        room = np.maximum(self._limit[chosen] - known[drafts], 1)
        self._wanted = np.stack((chosen, np.minimum(counts[drafts], room)), axis=1)
        self._length[chosen] = known[drafts]
        self._ended[slots] = False
        some = valid > 0
        return self._inputs(slots[some], valid[some], drafts[some])

    def next(self) -> PassInputs | None:
        """See DraftPasses."""
        self._depth += 1
        wanted = self._wanted
        more = (wanted[:, 1] > self._depth) & ~self._ended[wanted[:, 0]]
        if not more.all():
            self._wanted = wanted = wanted[more]
        slots = wanted[:, 0]
        return self._inputs(slots, np.ones(len(slots), dtype=np.int64), np.ones(len(slots), dtype=np.bool_))

    def draft(self, inputs: PassInputs, drawn: torch.Tensor | None) -> None:
        """See DraftPasses."""
        count = len(inputs.logits_slots)
        if drawn is None:
            drawn = torch.empty(0, dtype=torch.int64)
        kernels.finish(self._tables, self._rows, self._num_valid, drawn, count, 1)
        made = inputs.logits_slots[drawn.numpy() >= 0]
        self._num_drafts[made] += 1
        if self._depth == 0:
            self._is_from_model[made] = True

    def _inputs(
        self,
        slots: IntArray,  # [S]
        num_rows: IntArray,  # [S], all of them valid
        drafts: np.ndarray[tuple[int], np.dtype[np.bool_]],  # [S]
    ) -> PassInputs | None:
        if not len(slots):
            return None
        table = np.empty((len(slots), 4), dtype=np.int64)
        table[:, 0], table[:, 1], table[:, 2], table[:, 3] = slots, num_rows, RowKind.CHUNK, drafts
        self._rows = torch.from_numpy(table)
        num_tokens = int(num_rows.sum())
        max_blocks = max(self._blocks.filled[slot] for slot in slots.tolist())
        step = kernels.prepare(self._tables, self._rows, num_tokens, int(drafts.sum()), max_blocks)
        self._num_valid = step.num_valid
        metadata = AttentionMetadata(
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            block_table=step.block_table,
            slot_mapping=step.slot_mapping,
            positions=step.positions,
            num_reqs=len(slots),
            num_tokens=num_tokens,
            max_query_len=int(num_rows.max()),
            max_seq_len=max_blocks * self._blocks.block_size,
        )
        return PassInputs(
            step.input_ids, metadata, step.logits_rows, step.logits_slots.numpy(), step.draw_positions
        )
