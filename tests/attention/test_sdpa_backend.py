"""Attention by torch's own kernels against the oracle, over ragged mixed batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.attention import sdpa_backend
from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.attention.sdpa_backend import SdpaBackend
from octavo.attention.torch_backend import TorchBackend

BLOCK = 16
# (computed before, rows of this step, padding rows among them at the end): chunks, decodes of all lengths,
# verifies with and without padding, a request with nothing to do
MIXED = [
    (0, 40, 0),
    (70, 1, 0),
    (3, 1, 0),
    (41, 5, 2),
    (50, 33, 3),
    (9, 4, 0),
    (60, 1, 0),
    (20, 0, 3),
    (15, 1, 0),
]


def batch(requests: list[tuple[int, int, int]], seed: int = 0) -> AttentionMetadata:
    """Requests over scattered blocks; the table has rows to spare on its right."""
    needed = [-(-(done + new) // BLOCK) for done, new, _ in requests]
    ids = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full(
        (len(requests), max(needed) + 2), 10_000, dtype=torch.int32
    )  # nobody's: not to be read
    starts, slots, positions, used = [0], [], [], 0
    for request, (done, new, padding) in enumerate(requests):
        table[request, : needed[request]] = ids[used : used + needed[request]]
        used += needed[request]
        for position in range(done, done + new):
            slots.append(int(table[request, position // BLOCK]) * BLOCK + position % BLOCK)
            positions.append(position)
        slots += [-1] * padding
        positions += [-1] * padding
        starts.append(len(slots))
    seq_lens = [done + new for done, new, _ in requests]
    return AttentionMetadata(
        torch.tensor(starts, dtype=torch.int32), torch.tensor(seq_lens, dtype=torch.int32), table,
        torch.tensor(slots), torch.tensor(positions), len(requests), len(slots), 64, 2 * max(seq_lens),
    )  # fmt: skip


def both(
    meta: AttentionMetadata, spec: AttentionSpec, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored and attended by both: (ours, the oracle's in float32)."""
    generator = torch.Generator().manual_seed(1)
    oracle, ours = TorchBackend(), SdpaBackend()
    num_blocks = int(meta.block_table[meta.block_table < 10_000].max()) + 1
    shape = ours.kv_cache_shape(num_blocks, BLOCK, spec)
    # Each slot that no request has written yet is NaN: what was there before must not show.
    cache = torch.full(shape, float("nan")).to(dtype)
    for request, seq_len in enumerate(meta.seq_lens.tolist()):
        for position in range(seq_len):
            block = int(meta.block_table[request, position // BLOCK])
            cache[block, :, position % BLOCK] = torch.randn(shape[1:2] + shape[3:], generator=generator).to(
                dtype
            )

    def random(heads: int) -> torch.Tensor:
        return torch.randn(meta.num_tokens, heads, spec.head_dim, generator=generator).to(dtype)

    key, value, query = random(spec.num_kv_heads), random(spec.num_kv_heads), 2 * random(spec.num_heads)
    other = cache.clone()
    ours.store(key, value, cache, meta, spec)
    oracle.store(key, value, other, meta, spec)
    assert torch.equal(cache.nan_to_num(), other.nan_to_num())
    expected = oracle.attend(query.float(), cache.float(), meta, spec)
    return ours.attend(query, cache, meta, spec), expected


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("heads", [(6, 2, 10), (4, 4, 16), (8, 1, 32)])
def test_mixed_batches(window: int | None, soft_cap: float | None, heads: tuple[int, int, int]) -> None:
    spec = AttentionSpec(*heads, heads[2] ** -0.5, window, soft_cap)
    found, expected = both(batch(MIXED), spec, torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    spec = AttentionSpec(6, 2, 16, 0.25, 33)
    found, expected = both(batch(MIXED), spec, dtype)
    assert found.dtype == dtype
    error = float((found.float() - expected).norm() / expected.norm())
    assert error < (2e-3 if dtype == torch.float16 else 1e-2), error


@pytest.mark.parametrize("window", [None, 20])
def test_however_it_is_cut(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few requests in a call, chunks a few rows at a time."""
    monkeypatch.setattr(sdpa_backend, "GATHERED_TOKENS", 100)
    monkeypatch.setattr(sdpa_backend, "SCORES", 400)
    spec = AttentionSpec(6, 2, 10, 0.3, window)
    meta = batch(MIXED, 3)
    found, expected = both(meta, spec, torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    pieces = sdpa_backend._Step(meta, BLOCK).pieces(spec)
    assert len(pieces) >= 5
    assert max(len(list(piece.tiles(3))) for piece in pieces) >= 5
    for tile in (tile for piece in pieces for tile in piece.tiles(3)):
        assert tile.mask.numel() <= 400 or tile.rows.shape[1] == 1


def test_similar_requests_share_a_call() -> None:
    spec = AttentionSpec(6, 2, 10, 0.3)
    decodes = batch([(length, 1, 0) for length in (30, 35, 40, 45, 50, 200, 210)])
    assert [len(piece.rows) for piece in sdpa_backend._Step(decodes, BLOCK).pieces(spec)] == [2, 5]


def test_rows_of_a_table_may_be_named() -> None:
    spec = AttentionSpec(6, 2, 10, 0.3)
    meta = batch(MIXED)
    order = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(2))
    mixed_up = torch.empty_like(meta.block_table)
    mixed_up[order] = meta.block_table
    cache = torch.randn(
        SdpaBackend().kv_cache_shape(64, BLOCK, spec), generator=torch.Generator().manual_seed(3)
    )
    query = torch.randn(meta.num_tokens, 6, 10, generator=torch.Generator().manual_seed(4))
    expected = TorchBackend().attend(query, cache, meta, spec)
    named = replace(meta, block_table=mixed_up, table_rows=order.int())
    torch.testing.assert_close(
        SdpaBackend().attend(query, cache, named, spec), expected, atol=2e-6, rtol=1e-5
    )


def test_padding_alone() -> None:
    spec = AttentionSpec(6, 2, 10, 0.3)
    meta = AttentionMetadata.of_padding(5, 5, torch.device("cpu"))
    backend = SdpaBackend()
    cache = torch.zeros(backend.kv_cache_shape(2, BLOCK, spec))
    backend.store(torch.ones(5, 2, 10), torch.ones(5, 2, 10), cache, meta, spec)
    assert not cache.any()
    assert not backend.attend(torch.ones(5, 6, 10), cache, meta, spec).any()


def test_each_step_is_read_anew() -> None:
    """One backend serves the target and its draft model, turn by turn."""
    spec, backend, oracle = AttentionSpec(6, 2, 10, 0.3), SdpaBackend(), TorchBackend()
    cache = torch.randn(backend.kv_cache_shape(64, BLOCK, spec), generator=torch.Generator().manual_seed(3))
    first, second = batch(MIXED), batch([(9, 1, 0), (4, 20, 0)])
    for meta in (first, second, first, second):
        query = torch.randn(meta.num_tokens, 6, 10, generator=torch.Generator().manual_seed(4))
        expected = oracle.attend(query, cache, meta, spec)
        torch.testing.assert_close(backend.attend(query, cache, meta, spec), expected, atol=2e-6, rtol=1e-5)
