"""On the card: long chunks by the copy engine, and prefixes read once, against plain torch in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.attention.backend import AttentionSpec
from octavo.attention.torch_backend import TorchBackend
from octavo.kernels import triton as triton_kernels
from octavo.worker.cuda_graph import StepBuffers
from octavo.worker.prefix_groups import PrefixGroups

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not triton_kernels.available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)
if torch.cuda.get_device_capability()[0] < 9:
    pytest.skip("the copy engine for tiles came with compute capability 9.0", allow_module_level=True)

from octavo.attention.triton_backend import TritonBackend  # noqa: E402
from octavo.kernels.triton import attention, prompt, shared  # noqa: E402
from tests.gpu.test_kernels import attention_case, on_device  # noqa: E402
from tests.gpu_report import Record, kind_of  # noqa: E402

DEVICE = torch.device("cuda")
ORACLE = TorchBackend()


@pytest.mark.parametrize(
    "spec", [AttentionSpec(32, 8, 128, 128**-0.5), AttentionSpec(14, 2, 64, 0.125)], ids=["8B", "head 64"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_chunks(spec: AttentionSpec, dtype: torch.dtype, record: Record) -> None:
    torch.manual_seed(5)
    contexts, rows = [1000, 2700, 300, 1999], [1000, 700, 300, 256]  # two whole, two continued
    meta, total = attention_case(spec, contexts, rows, 500, 0)
    meta = on_device(meta)
    width = spec.num_heads + 2 * spec.num_kv_heads
    cache = torch.randn(500, 2, spec.num_kv_heads, 16, spec.head_dim, device=DEVICE).to(dtype)
    qkv = torch.randn(total, width, spec.head_dim, device=DEVICE).to(dtype)
    query, keys, values = torch.split(qkv, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    TritonBackend().store(keys, values, cache, meta, spec)
    first = np.cumsum([0, *rows]).tolist()
    meta = replace(
        meta, long_chunks=tuple((i, first[i], rows[i], contexts[i] - rows[i]) for i in range(len(rows)))
    )
    assert prompt.serves(spec, qkv)
    out = torch.full_like(query, float("nan")).contiguous()
    prompt.attend(query.contiguous(), qkv.flatten(1), cache, out, meta, spec, prompt.plan(meta))
    expected = ORACLE.attend(query.float(), cache.float().transpose(2, 3), meta, spec)
    error = float((out.flatten(1).float() - expected).norm() / expected.norm())
    record(f"attention of long chunks, {kind_of(dtype)}", error)
    assert error < (6e-3 if dtype == torch.bfloat16 else 1e-3), error


@pytest.mark.parametrize("heads", [(32, 8), (16, 8), (12, 12)])
def test_shared_prefixes(heads: tuple[int, int], record: Record) -> None:
    torch.manual_seed(6)
    spec = AttentionSpec(*heads, 128, 128**-0.5)
    contexts, rows = [1100 + 7 * i for i in range(30)], [1 + i % 3 for i in range(30)]
    meta, total = attention_case(spec, contexts, rows, 2600, 0)
    tile_rows = shared.tile_rows(heads[0] // heads[1])
    groups = PrefixGroups(30, meta.block_table.shape[1], 16, tile_rows, attention.GROUP)
    for slot in range(30):
        owner = slot % 3  # two groups of ten share with their first, the third with nobody
        if owner < 2:
            meta.block_table[slot, : 64 - 20 * owner] = meta.block_table[owner, : 64 - 20 * owner]
        groups.enter(slot, meta.block_table[slot].tolist())
    first_positions = np.array(contexts, dtype=np.int32) - np.array(rows, dtype=np.int32)
    found = groups.find(np.arange(30, dtype=np.int32), np.array(rows, dtype=np.int32), first_positions)
    assert found is not None
    assert found.lengths.tolist() == [(1024, 640, 0)[slot % 3] for slot in range(30)]
    meta = on_device(meta)
    cache = torch.randn(2600, 2, spec.num_kv_heads, 16, 128, device=DEVICE).bfloat16()
    query = torch.randn(total, spec.num_heads, 128, device=DEVICE).bfloat16() * 2
    expected = ORACLE.attend(query.float(), cache.float().transpose(2, 3), meta, spec)
    buffers = StepBuffers.allocate(total, 30, meta.block_table, tile_rows)
    buffers.share(found)
    sharing = buffers.metadata(total, 30, 3, meta.max_seq_len, shares=True)
    got = TritonBackend().attend(query, cache, replace(meta, shared=sharing.shared), spec)
    error = float((got.float() - expected).norm() / expected.norm())
    record("attention with shared prefixes, bfloat16", error)
    assert error < 6e-3
