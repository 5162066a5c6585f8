"""Ragged batches over a shuffled paged cache, and dense attention in float64 to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.cpu import attention
from octavo.kernels.cpu.library import CpuLibrary


@dataclass(frozen=True)
class Request:
    """`context` tokens are in the cache; then come rows, True a token and False padding."""

    context: int
    rows: Sequence[bool]

    @property
    def seq_len(self) -> int:
        return self.context + sum(self.rows)


def decode(context: int) -> Request:
    return Request(context, [True])


def chunk(context: int, rows: int) -> Request:
    return Request(context, [True] * rows)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_batch(
    requests: Sequence[Request], block_size: int, tables: torch.Tensor, tail_padding: int = 0
) -> AttentionMetadata:
    """The metadata of one step; request i uses row i of the block tables."""
    starts, positions, slots = [0], [], []
    for request, table in zip(requests, tables, strict=True):
        position = request.context
        for real in request.rows:
            positions.append(position if real else -1)
            block = int(table[position // block_size]) if real else 0
            slots.append(block * block_size + position % block_size if real else -1)
            position += real
        starts.append(len(positions))
    positions += [-1] * tail_padding
    slots += [-1] * tail_padding
    lengths = [request.seq_len for request in requests]
    return AttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=tables,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        num_reqs=len(requests),
        num_tokens=len(positions),
        max_query_len=max(len(request.rows) for request in requests),
        max_seq_len=max(lengths),
    )


def shuffled_tables(requests: Sequence[Request], block_size: int, seed: int = 0) -> tuple[torch.Tensor, int]:
    """Block tables in random order, -1 where a request has no block, and the number of blocks."""
    counts = [-(-request.seq_len // block_size) for request in requests]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.full((len(requests), max(counts) + 1), -1, dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[used : used + count]
        used += count
    return tables, len(order)


@dataclass(frozen=True)
class Filled:
    """A batch whose keys and values, this step's included, are in the cache."""

    spec: AttentionSpec
    requests: Sequence[Request]
    metadata: AttentionMetadata
    cache: torch.Tensor
    keys: list[torch.Tensor]  # by request, [seq_len, num_kv_heads, head_dim]
    values: list[torch.Tensor]
    query: torch.Tensor  # [num_tokens, num_heads, head_dim]


def fill(
    spec: AttentionSpec,
    requests: Sequence[Request],
    dtype: torch.dtype,
    library: CpuLibrary,
    block_size: int = 16,
    tail_padding: int = 0,
) -> Filled:
    """Random keys, values and queries. What no token was written to is NaN."""
    tables, num_blocks = shuffled_tables(requests, block_size)
    cache = torch.full(attention.kv_cache_shape(num_blocks, block_size, spec), float("nan"), dtype=dtype)
    shape = (spec.num_kv_heads, spec.head_dim)
    lengths = [request.seq_len for request in requests]
    keys = [random(n, *shape, dtype=dtype, seed=2 * i) for i, n in enumerate(lengths)]
    values = [random(n, *shape, dtype=dtype, seed=2 * i + 1) for i, n in enumerate(lengths)]
    whole = make_batch([chunk(0, n) for n in lengths], block_size, tables)
    attention.store(torch.cat(keys), torch.cat(values), cache, whole, spec, library=library)
    metadata = make_batch(requests, block_size, tables, tail_padding)
    query = random(metadata.num_tokens, spec.num_heads, spec.head_dim, dtype=dtype, seed=99) * 1.5
    return Filled(spec, requests, metadata, cache, keys, values, query)


def dense_attention(batch: Filled) -> torch.Tensor:
    """float64 [num_tokens, num_heads * head_dim], row by row."""
    spec, metadata = batch.spec, batch.metadata
    group = spec.num_heads // spec.num_kv_heads
    out = torch.zeros(metadata.num_tokens, spec.num_heads, spec.head_dim, dtype=torch.float64)
    starts = metadata.query_start_loc.tolist()
    for request in range(metadata.num_reqs):
        keys = batch.keys[request].double().repeat_interleave(group, dim=1)
        values = batch.values[request].double().repeat_interleave(group, dim=1)
        for row in range(starts[request], starts[request + 1]):
            end = int(metadata.positions[row]) + 1
            if end == 0:
                continue
            begin = max(0, end - spec.sliding_window) if spec.sliding_window else 0
            scores = torch.einsum("hd,thd->ht", batch.query[row].double(), keys[begin:end]) * spec.scale
            if spec.soft_cap:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), values[begin:end])
    return out.flatten(1)
