"""CUDA graphs of steps, keyed by the padded number of token rows.

A graph holds any mix of rows: attention is ragged and reads everything on the device. All graphs read
the same buffers, `StepBuffers`. Whoever prepares a step writes it there, padded to the size of its
graph, and the graph is replayed; a step prepared elsewhere is copied in first.

There are four kinds of graphs, each of some sizes: see graph_sizes.

All graphs share one memory pool; the largest is captured first, so that the others fit into its
memory. What a graph returns lives in that pool until the next replay of any graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from octavo.attention.backend import AttentionMetadata, SharedPrefixes
from octavo.worker.device_time import to_device
from octavo.worker.graph_sizes import SHARED_SIZES, SHORT_ROWS, GraphKey, GraphSizes
from octavo.worker.prefix_groups import Grouping, num_tiles

# forward(input_ids, metadata) -> [rows, hidden]; positions are the metadata's
Forward = Callable[[torch.Tensor, AttentionMetadata], torch.Tensor]


@dataclass(slots=True)
class StepBuffers:
    """What a forward reads, at fixed places. Longer than any graph where steps without one use them too."""

    input_ids: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64, -1 for padding
    slot_mapping: torch.Tensor  # [rows] int64, -1 for padding
    query_start_loc: torch.Tensor  # [requests + 1] int32
    seq_lens: torch.Tensor  # [requests] int32
    table_rows: torch.Tensor  # [requests] int32
    block_table: torch.Tensor  # [table rows, max_blocks] int32
    prefix_lengths: torch.Tensor  # [requests] int32; these three are SharedPrefixes'
    prefix_rows: torch.Tensor  # [tiles * rows of a tile] int32
    prefix_tiles: torch.Tensor  # [tiles, 2] int32
    tile_rows: int  # rows of a tile
    usual_query_len: int = 1  # rows that a request has as a rule, in steps that may verify
    groups: Grouping | None = None  # what the three hold that are SharedPrefixes'

    @classmethod
    def allocate(
        cls,
        rows: int,
        requests: int,
        block_table: torch.Tensor,
        tile_rows: int = 0,
        usual_query_len: int = 1,
    ) -> StepBuffers:
        """Empty steps: no row belongs to a request. `block_table` is read where it is.

        `tile_rows`: rows of a tile of shared prefixes; 0: there will be none. `usual_query_len`: rows that a
        request has as a rule; a graph that may verify packs query tiles for so many.
        """
        device = block_table.device
        tiles = num_tiles(min(rows, SHARED_SIZES[-1]), tile_rows) if tile_rows else 0
        return cls(
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
            torch.zeros(requests + 1, dtype=torch.int32, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
            block_table,
            torch.zeros(requests, dtype=torch.int32, device=device),
            torch.full((tiles * tile_rows,), -1, dtype=torch.int32, device=device),
            torch.zeros(tiles, 2, dtype=torch.int32, device=device),
            tile_rows,
            usual_query_len,
        )

    def metadata(
        self,
        rows: int,
        requests: int,
        longest: int,
        max_seq_len: int,
        shares: bool = False,
        usual_query_len: int | None = None,
    ) -> AttentionMetadata:
        """A step of so many rows and at most so many requests, the longest of which has `longest` rows.

        `usual_query_len`: rows that a request has as a rule, if not the buffers' own number.
        """
        requests = min(requests, len(self.seq_lens))
        shared = None
        if shares:
            tiles = num_tiles(rows, self.tile_rows)
            shared = SharedPrefixes(
                self.prefix_lengths[:requests],
                self.prefix_rows[: tiles * self.tile_rows],
                self.prefix_tiles[:tiles],
            )
        return AttentionMetadata(
            query_start_loc=self.query_start_loc[: requests + 1],
            seq_lens=self.seq_lens[:requests],
            block_table=self.block_table,
            slot_mapping=self.slot_mapping[:rows],
            positions=self.positions[:rows],
            num_reqs=requests,
            num_tokens=rows,
            max_query_len=longest,
            max_seq_len=max_seq_len,
            table_rows=self.table_rows[:requests],
            usual_query_len=usual_query_len or self.usual_query_len,
            shared=shared,
        )

    def share(self, groups: Grouping) -> None:
        """The prefixes that steps from now on share. One copy, and the host does not wait."""
        parts = groups.lengths, groups.rows, groups.tiles.reshape(-1)
        together = to_device(np.concatenate(parts), self.positions.device)
        sent = torch.split(together, [len(part) for part in parts])
        held = self.prefix_lengths, self.prefix_rows, self.prefix_tiles.view(-1)
        for place, values, rest in zip(held, sent, (0, -1, 0), strict=True):
            place[: len(values)] = values
            place[len(values) :] = rest
        self.groups = groups

    def holds(self, step: AttentionMetadata) -> bool:
        """True if the step was written into these buffers by whoever prepared it."""
        return step.positions.data_ptr() == self.positions.data_ptr()

    def clear(self) -> None:
        """An empty step: nothing is stored and nothing attended to."""
        self.query_start_loc.zero_()
        self.positions.fill_(-1)
        self.slot_mapping.fill_(-1)
        self.seq_lens.zero_()
        self.prefix_lengths.zero_()
        self.prefix_tiles.zero_()
        self.groups = None

    def fill(self, input_ids: torch.Tensor, step: AttentionMetadata, rows: int) -> None:
        """Copy a step in and pad it to `rows`. Launches only; the host does not wait."""
        tokens, requests = step.num_tokens, step.num_reqs
        self.input_ids[:tokens] = input_ids
        self.positions[:tokens] = step.positions
        self.positions[tokens:rows] = -1
        self.slot_mapping[:tokens] = step.slot_mapping
        self.slot_mapping[tokens:rows] = -1
        self.query_start_loc[: requests + 1] = step.query_start_loc
        self.query_start_loc[requests + 1 :] = tokens
        self.seq_lens[:requests] = step.seq_lens
        self.seq_lens[requests:] = 0
        if step.table_rows is not None and step.block_table.data_ptr() == self.block_table.data_ptr():
            self.table_rows[:requests] = step.table_rows
            return
        self.block_table[:requests, : step.block_table.shape[1]] = step.block_table[:requests]
        torch.arange(requests, out=self.table_rows[:requests])


class StepTail(Protocol):
    """What graphs hold beside the forward. What it launches reads all that differs from memory."""

    def covers(self, key: GraphKey) -> bool:
        """True if this graph is to hold it."""
        ...

    def empty_step(self) -> None:
        """The graph's launches are about to run once outside of it: for no request."""
        ...

    def before(self, key: GraphKey) -> None:
        """Launches before the forward."""
        ...

    def behind(self, key: GraphKey, hidden: torch.Tensor) -> torch.Tensor:
        """Launches behind it; returns the logits [rows, vocab_size] float32."""
        ...


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    hidden: torch.Tensor
    logits: torch.Tensor | None  # with a tail


class CudaGraphs:
    """Captures and replays. Forwards of more rows than `sizes` covers are not for this class."""

    def __init__(
        self,
        forward: Forward,
        sizes: GraphSizes,
        buffers: StepBuffers,
        max_seq_len: int,
        tail: StepTail | None = None,
        rehearsal: Callable[[], AbstractContextManager[None]] = nullcontext,
        one_row_context: int | None = None,
    ) -> None:
        """`max_seq_len`: the longest context. `rehearsal`: in it a forward need only launch every kernel.

        `one_row_context`: one row has a graph for contexts up to this, and another one for longer ones.
        """
        self._forward = forward
        self.sizes = sizes
        self._max_seq_len = max_seq_len
        self._one_row_context = max_seq_len if one_row_context is None else min(one_row_context, max_seq_len)
        self.buffers = buffers
        self._tail = tail
        self._rehearsal = rehearsal
        self._graphs: dict[GraphKey, _Captured] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()  # the memory that all graphs share
        self._stream = torch.cuda.Stream(buffers.positions.device)  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> list[GraphKey]:
        """All graphs, the largest first."""
        found = self.sizes.keys
        if 1 in self.sizes.short and self.one_row(self._max_seq_len) not in found:
            found.append(self.one_row(self._max_seq_len))
        return sorted(found, reverse=True)

    def one_row(self, context: int) -> GraphKey:
        """The graph of one row whose context has at most so many tokens."""
        # a bound in whole blocks may be above the longest context there is
        return GraphKey(1, False, is_long=min(context, self._max_seq_len) > self._one_row_context)

    @property
    def missing(self) -> list[GraphKey]:
        """Graphs not yet captured, the largest first."""
        return [key for key in self.keys if key not in self._graphs]

    def rehearse(self, key: GraphKey) -> None:
        """Launch one graph's kernels outside of it."""
        self._run_once(self._work_of(key))

    def capture(self, key: GraphKey) -> None:
        """Capture one graph. Kernels are compiled and buffers made by a first run outside of it."""
        work = self._work_of(key)
        self._run_once(work)
        # torch.cuda.graph would wait for the device and give cached memory back, for each graph anew.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool)
            try:
                hidden, logits = work()
            finally:
                graph.capture_end()
        # All graphs' logits may lie in the same memory of the pool: this one's owner is the graph.
        self._graphs[key] = _Captured(graph, hidden, None if logits is None else _same_memory(logits))

    def _work_of(self, key: GraphKey) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """What a graph holds, of a step in which no request has a row."""
        rows, has_chunk, shares, is_long, verifies = key
        longest = rows if has_chunk else min(rows, SHORT_ROWS)
        context = self._max_seq_len if rows > 1 or is_long else self._one_row_context
        decodes = bool(self.sizes.verify) and not (has_chunk or shares or verifies)
        metadata = self.buffers.metadata(rows, rows, longest, context, shares, 1 if decodes else None)
        ids = self.buffers.input_ids[:rows]
        self.buffers.clear()
        tail = self._tail if self._tail is not None and self._tail.covers(key) else None

        def work() -> tuple[torch.Tensor, torch.Tensor | None]:
            if tail is None:
                return self._forward(ids, metadata), None
            tail.before(key)
            hidden = self._forward(ids, metadata)
            return hidden, tail.behind(key, hidden)

        if tail is not None:
            tail.empty_step()
        return work

    def _run_once(self, work: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), self._rehearsal():
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture_all(self) -> None:
        """Every graph that is missing."""
        for key in self.missing:
            self.capture(key)

    def replay(
        self, input_ids: torch.Tensor, step: AttentionMetadata, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states of a step [num_tokens, hidden], or of its wanted rows; valid until the next replay of
        any graph.

        Raises KeyError if the step's size was not captured.
        """
        key = self._key_of(step)
        if key is None or key not in self._graphs:
            raise KeyError(f"no graph for a step of {step.num_tokens} rows")
        graph, hidden, logits = self._graphs[key]
        assert logits is None, "this graph prepares its own step: run it"
        if not self.buffers.holds(step):
            self.buffers.fill(input_ids, step, key.rows)
        elif input_ids.data_ptr() != self.buffers.input_ids.data_ptr():  # they were changed since
            self.buffers.input_ids[: step.num_tokens] = input_ids
        graph.replay()
        return hidden[: step.num_tokens] if wanted is None else hidden[wanted]

    def replays(self, step: AttentionMetadata) -> bool:
        """True if `replay` has a graph for this step."""
        key = self._key_of(step)
        found = None if key is None else self._graphs.get(key)
        return found is not None and found.logits is None

    def _key_of(self, step: AttentionMetadata) -> GraphKey | None:
        key = self.sizes.graph_for(step.num_tokens, step.max_query_len, step.shared is not None)
        return self.one_row(step.max_seq_len) if key == GraphKey(1, False) else key

    def has(self, key: GraphKey) -> bool:
        """True if it is captured."""
        return key in self._graphs

    def run(self, key: GraphKey) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Launch a graph as it is; returns (hidden, logits) of all its rows, valid until the next one."""
        graph, hidden, logits = self._graphs[key]
        graph.replay()
        return hidden, logits

    def release(self) -> None:
        """Give the graphs and their memory back."""
        self._graphs.clear()


class _Memory:
    """Device memory under the protocol by which libraries hand arrays to one another."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": "<f4", "data": (tensor.data_ptr(), False), "version": 2,
        }  # fmt: skip


def _same_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor over the same memory that does not keep it from being used by others."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device)
