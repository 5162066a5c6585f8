"""The C kernels as a model's ops: layer by layer and fused, against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec
from octavo.attention.torch_backend import TorchBackend
from octavo.errors import ConfigError
from octavo.layers.ops import Kernels, TorchOps
from octavo.models.config import ModelConfig
from octavo.models.decoder import CausalLM
from octavo.models.registry import build_model
from octavo.models.weights import load_weights
from tests.checkpoints import make_checkpoint
from tests.paged import PagedRun

library = pytest.importorskip("octavo.kernels.cpu.library")
try:
    library.load()
except library.CpuLibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

from octavo.kernels.cpu import attention as cpu_attention  # noqa: E402
from octavo.kernels.cpu import onednn  # noqa: E402
from octavo.models.cpu_ops import CpuOps, OneDnnOps, choose_ops  # noqa: E402

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama tied biases": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral window": ("MistralForCausalLM", {"sliding_window": 7, "head_dim": 10}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True, "partial_rotary_factor": 0.8}),
}


class KernelBackend:
    """The kernels' own paged attention."""

    name = "cpu"

    def kv_cache_shape(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> tuple[int, ...]:
        return cpu_attention.kv_cache_shape(num_blocks, block_size, spec)

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> None:
        cpu_attention.store(key, value, kv_cache, metadata, spec)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        return cpu_attention.attend(query, kv_cache, metadata, spec)


class UnfusedOps(CpuOps):
    """Layer by layer, whatever the backend."""

    def fuse(self, parts: Any, backend: AttentionBackend) -> None:
        return None


def load(folder: Path, dtype: torch.dtype, ops: Kernels, backend: AttentionBackend) -> CausalLM:
    model = build_model(ModelConfig.from_folder(folder), dtype, torch.device("cpu"), ops, backend)
    load_weights(model, folder)
    return model


def mixed_logits(model: CausalLM, backend: AttentionBackend) -> torch.Tensor:
    """Two requests, chunks, decode rows and padding."""
    ids = torch.randint(0, 131, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    run = PagedRun(model, backend, num_requests=2, max_len=48)
    rows = [run.step([(0, ids[:20])], padding=2)]
    rows += [run.step([(1, ids[20 + i : 27 + i]), (0, ids[40 + i // 7 : 41 + i // 7])]) for i in (0, 7, 14)]
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_plain_torch(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    folder = make_checkpoint(tmp_path, architecture, **overrides)
    oracle, kernels = TorchBackend(), KernelBackend()
    expected = mixed_logits(load(folder, torch.float32, TorchOps(), oracle), oracle)
    most = 1e-4 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    for ops, backend, is_fused in (
        (CpuOps(dtype), oracle, False),
        (UnfusedOps(dtype), kernels, False),
        (CpuOps(dtype), kernels, True),
    ):
        model = load(folder, dtype, ops, backend)
        assert model.is_fused == is_fused
        logits = mixed_logits(model, backend)
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() < most, (ops, backend)


@pytest.mark.parametrize("ops", [CpuOps, UnfusedOps])
def test_wanted_rows_alone(ops: type[CpuOps], tmp_path: Path) -> None:
    """The same bits as among all rows; the others leave their keys and values nevertheless."""
    backend = KernelBackend()
    model = load(make_checkpoint(tmp_path, "Qwen3ForCausalLM"), torch.bfloat16, ops(torch.bfloat16), backend)
    every, some = (PagedRun(model, backend, num_requests=2, max_len=120) for _ in range(2))
    steps: list[tuple[list[tuple[int, list[int]]], list[int]]] = [
        ([(0, list(range(9, 79))), (1, list(range(3, 13)))], [69, 79]),
        ([(0, list(range(30))), (1, list(range(20)))], []),  # nothing is drawn
        ([(0, [5]), (1, list(range(30))), (0, [6])], [0, 3, 30, 31]),
        ([(0, [7]), (1, [8])], [0, 1]),
    ]
    for rows, wanted in steps:
        expected = every.step(rows)
        assert torch.equal(some.step(rows, 2, wanted), expected[wanted])
    if model.is_fused:
        for wrong in ([1, 0], [0, 0], [0, 2], [-1]):
            with pytest.raises(ValueError, match="ascend"):
                some.step([(0, [1]), (1, [1])], wanted=wrong)


@pytest.mark.skipif(not onednn.available(), reason="torch has no oneDNN bf16 products here")
@pytest.mark.parametrize("case", CASES)
def test_onednn_linears(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    folder = make_checkpoint(tmp_path, architecture, **overrides)
    oracle, kernels = TorchBackend(), KernelBackend()
    expected = mixed_logits(load(folder, torch.float32, TorchOps(), oracle), oracle)
    model = load(folder, torch.bfloat16, OneDnnOps(torch.bfloat16), kernels)
    assert not model.is_fused
    assert (mixed_logits(model, kernels) - expected).abs().max() < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("isa", library.available_isas())
def test_every_level_loads_and_runs(isa: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    ops, choice = choose_ops(torch.float32, "octavo", isa)
    assert (ops.name, choice.name) == ("octavo", "octavo")
    oracle, kernels = TorchBackend(), KernelBackend()
    expected = mixed_logits(load(folder, torch.float32, TorchOps(), oracle), oracle)
    logits = mixed_logits(load(folder, torch.float32, ops, kernels), kernels)
    assert (logits - expected).abs().max() < 1e-4


def test_float16_runs_in_plain_torch() -> None:
    ops, choice = choose_ops(torch.float16)
    assert isinstance(ops, TorchOps)
    assert "float16" in choice.reason


def test_half_precision_is_not_for_these_kernels() -> None:
    with pytest.raises(ConfigError, match="float16"):
        CpuOps(torch.float16)
