"""The oracle itself against attention written out for one row, over ragged mixed batches."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.attention.torch_backend import TorchBackend

BLOCK = 4


def one_row(
    query: torch.Tensor,  # [num_heads, head_dim]
    keys: torch.Tensor,  # [length, num_kv_heads, head_dim], all a row may see
    values: torch.Tensor,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of the last position, head by head and in float64."""
    if spec.sliding_window is not None:
        keys, values = keys[-spec.sliding_window :], values[-spec.sliding_window :]
    outputs = []
    for head in range(spec.num_heads):
        kv_head = head * spec.num_kv_heads // spec.num_heads
        scores = (keys[:, kv_head].double() @ query[head].double()) * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        outputs.append(scores.softmax(0) @ values[:, kv_head].double())
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_batch(window: int | None, soft_cap: float | None, dtype: torch.dtype) -> None:
    spec = AttentionSpec(6, 2, 10, 1 / math.sqrt(10), window, soft_cap)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    # (computed before, rows of this step, padding rows): chunk, decode, verify with padding, empty
    requests = [(0, 9, 0), (11, 1, 0), (6, 3, 2), (5, 0, 3), (3, 7, 0)]
    history = [(random(done + new, 2, 10), random(done + new, 2, 10)) for done, new, _ in requests]
    table = torch.randperm(40, generator=generator).view(len(requests), -1).int()
    backend = TorchBackend()
    cache = torch.full(backend.kv_cache_shape(40, BLOCK, spec), float("nan"), dtype=dtype)
    wide_table = torch.cat([table, table.flip(0)], dim=1)[:, : table.shape[1]]  # a stride beyond its width

    def metadata(rows: list[tuple[int, int, int]]) -> AttentionMetadata:
        starts, seq_lens, slots, positions = [0], [], [], []
        for request, (done, new, padding) in enumerate(rows):
            for position in range(done, done + new):
                slots.append(int(table[request, position // BLOCK]) * BLOCK + position % BLOCK)
                positions.append(position)
            slots += [-1] * padding
            positions += [-1] * padding
            starts.append(len(slots))
            seq_lens.append(done + new)
        return AttentionMetadata(
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(seq_lens, dtype=torch.int32),
            wide_table,
            torch.tensor(slots),
            torch.tensor(positions),
            len(rows),
            len(slots),
            16,
            64,
        )

    before = [(0, done, 0) for done, _, _ in requests]
    for step in (before, requests):
        rows_k, rows_v = [], []
        for (done, new, padding), (keys, values) in zip(step, history, strict=True):
            chosen = slice(done, done + new)
            rows_k += [keys[chosen], random(padding, 2, 10)]
            rows_v += [values[chosen], random(padding, 2, 10)]
        backend.store(torch.cat(rows_k), torch.cat(rows_v), cache, metadata(step), spec)
    meta = metadata(requests)
    query = random(meta.num_tokens, 6, 10)
    output = backend.attend(query, cache, meta, spec)
    assert output.shape == (meta.num_tokens, 60)
    assert output.dtype == dtype

    row = 0
    for (done, new, padding), (keys, values) in zip(requests, history, strict=True):
        for position in range(done, done + new):
            expected = one_row(query[row], keys[: position + 1], values[: position + 1], spec)
            torch.testing.assert_close(
                output[row].double(),
                expected.flatten(),
                atol=1e-5 if dtype == torch.float32 else 2e-2,
                rtol=0,
            )
            row += 1
        assert not output[row : row + padding].any()
        row += padding


def test_padding_stores_nothing() -> None:
    spec = AttentionSpec(1, 1, 2, 1.0)
    backend = TorchBackend()
    cache = torch.zeros(backend.kv_cache_shape(2, BLOCK, spec))
    meta = AttentionMetadata(
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([-1, -1]),
        torch.tensor([-1, -1]),
        1,
        2,
        2,
        2,
    )
    backend.store(torch.ones(2, 1, 2), torch.ones(2, 1, 2), cache, meta, spec)
    assert not cache.any()
