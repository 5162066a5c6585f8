"""A draft pass of few rows as one graph: rows, forward, head, draw, and the drafts taken.

The host sends one plan a step and launches the graph of the first pass, then those of the others. Slots
that draw by temperature alone, or greedily, need nothing else; where one filters or is penalised, the
same graphs end with the logits, and the draw and the taking are launched behind each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels.triton import draft as plain
from octavo.kernels.triton import sample
from octavo.kernels.triton import whole_pass as kernels
from octavo.kernels.triton.step import SlotDraws
from octavo.models.decoder import CausalLM
from octavo.sampling.noise import Stream
from octavo.speculation.draft_passes import IntArray
from octavo.worker.cuda_graph import CudaGraphs, StepBuffers
from octavo.worker.graph_sizes import GraphKey


class WholePasses:
    """What lies around the forward in the draft model's graphs of short passes, and their launches."""

    def __init__(
        self,
        tables: plain.DraftSlots,
        draws: SlotDraws,
        buffers: StepBuffers,
        model: CausalLM,
        most_rows: int,
    ) -> None:
        """`most_rows`: of the largest graph."""
        device, slots = buffers.positions.device, len(buffers.seq_lens)
        self._tables, self._draws, self._buffers, self._model = tables, draws, buffers, model
        self._most_rows = most_rows
        self._most_reqs = min(most_rows, slots)
        self._memory = memory = kernels.WholePassMemory.allocate(most_rows, slots, device)
        self._out = plain.PassRows(
            buffers.input_ids, buffers.positions, buffers.slot_mapping, buffers.query_start_loc,
            buffers.seq_lens, buffers.table_rows, memory.valid, memory.makes, memory.places[0],
            memory.places[1],
        )  # fmt: skip
        self._table_size = plain.PASS_COLUMNS * slots
        self._counts: list[int] = []  # slots of each pass
        self._first_rows = 0  # token rows of the first
        self._draws_inside = False
        self._logits: torch.Tensor | None = None
        self.graphs: CudaGraphs | None = None

    def covers(self, key: GraphKey) -> bool:
        """See StepTail."""
        return not key.has_chunk and key.rows <= self._most_rows

    def empty_step(self) -> None:
        """See StepTail."""
        self._memory.plan.zero_()

    def before(self, key: GraphKey) -> None:
        """See StepTail."""
        reqs = min(key.rows, self._most_reqs)
        kernels.rows(self._memory, self._tables, self._draws, self._out, key.rows, reqs)

    def behind(self, key: GraphKey, hidden: torch.Tensor) -> torch.Tensor:
        """See StepTail."""
        memory, rows = self._memory, key.rows
        logits = self._model.logits(hidden)
        sample.draw(
            logits, memory.temperature[:rows], seed=memory.seed[:rows], position=memory.positions[:rows],
            stream=int(Stream.DRAW), out=memory.drawn[:rows], counters=memory.counters[:rows],
            wanted=memory.plan[kernels.DRAWS : kernels.DRAWS + 1],
        )  # fmt: skip
        kernels.take(memory, self._tables, min(rows, self._most_reqs))
        return logits

    def begin(
        self,
        first: npt.NDArray[np.int32],
        later: npt.NDArray[np.int32],
        counts: IntArray,
        only_draws: bool,
    ) -> int:
        """Send the plan of a step's passes; returns how many of them are to be computed before the graphs.

        first, later: the tables of the first pass and of the others. counts: drafts wanted, as in `later`.
        0: all are graphs. 1: the first one catches up, and is too long for that. All: there are no graphs.
        """
        num_rows, longest = int(first[:, 4].sum()), int(first[:, 4].max())
        most = int(counts.max(initial=0))
        self._counts = [len(first), *(int((counts > depth).sum()) for depth in range(1, most))]
        before = int(longest > kernels.MOST_ROWS or self._key(num_rows) is None)
        if before and (len(self._counts) == 1 or self._key(self._counts[1]) is None):
            return len(self._counts)
        plan = np.zeros(kernels.HEADER + 2 * self._table_size, dtype=np.int32)
        plan[0], plan[kernels.DRAWS] = before, only_draws
        for depth, count in enumerate(self._counts):
            plan[1 + 2 * depth : 3 + 2 * depth] = count, num_rows if depth == 0 else count
        start = kernels.HEADER
        plan[start : start + first.size] = first.reshape(-1)
        start += self._table_size
        plan[start : start + later.size] = later.reshape(-1)
        sent = torch.from_numpy(plan)
        if self._memory.plan.is_cuda:
            sent = sent.pin_memory()
        self._memory.plan.copy_(sent, non_blocking=True)
        self._draws_inside = only_draws
        self._first_rows = num_rows
        return before

    def launch(self, depth: int, context: int) -> int:
        """Launch a pass; returns its token rows, 0 if there is none. `context`: the longest there may be."""
        if depth >= len(self._counts):
            return 0
        num_rows = self._first_rows if depth == 0 else self._counts[depth]
        key = self._key(num_rows, context)
        assert key is not None
        assert self.graphs is not None
        _, self._logits = self.graphs.run(key)
        return num_rows

    def logits(self, depth: int, num_logits: int) -> torch.Tensor | None:
        """[L, vocab_size] of the pass just launched, to be drawn from; None: it has drawn itself."""
        if self._draws_inside or not num_logits:
            return None
        assert self._logits is not None
        return self._logits[self._memory.places[0, :num_logits]] if depth == 0 else self._logits[:num_logits]

    def draw_positions(self, num_logits: int) -> torch.Tensor:
        """[L] int64, where the rows of logits draw; -1: no draft is made after all"""
        return self._memory.places[1, :num_logits]

    def take(self, depth: int, drawn: torch.Tensor | None) -> None:
        """The draw behind the graph is done: what the graph itself did not do."""
        if self._draws_inside:
            return
        start = kernels.HEADER + (self._table_size if depth else 0)
        table = self._memory.plan[start : start + plain.PASS_COLUMNS * self._counts[depth]]
        plain.take(self._tables, table.view(-1, plain.PASS_COLUMNS), self._out, drawn, depth)
        self._memory.plan[:1] += 1

    def time(self, num_rows: int) -> bool:
        """Launch a pass of padding alone; False if there is no graph of this size."""
        key = self._key(num_rows)
        if key is None or self.graphs is None:
            return False
        self.empty_step()
        self.graphs.run(key)
        return True

    def _key(self, num_rows: int, context: int = 1) -> GraphKey | None:
        assert self.graphs is not None
        padded = self.graphs.sizes.padded(num_rows)
        key = self.graphs.one_row(context) if padded == 1 else GraphKey(padded or 0, False)
        return key if padded and self.covers(key) and self.graphs.has(key) else None
