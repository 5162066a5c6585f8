"""`StepMath` for GPUs with Triton: one kernel before the forward and one behind the draw.

The host sends two small tables a step, what changed and which slots get how many rows, each in one
copy from page-locked memory. It never waits, and no size depends on what the device holds. The inputs
lie in the buffers that the CUDA graphs read, padded to the size of the step's graph.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from octavo.core.messages import NewSlot, RowKind, SchedulerOutput
from octavo.kernels.triton import step as kernels
from octavo.kernels.triton.prompt import LEAST_ROWS, MOST_GATHERED
from octavo.worker.cuda_graph import StepBuffers
from octavo.worker.device_time import to_device
from octavo.worker.graph_sizes import GraphKey, GraphSizes
from octavo.worker.input_batch import DeviceState
from octavo.worker.prefix_groups import Ints, PrefixGroups
from octavo.worker.step_math import StepInputs, Verdict

_ROWS_ROUND_UP = 128  # of steps without a graph: rows of a tile of the library's products


@dataclass(frozen=True, slots=True)
class RowTable:
    """The rows of a step in numbers. R requests, L rows of logits."""

    table: npt.NDArray[np.int32]  # [R, kernels.ROW_COLUMNS]
    num_tokens: int
    longest: int  # most rows of one request
    num_logits: int  # L
    width: int  # most rows of logits of one request
    num_sampled: int
    logits_slots: npt.NDArray[np.int64]  # [L]
    is_verify: bool  # every request decodes or verifies
    is_dense: bool  # and every row has a row of logits

    @classmethod
    def of(cls, out: SchedulerOutput) -> RowTable:
        """Without a loop over rows."""
        num_reqs = len(out.rows)
        rows = np.fromiter(chain.from_iterable(out.rows), dtype=np.int32, count=4 * num_reqs).reshape(-1, 4)
        slots, num_rows, samples = rows[:, 0], rows[:, 1], rows[:, 3] != 0
        is_verify = rows[:, 2] == RowKind.VERIFY
        columns = np.where(is_verify, num_rows, 1) * samples  # rows of logits
        table = np.empty((num_reqs, kernels.ROW_COLUMNS), dtype=np.int32)
        table[:, 0], table[:, 1], table[:, 2] = slots, num_rows, is_verify
        table[:, 3] = np.cumsum(num_rows) - num_rows
        table[:, 4] = np.cumsum(columns) - columns
        table[:, 5] = np.where(samples, np.cumsum(samples) - 1, -1)
        all_verify = bool(is_verify.all())
        return cls(
            table=table,
            num_tokens=int(num_rows.sum()),
            longest=int(num_rows.max()),
            num_logits=int(columns.sum()),
            width=int(columns.max()),
            num_sampled=int(samples.sum()),
            logits_slots=np.repeat(slots, columns).astype(np.int64),
            is_verify=all_verify,
            is_dense=all_verify and bool(samples.all()),
        )


class GpuStep:
    """See StepMath."""

    def __init__(
        self,
        state: DeviceState,
        buffers: StepBuffers | None = None,
        sizes: GraphSizes | None = None,
        prefixes: PrefixGroups | None = None,
    ) -> None:
        """`buffers` must hold the largest step; None: each step gets its own. `sizes`: None: no graphs.

        `prefixes`: finds prefixes that requests share, for steps that have a graph; None: nobody looks.
        """
        self.state = state
        self._buffers = buffers
        self._sizes = sizes
        self._prefixes = prefixes
        self._rows = torch.empty(0, kernels.ROW_COLUMNS, dtype=torch.int32)  # of the step being computed
        self._chunk_start = [0] * state.num_slots  # where each slot's next chunk begins
        self._num_sampled = 0
        self._width = 0
        self._described: tuple[SchedulerOutput, RowTable] | None = None
        self._found: tuple[RowTable, GraphKey | None] | None = None  # the last answer of graph_of
        self.draws = kernels.SlotDraws.allocate(state.num_slots, state.device)

    def change_slots(self, out: SchedulerOutput) -> None:
        """See StepMath. One copy and one kernel, and nothing where nothing changed."""
        if not (out.freed_slots or out.new_slots or out.new_blocks):
            return
        state = self.state
        entering = {new.slot for new in out.new_slots}
        widest = max((len(new.stop_token_ids) for new in out.new_slots), default=0)
        state.widen_stop_ids(widest)
        changes: list[tuple[int, int, int, int, int]] = [
            (kernels.LEAVE, slot, 0, 0, 0) for slot in out.freed_slots if slot not in entering
        ]
        values: list[int] = []

        def add(what: int, slot: int, first: int, numbers: list[int], count: int) -> None:
            changes.append((what, slot, first, count, len(values)))
            values.extend(numbers)

        for new in out.new_slots:
            counters = [len(new.token_ids), new.num_computed_tokens, new.limit]
            stops = list(new.stop_token_ids)
            add(kernels.ENTER, new.slot, 0, counters + _draw_bits(new) + stops, len(stops))
            add(kernels.SET_TOKENS, new.slot, 0, new.token_ids, len(new.token_ids))
            add(kernels.SET_BLOCKS, new.slot, 0, new.block_ids, len(new.block_ids))
            state.num_blocks[new.slot] = len(new.block_ids)
            self._chunk_start[new.slot] = new.num_computed_tokens
            if self._prefixes is not None:
                self._prefixes.enter(new.slot, new.block_ids)
        for slot, block_ids in out.new_blocks:
            add(kernels.SET_BLOCKS, slot, state.num_blocks[slot], block_ids, len(block_ids))
            state.num_blocks[slot] += len(block_ids)
            if self._prefixes is not None:
                self._prefixes.append(slot, block_ids)
        table = np.array(changes, dtype=np.int32)
        sent = to_device(np.concatenate((table.reshape(-1), np.array(values, dtype=np.int32))), state.device)
        size = table.size
        longest = int(table[:, 3].max())
        kernels.change(
            slot_tables(state), self.draws, sent[:size].view(-1, kernels.CHANGE_COLUMNS), sent[size:], longest
        )

    def describe(self, out: SchedulerOutput) -> RowTable:
        """The rows of a step, as its kernels want them."""
        if self._described is None or self._described[0] is not out:
            self._described = out, RowTable.of(out)
        return self._described[1]

    def adopt(self, out: SchedulerOutput, rows: RowTable, table: torch.Tensor) -> None:
        """The step was prepared elsewhere; `table` is its rows' table on the device."""
        self._rows, self._width, self._num_sampled = table, rows.width, rows.num_sampled
        if not rows.is_dense:
            self._long_chunks(out)

    def prepare(self, out: SchedulerOutput) -> StepInputs:
        """See StepMath."""
        state, rows = self.state, self.describe(out)
        num_reqs, num_tokens, num_logits = len(rows.table), rows.num_tokens, rows.num_logits
        longest, self._width, self._num_sampled = rows.longest, rows.width, rows.num_sampled
        self._rows = to_device(rows.table, state.device)

        key = self.graph_of(rows)
        buffers = self._buffers or StepBuffers.allocate(num_tokens, num_reqs, state.block_table)
        padded_rows, padded_reqs, run_rows = num_tokens, num_reqs, num_tokens
        if key is not None:
            padded_rows, padded_reqs = key.rows, min(key.rows, len(buffers.seq_lens))
        elif self._sizes is not None and num_tokens > self._sizes.largest:
            # The library's products are up to an eighth slower at odd sizes.
            padded_rows = min(-(-num_tokens // _ROWS_ROUND_UP) * _ROWS_ROUND_UP, len(buffers.input_ids))
            run_rows = padded_rows
        own = torch.zeros(num_reqs + 2 * num_logits, dtype=torch.int64, device=state.device)
        num_valid, logits = own[:num_reqs], own[num_reqs:]
        logits_rows, draw_positions = logits[:num_logits], logits[num_logits:]
        kernels.prepare(
            slot_tables(state),
            self._rows,
            kernels.StepOutputs(
                buffers.input_ids, buffers.positions, buffers.slot_mapping, buffers.query_start_loc,
                buffers.seq_lens, buffers.table_rows, num_valid, logits_rows, draw_positions,
            ),
            num_tokens, longest, padded_rows, padded_reqs, max(1, self._width),
        )  # fmt: skip
        max_blocks = max(state.num_blocks[slot] for slot in rows.table[:, 0].tolist())
        shares = key is not None and key.shares
        metadata = buffers.metadata(run_rows, num_reqs, longest, max_blocks * state.block_size, shares)
        if not rows.is_verify:
            metadata = replace(
                metadata, long_chunks=self._long_chunks(out), min_query_len=int(rows.table[:, 1].min())
            )
        return StepInputs(
            input_ids=buffers.input_ids[:run_rows],
            positions=metadata.positions,
            metadata=metadata,
            num_valid=num_valid,
            logits_rows=logits_rows,
            logits_slots=rows.logits_slots,
            draw_positions=draw_positions,
        )

    def graph_of(self, rows: RowTable) -> GraphKey | None:
        """The graph of the step; None: there is none."""
        if self._found is None or self._found[0] is not rows:
            self._found = rows, self._find_graph(rows)
        return self._found[1]

    def _find_graph(self, rows: RowTable) -> GraphKey | None:
        if self._sizes is None:
            return None
        sharing = self._sizes.graph_for(rows.num_tokens, rows.longest, True)
        if sharing is not None and self._share(rows.table[:, 0], rows.table[:, 1]):
            return sharing
        return self._sizes.graph_for(rows.num_tokens, rows.longest)

    def _share(self, slots: Ints, num_rows: Ints) -> bool:
        """True if requests of this step share prefixes; the buffers hold which."""
        if self._prefixes is None or self._buffers is None:
            return False
        starts = np.array([self._chunk_start[slot] for slot in slots.tolist()], dtype=np.int32)
        groups = self._prefixes.find(slots, num_rows, starts)
        if groups is not None and groups is not self._buffers.groups:
            self._buffers.share(groups)
        return groups is not None

    def _long_chunks(self, out: SchedulerOutput) -> tuple[tuple[int, int, int, int], ...]:
        """See AttentionMetadata."""
        found, first = [], 0
        for slot, num_rows, kind, _ in out.rows:
            if kind is RowKind.CHUNK:
                if num_rows >= LEAST_ROWS:
                    found.append((slot, first, num_rows, self._chunk_start[slot]))
                self._chunk_start[slot] += num_rows
            first += num_rows
        if sum(start for *_, start in found) > MOST_GATHERED:
            found = [chunk for chunk in found if chunk[3] == 0]
        return tuple(found)

    def finish(self, out: SchedulerOutput, inputs: StepInputs, drawn: torch.Tensor | None) -> Verdict | None:
        """See StepMath."""
        device = self.state.device
        if drawn is None:
            drawn = torch.empty(0, dtype=torch.int64, device=device)
        sampled, width = self._num_sampled, max(1, self._width)
        result = torch.empty(sampled * (width + 4), dtype=torch.int64, device=device)
        tokens, numbers = (
            result[: sampled * width].view(sampled, width),
            result[sampled * width :].view(4, sampled),
        )
        kernels.finish(slot_tables(self.state), self._rows, inputs.num_valid, drawn, tokens, numbers)
        return Verdict(tokens, numbers, result) if sampled else None


def _draw_bits(new: NewSlot) -> list[int]:
    """A request's temperature and seed as three int32."""
    temperature = 0.0 if new.params.is_greedy else new.params.temperature
    bits = struct.pack("<fQ", temperature, new.seed & 0xFFFF_FFFF_FFFF_FFFF)
    return list(struct.unpack("<iii", bits))


def slot_tables(state: DeviceState) -> kernels.SlotTables:
    """The device tables as kernels see them. The stop ids' table may be replaced by a wider one."""
    return kernels.SlotTables(
        state.tokens,
        state.block_table,
        state.stop_ids,
        state.num_tokens,
        state.num_computed,
        state.num_drafts,
        state.limit,
        state.finished,
        state.block_size,
    )
