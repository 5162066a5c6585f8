"""`DraftPasses` for GPUs with Triton: two kernels a pass, and one copy a step from the host.

The rows of a pass lie in the buffers that the draft model's CUDA graphs read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo.core.messages import DraftGroup, DraftRows
from octavo.kernels.triton import draft as kernels
from octavo.sampling.batch import SamplingSlots
from octavo.speculation.draft_passes import BlockTables, IntArray, PassInputs
from octavo.worker.cuda_graph import StepBuffers
from octavo.worker.device_time import to_device
from octavo.worker.graph_sizes import GraphSizes
from octavo.worker.input_batch import DeviceState
from octavo.worker.whole_pass import WholePasses


class GpuDraftPasses:
    """See DraftPasses."""

    masks_rows = True

    def __init__(self, state: DeviceState, sizes: GraphSizes | None, max_rows: int) -> None:
        """`sizes`: of the draft model's graphs, if there are any. `max_rows`: of a pass in its buffers."""
        num_slots, width = state.tokens.shape
        self._device = state.device
        self._sizes = sizes
        blocks = BlockTables(num_slots, -(-width // state.block_size), state.block_size, state.device)
        self._blocks = blocks
        self.buffers = StepBuffers.allocate(max_rows, num_slots, blocks.table)
        self._tables = kernels.DraftSlots(
            state.tokens, state.num_tokens, state.num_drafts, state.limit, state.finished, blocks.table,
            torch.zeros(num_slots, dtype=torch.int64, device=state.device),
            torch.zeros(num_slots, dtype=torch.bool, device=state.device), state.block_size,
        )  # fmt: skip
        self._counts: IntArray = np.empty(0, dtype=np.int64)  # drafts wanted, the most first
        self._slots: IntArray = np.empty(0, dtype=np.int64)  # whose, in this order
        self._later = torch.empty(0, kernels.PASS_COLUMNS, dtype=torch.int32)  # the table of later passes
        self._depth = 0
        self._table = self._later  # of the pass being computed
        self._out: kernels.PassRows | None = None
        self._whole: WholePasses | None = None
        self._sampling: SamplingSlots | None = None
        self._records = False
        self._graphs_from: int | None = None  # from this pass on this step's are whole graphs; None: none is

    def use_graphs(self, whole: WholePasses, sampling: SamplingSlots, records: bool) -> None:
        """From now on passes of few rows are whole graphs. `records`: somebody wants to see their logits."""
        self._whole, self._sampling, self._records = whole, sampling, records

    @property
    def tables(self) -> kernels.DraftSlots:
        """The slot tables, the draft model's own among them."""
        return self._tables

    @property
    def from_model(self) -> torch.Tensor:
        """See DraftPasses."""
        return self._tables.from_model

    def change(self, group: DraftGroup) -> None:
        """See DraftPasses."""
        self._blocks.change(group)
        if group.entered:
            slots, computed = np.array([(slot, done) for slot, done, _ in group.entered], dtype=np.int64).T
            sent = to_device(np.concatenate((slots, computed)), self._device)
            self._tables.num_computed[sent[: len(slots)]] = sent[len(slots) :]

    def settle(self, slots: IntArray) -> None:
        """See DraftPasses."""
        kernels.settle(self._tables, to_device(slots.astype(np.int32), self._device))

    def first(self, rows: Sequence[DraftRows]) -> PassInputs | None:
        """See DraftPasses."""
        asked = np.array(rows, dtype=np.int64).reshape(-1, 3)
        slots, catch_up, counts = asked[:, 0], asked[:, 1], asked[:, 2]
        wants = counts > 0
        widths = catch_up + 2 * wants
        table = np.empty((len(asked), kernels.PASS_COLUMNS), dtype=np.int32)
        table[:, 0], table[:, 1], table[:, 2], table[:, 4] = slots, catch_up, wants, widths
        table[:, 3] = np.cumsum(widths) - widths
        table[:, 5] = np.where(wants, np.cumsum(wants) - 1, -1)
        # A later pass holds the slots that want more drafts: the first ones of one table for all.
        order = np.argsort(-counts[wants], kind="stable")
        self._counts, self._slots = counts[wants][order], slots[wants][order]
        later = np.zeros((len(order), kernels.PASS_COLUMNS), dtype=np.int32)
        later[:, 0], later[:, 2], later[:, 4] = self._slots, 1, 1
        later[:, 3] = later[:, 5] = np.arange(len(order))
        self._depth, self._graphs_from = 0, None
        if self._whole is not None and self._sampling is not None:
            only_draws = not self._records and self._sampling.only_draw(slots[wants])
            self._graphs_from = self._whole.begin(table, later, self._counts, only_draws)
        if self._by_graph:
            return self._launch(slots[wants])
        sent = to_device(np.concatenate((table, later)), self._device)
        self._later = sent[len(table) :]
        return self._inputs(sent[: len(table)], slots[wants], int(widths.sum()), int(widths.max()))

    @property
    def _by_graph(self) -> bool:
        """The pass being computed is a whole graph."""
        return self._graphs_from is not None and self._depth >= self._graphs_from

    def next(self) -> PassInputs | None:
        """See DraftPasses."""
        self._depth += 1
        count = int((self._counts > self._depth).sum())
        if self._by_graph:
            return self._launch(self._slots[:count]) if count else None
        return self._inputs(self._later[:count], self._slots[:count], count, 1) if count else None

    def draft(self, inputs: PassInputs, drawn: torch.Tensor | None) -> None:
        """See DraftPasses."""
        if self._by_graph:
            assert self._whole is not None
            self._whole.take(self._depth, drawn)
            return
        assert self._out is not None
        kernels.take(self._tables, self._table, self._out, drawn, self._depth)

    def time(self, num_rows: int) -> bool:
        """See DraftPasses."""
        return self._whole is not None and self._whole.time(num_rows)

    def _launch(self, logits_slots: IntArray) -> PassInputs:
        assert self._whole is not None
        count = len(logits_slots)
        longest = max(1, *self._blocks.filled) * self._blocks.block_size
        num_rows = self._whole.launch(self._depth, longest)
        return PassInputs(
            input_ids=self.buffers.input_ids[:num_rows],
            metadata=None,
            logits_rows=self.buffers.positions[:0],
            logits_slots=logits_slots,
            draw_positions=self._whole.draw_positions(count),
            computed=True,
            logits=self._whole.logits(self._depth, count),
        )

    def _inputs(self, table: torch.Tensor, logits_slots: IntArray, num_rows: int, longest: int) -> PassInputs:
        entries, num_logits = len(table), len(logits_slots)
        buffers = self.buffers
        if num_rows > len(buffers.input_ids):  # a long catch-up: no graph is that large
            buffers = StepBuffers.allocate(num_rows, entries, self._blocks.table)
        padded = self._sizes.padded(num_rows, longest) if self._sizes is not None else None
        padded_rows, padded_reqs = num_rows, entries
        if padded is not None:
            padded_rows, padded_reqs = padded, min(padded, len(buffers.seq_lens))
        own = torch.zeros(2 * (entries + num_logits), dtype=torch.int64, device=self._device)
        valid, makes = own[:entries], own[entries : 2 * entries]
        logits_rows, draw_positions = own[2 * entries :].view(2, num_logits)
        self._table = table
        self._out = kernels.PassRows(
            buffers.input_ids, buffers.positions, buffers.slot_mapping, buffers.query_start_loc,
            buffers.seq_lens, buffers.table_rows, valid, makes, logits_rows, draw_positions,
        )  # fmt: skip
        kernels.rows(
            self._tables, table, self._out, self._depth, num_rows, max(1, longest), padded_rows, padded_reqs
        )
        max_blocks = max(1, *self._blocks.filled)
        metadata = buffers.metadata(num_rows, entries, longest, max_blocks * self._blocks.block_size)
        return PassInputs(
            input_ids=buffers.input_ids[:num_rows],
            metadata=metadata,
            logits_rows=logits_rows,
            logits_slots=logits_slots,
            draw_positions=draw_positions,
        )
