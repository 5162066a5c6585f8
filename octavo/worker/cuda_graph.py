"""CUDA graphs of a step's first half, keyed by the padded number of token rows.

A graph holds any mix of rows: attention is ragged and reads everything on the device. All graphs read
the same buffers, `StepBuffers`. Whoever prepares a step writes it there, padded to the size of its
graph, and the graph is replayed; a step prepared elsewhere is copied in first.

There are two kinds of graphs. In one every request has few rows, as in decoding and verifying; the
other also holds chunks of prompts, for which attention takes a second launch a layer. Steps with a
chunk are rarer and longer, so there are fewer sizes of those.

All graphs share one memory pool; the largest is captured first, so that the others fit into its
memory. What a graph returns lives in that pool until the next replay of any graph.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from octavo.attention.backend import AttentionMetadata

# forward(input_ids, metadata) -> [rows, hidden]; positions are the metadata's
Forward = Callable[[torch.Tensor, AttentionMetadata], torch.Tensor]

# A request of at most so many rows is one that decodes or verifies, or a chunk as short as that.
SHORT_ROWS = 16
_CHUNK_SIZES = (32, 64, 128, 256, 384)  # padded rows of steps with a chunk, below the largest


def graph_sizes(most: int) -> list[int]:
    """Padded numbers of rows, ascending: close together at first, at most a quarter apart later."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16]
    step = 8
    while sizes[-1] < most:
        if sizes[-1] >= 8 * step and step < 64:
            step *= 2
        sizes.append(sizes[-1] + step)
    return [size for size in sizes if size < most] + [most]


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """The padded numbers of rows there are graphs for, ascending."""

    short: tuple[int, ...]  # of steps without a chunk
    chunks: tuple[int, ...]  # of steps in which a request has more than SHORT_ROWS rows

    @classmethod
    def up_to(cls, most: int) -> GraphSizes:
        """Up to `most` rows."""
        return cls.of(graph_sizes(most))

    @classmethod
    def of(cls, sizes: Sequence[int]) -> GraphSizes:
        """These sizes for short steps, and fewer up to the same number of rows for those with a chunk."""
        short = tuple(sorted(sizes))
        most = short[-1]
        chunks = {size for size in (*_CHUNK_SIZES, most) if SHORT_ROWS < size <= most}
        return cls(short, tuple(sorted(chunks)))

    def padded(self, num_tokens: int, longest: int = 1) -> int | None:
        """Rows that a step is padded to whose longest request has `longest`; None: no graph is that large."""
        sizes = self.short if longest <= SHORT_ROWS else self.chunks
        index = bisect_left(sizes, num_tokens)
        return sizes[index] if index < len(sizes) else None


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

    @classmethod
    def allocate(cls, rows: int, requests: int, block_table: torch.Tensor) -> StepBuffers:
        """Empty steps: no row belongs to a request. `block_table` is read where it is."""
        device = block_table.device
        return cls(
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
            torch.zeros(requests + 1, dtype=torch.int32, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
            block_table,
        )

    def metadata(self, rows: int, requests: int, longest: int, max_seq_len: int) -> AttentionMetadata:
        """A step of so many rows and at most so many requests, the longest of which has `longest` rows."""
        requests = min(requests, len(self.seq_lens))
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
        )

    def holds(self, step: AttentionMetadata) -> bool:
        """True if the step was written into these buffers by whoever prepared it."""
        return step.positions.data_ptr() == self.positions.data_ptr()

    def clear(self) -> None:
        """An empty step: nothing is stored and nothing attended to."""
        self.query_start_loc.zero_()
        self.positions.fill_(-1)
        self.slot_mapping.fill_(-1)
        self.seq_lens.zero_()

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


class GraphKey(NamedTuple):
    """What tells one graph from another."""

    rows: int
    has_chunk: bool  # a request may have more than SHORT_ROWS rows


class CudaGraphs:
    """Captures and replays. Forwards of more rows than `sizes` covers are not for this class."""

    def __init__(
        self,
        forward: Forward,
        sizes: GraphSizes,
        buffers: StepBuffers,
        max_seq_len: int,
    ) -> None:
        """`max_seq_len`: the longest context."""
        self._forward = forward
        self.sizes = sizes
        self._max_seq_len = max_seq_len
        self.buffers = buffers
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None  # torch's handle of the memory pool
        self._stream = torch.cuda.Stream(buffers.positions.device)  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> list[GraphKey]:
        """All graphs, the largest first."""
        short = [GraphKey(size, False) for size in self.sizes.short]
        return sorted(short + [GraphKey(size, True) for size in self.sizes.chunks], reverse=True)

    @property
    def num_captured(self) -> int:
        """Graphs that are ready."""
        return len(self._graphs)

    @property
    def missing(self) -> list[GraphKey]:
        """Graphs not yet captured, the largest first."""
        return [key for key in self.keys if key not in self._graphs]

    def capture(self, key: GraphKey) -> None:
        """Capture one graph. Kernels are compiled and buffers made by a first run outside of it."""
        rows, has_chunk = key
        longest = rows if has_chunk else min(rows, SHORT_ROWS)
        metadata = self.buffers.metadata(rows, rows, longest, self._max_seq_len)
        ids = self.buffers.input_ids[:rows]
        self.buffers.clear()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._forward(ids, metadata)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            hidden = self._forward(ids, metadata)
        self._pool = self._pool or graph.pool()
        self._graphs[key] = graph, hidden

    def capture_all(self) -> None:
        """Every graph that is missing."""
        for key in self.missing:
            self.capture(key)

    def replay(self, input_ids: torch.Tensor, step: AttentionMetadata) -> torch.Tensor:
        """Hidden states of a step [num_tokens, hidden], valid until the next replay of any graph.

        Raises KeyError if the step's size was not captured.
        """
        rows = self.sizes.padded(step.num_tokens, step.max_query_len)
        key = GraphKey(rows or 0, step.max_query_len > SHORT_ROWS)
        if key not in self._graphs:
            raise KeyError(f"no graph for a step of {step.num_tokens} rows")
        graph, hidden = self._graphs[key]
        if not self.buffers.holds(step):
            self.buffers.fill(input_ids, step, key.rows)
        elif input_ids.data_ptr() != self.buffers.input_ids.data_ptr():  # they were changed since
            self.buffers.input_ids[: step.num_tokens] = input_ids
        graph.replay()
        return hidden[: step.num_tokens]

    def release(self) -> None:
        """Give the graphs and their memory back."""
        self._graphs.clear()
        self._pool = None
