"""Prefixes read once for all requests that share them, against plain torch and against reading each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.attention.backend import AttentionMetadata, AttentionSpec  # noqa: E402
from octavo.attention.torch_backend import TorchBackend  # noqa: E402
from octavo.attention.triton_backend import TritonBackend  # noqa: E402
from octavo.kernels.triton import attention, shared  # noqa: E402
from octavo.worker import prefix_groups  # noqa: E402
from octavo.worker.cuda_graph import StepBuffers  # noqa: E402
from octavo.worker.prefix_groups import PrefixGroups  # noqa: E402

BLOCK_SIZE = 8
# prefix and length of each request: two groups, and one that shares with nobody
REQUESTS = [("a", 75), ("b", 50), ("a", 66), ("", 40), ("a", 97), ("b", 33), ("a", 65)]
PREFIXES = {"a": 64, "b": 32, "": 0}
ROWS = [1, 3, 2, 1, 1, 1, 1]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GROUP", 32)
    monkeypatch.setattr(shared, "BLOCK_KV", 16)
    monkeypatch.setattr(prefix_groups, "LEAST_TOKENS", 32)
    monkeypatch.setattr(prefix_groups, "LEAST_REQUESTS", 2)
    monkeypatch.setattr(prefix_groups, "LEAST_SAVED", 64)


@dataclass
class Scene:
    """A step whose requests share prefixes, and what plain torch makes of it."""

    query: torch.Tensor
    cache: torch.Tensor
    meta: AttentionMetadata
    expected: torch.Tensor


def scene(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(shared, "TILE_HEADS", 4 * spec.num_heads // spec.num_kv_heads)
    tile_rows = shared.tile_rows(spec.num_heads // spec.num_kv_heads)
    torch.manual_seed(1)
    needed = [-(-length // BLOCK_SIZE) for _, length in REQUESTS]
    table = torch.zeros(len(REQUESTS), max(needed), dtype=torch.int32)
    free = iter(torch.randperm(100).tolist())
    common = {name: [next(free) for _ in range(tokens // BLOCK_SIZE)] for name, tokens in PREFIXES.items()}
    groups = PrefixGroups(len(REQUESTS), max(needed), BLOCK_SIZE, tile_rows, 32)
    for slot, (name, _) in enumerate(REQUESTS):
        blocks = common[name] + [next(free) for _ in range(needed[slot] - len(common[name]))]
        table[slot, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        groups.enter(slot, blocks)
    starts = torch.zeros(len(ROWS) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(ROWS).cumsum(0)
    positions = torch.cat(
        [torch.arange(length - n, length) for (_, length), n in zip(REQUESTS, ROWS, strict=True)]
    )
    positions[2] = -1  # a draft that was not made
    total = sum(ROWS)
    buffers = StepBuffers.allocate(total, len(ROWS), table, tile_rows)
    slots = np.arange(len(ROWS), dtype=np.int32)
    grouping = groups.find(
        slots,
        np.array(ROWS, dtype=np.int32),
        np.array([length - n for (_, length), n in zip(REQUESTS, ROWS, strict=True)], dtype=np.int32),
    )
    assert grouping is not None
    assert grouping.lengths.tolist() == [PREFIXES[name] for name, _ in REQUESTS]
    buffers.share(grouping)
    buffers.query_start_loc[:] = starts
    buffers.positions[:] = positions
    buffers.table_rows[:] = torch.arange(len(ROWS))
    buffers.seq_lens[:] = torch.tensor([length for _, length in REQUESTS])
    meta = buffers.metadata(total, len(ROWS), max(ROWS), max(needed) * BLOCK_SIZE, shares=True)
    cache = torch.randn(100, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    query = torch.randn(total, spec.num_heads, spec.head_dim)
    expected = TorchBackend().attend(query, cache.transpose(2, 3), _plain(meta), spec)
    return Scene(query, cache, meta, expected)


@pytest.mark.parametrize(
    "spec",
    [AttentionSpec(4, 2, 16, 0.3), AttentionSpec(6, 2, 24, 0.2, soft_cap=3.0)],
    ids=["grouped", "odd, soft cap"],
)
def test_as_plain_torch(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    now = scene(spec, monkeypatch)
    got = TritonBackend().attend(now.query, now.cache, now.meta, spec)
    torch.testing.assert_close(got, now.expected, atol=2e-5, rtol=1e-4)


def test_a_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through its first owner's table alone; and reading each request's own gives the same, a head each."""
    spec, backend = AttentionSpec(2, 2, 16, 0.25), TritonBackend()
    now = scene(spec, monkeypatch)
    got = backend.attend(now.query, now.cache, now.meta, spec)
    alone = backend.attend(now.query, now.cache, _plain(now.meta), spec)
    torch.testing.assert_close(got, now.expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(alone, now.expected, atol=2e-5, rtol=1e-4)
    moved = now.meta.block_table.clone()
    moved[6, : PREFIXES["a"] // BLOCK_SIZE] = 99
    elsewhere = replace(now.meta, block_table=moved)
    assert torch.equal(backend.attend(now.query, now.cache, elsewhere, spec), got)


def _plain(meta: AttentionMetadata) -> AttentionMetadata:
    return replace(meta, shared=None)
