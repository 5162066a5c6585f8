"""Attention of long chunks, whole prompts and continued ones, against plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.attention.backend import AttentionMetadata, AttentionSpec  # noqa: E402
from octavo.attention.torch_backend import TorchBackend  # noqa: E402
from octavo.kernels.triton import prompt  # noqa: E402

BLOCK_SIZE = 8
# (rows, position of the first): whole, continued behind a part of a block, a whole tile, one row over
CHUNKS = [(37, 0), (20, 41), (16, 16), (17, 32)]


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_as_plain_torch(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "BLOCK_Q", 16)
    monkeypatch.setattr(prompt, "BLOCK_KV", 16)
    torch.manual_seed(2)
    spec = AttentionSpec(*heads, 16, 0.3)
    num_tokens = sum(rows for rows, _ in CHUNKS) + 1
    lengths = torch.tensor([*(rows + start for rows, start in CHUNKS), 1])
    table = torch.randperm(60)[: len(lengths) * 8].view(len(lengths), -1).to(torch.int32)
    positions = torch.cat(
        [*(torch.arange(start, start + rows) for rows, start in CHUNKS), torch.zeros(1)]
    ).long()
    starts = torch.tensor([0, *(rows for rows, _ in CHUNKS), 1]).cumsum(0).to(torch.int32)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), starts.diff())
    slots = table[owner, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    chunks = tuple((index, int(starts[index]), rows, start) for index, (rows, start) in enumerate(CHUNKS))
    meta = AttentionMetadata(
        starts, lengths, table, slots, positions, len(lengths), num_tokens, 37, 64, long_chunks=chunks
    )
    cache = torch.randn(60, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    cache[59] = float("nan")  # nobody's
    table[table == 59] = 58
    query = torch.randn(num_tokens, spec.num_heads, spec.head_dim)
    keys, values = torch.randn(2, num_tokens, spec.num_kv_heads, spec.head_dim)
    TorchBackend().store(keys, values, cache.transpose(2, 3), meta, spec)
    expected = TorchBackend().attend(query, cache.transpose(2, 3), meta, spec).view_as(query)
    out = torch.full_like(query, 7.0)
    qkv = torch.cat((query, keys, values), dim=1).flatten(1)
    qkv[-1] = float("nan")  # padding behind the last chunk may hold anything
    prompt.attend(query, qkv, cache, out, meta, spec, prompt.plan(meta))
    torch.testing.assert_close(out[:-1], expected[:-1], atol=2e-5, rtol=1e-4)
    assert (out[-1] == 7.0).all()  # a row of no chunk is left to others


def test_what_does_not_fit_is_refused() -> None:
    spec = AttentionSpec(2, 1, 16, 0.3)
    meta = AttentionMetadata.of_padding(4, 4, torch.device("cpu"))
    q, cache = torch.zeros(4, 2, 16), torch.zeros(1, 2, 1, BLOCK_SIZE, 16)
    empty = prompt.ChunkPlan(torch.zeros(0, 5, dtype=torch.int32), torch.zeros(0, 3, dtype=torch.int32))
    for wrong in (torch.zeros(4, 32), torch.zeros(3, 64), torch.zeros(64, 4).t()):
        with pytest.raises(ValueError, match=r"qkv"):
            prompt.attend(q, wrong, cache, torch.zeros_like(q), meta, spec, empty)
