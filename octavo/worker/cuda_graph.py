"""CUDA graphs of a step's first half, keyed by the padded number of token rows.

A graph holds any mix of rows: attention is ragged and reads everything on the device. So a step of
n rows is copied into the buffers of the next larger size, padded with rows that nothing reads, and
replayed. All graphs share one memory pool; the largest is captured first, so that the others fit
into its memory. What a graph returns lives in that pool until the next replay of any graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo.attention.backend import AttentionMetadata

# forward(input_ids, metadata) -> [rows, hidden]; positions are the metadata's
Forward = Callable[[torch.Tensor, AttentionMetadata], torch.Tensor]


def graph_sizes(most: int) -> list[int]:
    """Padded numbers of rows, ascending: close together where steps are short, at most 1/8 apart later."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16]
    step = 8
    while sizes[-1] < most:
        if sizes[-1] >= 8 * step and step < 64:
            step *= 2
        sizes.append(sizes[-1] + step)
    return [size for size in sizes if size < most] + [most]


@dataclass(slots=True)
class GraphInputs:
    """The buffers that all graphs read, each as long as the largest needs."""

    input_ids: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64, -1 for padding
    slot_mapping: torch.Tensor  # [rows] int64, -1 for padding
    query_start_loc: torch.Tensor  # [rows + 1] int32
    seq_lens: torch.Tensor  # [rows] int32
    block_table: torch.Tensor  # [rows, max_blocks] int32

    @classmethod
    def allocate(cls, rows: int, max_blocks: int, device: torch.device) -> GraphInputs:
        """Empty steps: no row belongs to a request."""
        return cls(
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
            torch.zeros(rows + 1, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, max_blocks, dtype=torch.int32, device=device),
        )

    def metadata(self, rows: int, max_seq_len: int) -> AttentionMetadata:
        """The step that a graph of so many rows sees: as many requests as rows, most of them empty."""
        return AttentionMetadata(
            query_start_loc=self.query_start_loc[: rows + 1],
            seq_lens=self.seq_lens[:rows],
            block_table=self.block_table[:rows],
            slot_mapping=self.slot_mapping[:rows],
            positions=self.positions[:rows],
            num_reqs=rows,
            num_tokens=rows,
            max_query_len=rows,
            max_seq_len=max_seq_len,
        )

    def fill(self, input_ids: torch.Tensor, step: AttentionMetadata, rows: int) -> None:
        """Copy a step in and pad it to `rows`. Launches only; the host does not wait."""
        tokens, requests = step.num_tokens, step.num_reqs
        self.input_ids[:tokens] = input_ids
        self.positions[:tokens] = step.positions
        self.positions[tokens:rows] = -1
        self.slot_mapping[:tokens] = step.slot_mapping
        self.slot_mapping[tokens:rows] = -1
        self.query_start_loc[: requests + 1] = step.query_start_loc
        self.query_start_loc[requests + 1 : rows + 1] = tokens
        self.seq_lens[:requests] = step.seq_lens
        self.seq_lens[requests:rows] = 0
        self.block_table[:requests, : step.block_table.shape[1]] = step.block_table


class CudaGraphs:
    """Captures and replays. Forwards of more rows than `sizes` covers are not for this class."""

    def __init__(
        self,
        forward: Forward,
        sizes: Sequence[int],
        max_blocks: int,
        max_seq_len: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._sizes = sorted(sizes)
        self._max_seq_len = max_seq_len
        self._inputs = GraphInputs.allocate(self._sizes[-1], max_blocks, device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None  # torch's handle of the memory pool
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def num_captured(self) -> int:
        """Graphs that are ready."""
        return len(self._graphs)

    @property
    def missing(self) -> list[int]:
        """Sizes not yet captured, the largest first."""
        return [size for size in reversed(self._sizes) if size not in self._graphs]

    def padded(self, num_tokens: int) -> int | None:
        """The size a step of so many rows is padded to; None if no graph is that large."""
        return next((size for size in self._sizes if size >= num_tokens), None)

    def capture(self, rows: int) -> None:
        """Capture one size. Kernels are compiled and buffers made by a first run outside the graph."""
        metadata = self._inputs.metadata(rows, self._max_seq_len)
        ids = self._inputs.input_ids[:rows]
        self._inputs.query_start_loc.zero_()  # an empty step: nothing is stored
        self._inputs.positions.fill_(-1)
        self._inputs.slot_mapping.fill_(-1)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._forward(ids, metadata)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            hidden = self._forward(ids, metadata)
        self._pool = self._pool or graph.pool()
        self._graphs[rows] = graph, hidden

    def capture_all(self) -> None:
        """Every size that is missing."""
        for rows in self.missing:
            self.capture(rows)

    def replay(self, input_ids: torch.Tensor, step: AttentionMetadata) -> torch.Tensor:
        """Hidden states of a step [num_tokens, hidden], valid until the next replay of any graph.

        Raises KeyError if the step's size was not captured.
        """
        rows = self.padded(step.num_tokens)
        if rows is None or rows not in self._graphs:
            raise KeyError(f"no graph for a step of {step.num_tokens} rows")
        graph, hidden = self._graphs[rows]
        self._inputs.fill(input_ids, step, rows)
        graph.replay()
        return hidden[: step.num_tokens]
