"""The seam between a model and the way its attention is computed.

A `ForwardContext` is handed to the model's forward as an argument; there is no global, because
target and draft model live in one process. A backend owns the layout of its KV cache: nobody
else indexes into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Prefixes that several requests of a step share, for backends that read such a prefix once.

    Each token row of a group sees the group's whole prefix. A tile holds a fixed number of token rows of
    one group; how many is the backend's choice.
    """

    lengths: torch.Tensor  # [num_reqs] int32, tokens of the shared prefix of each request's group, or 0
    rows: torch.Tensor  # [tiles * rows of a tile] int32, token rows; -1: none
    tiles: torch.Tensor  # [tiles, 2] int32: a row of block_table that begins with the prefix, its tokens or 0


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The ragged batch of one step. All tensors live on the model's device.

    Row i of request r is token row ``query_start_loc[r] + i``. A row attends to the KV positions
    ``<= positions[row]`` of its own request (and within the sliding window, if there is one).
    Padding rows have position -1 and slot_mapping -1: nothing is stored or read for them, and
    their attention output is zero.
    """

    query_start_loc: torch.Tensor  # [num_reqs + 1] int32, token rows of the requests, cumulative
    seq_lens: torch.Tensor  # [num_reqs] int32, KV length including this step's valid rows
    block_table: torch.Tensor  # [num_reqs or more, max_blocks] int32; a row's stride may exceed max_blocks
    slot_mapping: torch.Tensor  # [num_tokens] int64, block_id * block_size + offset, or -1
    positions: torch.Tensor  # [num_tokens] int64, or -1
    num_reqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int  # an upper bound; the host knows no better
    table_rows: torch.Tensor | None = None  # [num_reqs] int32, rows of block_table; None: 0, 1, 2 …
    min_query_len: int = 1  # no request has fewer rows, padding included
    usual_query_len: int | None = None  # rows that a request has as a rule, where the longest is but a bound
    # (row of block_table, first token row, rows, position of the first) of chunks that are worth a kernel of
    # their own, where the host knows them: all of so many rows, or all of them that begin their request
    long_chunks: tuple[tuple[int, int, int, int], ...] = ()
    shared: SharedPrefixes | None = None

    @classmethod
    def of_padding(cls, num_rows: int, max_query_len: int, device: torch.device) -> AttentionMetadata:
        """A step of padding rows alone: the products run, no KV is stored or read. To time a step."""
        padding = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
        return cls(
            query_start_loc=torch.tensor([0, num_rows], dtype=torch.int32, device=device),
            seq_lens=torch.zeros(1, dtype=torch.int32, device=device),
            block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
            slot_mapping=padding,
            positions=padding,
            num_reqs=1,
            num_tokens=num_rows,
            max_query_len=max_query_len,
            max_seq_len=0,
        )

    def only(self, rows: torch.Tensor) -> AttentionMetadata:
        """These token rows ([L] int64, ascending) alone, each a request of one row; nothing waits."""
        count, device = len(rows), rows.device
        ends = self.query_start_loc[1 : self.num_reqs + 1]
        request = torch.searchsorted(ends, rows.int(), right=True)
        request = request.clamp(max=self.num_reqs - 1)  # padding behind the last request is anybody's
        positions = self.positions[rows]
        return AttentionMetadata(
            query_start_loc=torch.arange(count + 1, dtype=torch.int32, device=device),
            seq_lens=(positions + 1).int(),
            block_table=self.block_table,
            slot_mapping=self.slot_mapping[rows],
            positions=positions,
            num_reqs=count,
            num_tokens=count,
            max_query_len=1,
            max_seq_len=self.max_seq_len,
            table_rows=request.int() if self.table_rows is None else self.table_rows[request],
        )


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Everything a model's forward needs beside ids and positions."""

    attention: AttentionMetadata
    kv_caches: list[torch.Tensor]  # one a layer, shaped by the backend
    # [L] int64, ascending: token rows whose hidden states are wanted. The others store their keys and values
    # in every layer, and nobody computes what the last one would do with them behind that. None: all rows.
    wanted: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a layer's attention is, fixed at construction. Heads are this rank's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # queries are multiplied by it
    sliding_window: int | None = None  # a row sees at most this many positions, its own included
    soft_cap: float | None = None  # scores become cap * tanh(score / cap)


class AttentionBackend(Protocol):
    """One way to compute paged attention. `name` is what attention_backend="…" selects."""

    name: str

    def kv_cache_shape(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> tuple[int, ...]:
        """Shape of one layer's KV cache, keys and values together."""
        ...

    def store(
        self,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], rotary applied
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> None:
        """Write this step's keys and values; rows with slot_mapping -1 are skipped."""
        ...

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim], rotary applied
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Attention output [num_tokens, num_heads * head_dim] in the query's dtype."""
        ...
