"""What a GPU worker is built from, decided without a GPU: kernels, sizes of graphs, memory, refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.attention.torch_backend import TorchBackend
from octavo.config import EngineArgs, EngineConfig
from octavo.engine.setup import resolve
from octavo.errors import ConfigError, InsufficientMemoryError
from octavo.kernels import triton as triton_kernels
from octavo.platform import Gpu
from octavo.worker.build import choose_kernels, measure_draft_costs, measure_step_costs, plan_worker
from octavo.worker.cuda_graph import SHORT_ROWS, GraphSizes, graph_sizes
from octavo.worker.gpu_build import explained_out_of_memory, graph_sizes_of, why_not_triton
from tests.checkpoints import make_checkpoint

H200 = Gpu(0, "NVIDIA H200", (9, 0), 150 * 10**9)
needs_triton = pytest.mark.skipif(not triton_kernels.available(), reason="needs Triton")


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return resolve(EngineArgs(model=str(make_checkpoint(tmp_path / "m")), device="cpu"))


def on(config: EngineConfig, gpu: Gpu, **options: Any) -> EngineConfig:
    args = replace(config.args, **{k: v for k, v in options.items() if hasattr(config.args, k)})
    rest = {k: v for k, v in options.items() if k in ("attention_backend", "max_num_batched_tokens", "dtype")}
    platform = replace(config.platform, device="cuda", gpus=(gpu,))
    return replace(config, args=args, platform=platform, **{"max_num_batched_tokens": 8192, **rest})


@needs_triton
def test_a_gpu_takes_the_triton_kernels(config: EngineConfig) -> None:
    for asked in ("auto", "triton"):
        chosen = choose_kernels(on(config, H200, attention_backend=asked))
        assert (chosen.ops.name, chosen.backend.name, chosen.steps) == ("triton", "triton", None)
    reference = choose_kernels(on(config, H200, attention_backend="torch"))
    assert isinstance(reference.backend, TorchBackend)


def test_an_old_gpu_takes_plain_torch_and_says_why(config: EngineConfig) -> None:
    old = on(config, replace(H200, name="Tesla T4", capability=(7, 5)))
    if triton_kernels.available():
        assert "7.5" in (why_not_triton(old) or "")
    chosen = choose_kernels(old)
    assert isinstance(chosen.backend, TorchBackend)
    assert any("Triton" in note for note in chosen.notes)
    with pytest.raises(ConfigError, match="cannot be used"):
        choose_kernels(replace(old, attention_backend="triton"))


def test_triton_is_refused_on_a_cpu(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match="on a GPU only"):
        choose_kernels(replace(config, attention_backend="triton"))


@needs_triton
def test_deterministic_needs_short_steps(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=128"):
        choose_kernels(on(config, H200, deterministic=True))
    with pytest.raises(ConfigError, match="float16"):
        choose_kernels(on(config, H200, deterministic=True, dtype="float16", max_num_batched_tokens=128))
    assert choose_kernels(on(config, H200, deterministic=True, max_num_batched_tokens=128)).steps is None


def test_graphs_are_few_and_cover_every_small_step(config: EngineConfig) -> None:
    sizes = graph_sizes_of(on(config, H200))
    assert len(sizes.short) + len(sizes.chunks) <= 45
    for rows in range(1, 513):
        padded = sizes.padded(rows)
        assert padded is not None
        assert rows <= padded <= max(rows + 8, rows * 5 / 4)
        with_chunk = sizes.padded(rows, SHORT_ROWS + 1)
        assert with_chunk is not None
        assert rows <= with_chunk
    assert sizes.padded(513) is None
    assert graph_sizes_of(on(config, H200, max_num_batched_tokens=100)).short[-1] == 100
    assert graph_sizes(512)[-1] == 512
    assert GraphSizes.of([1, 4]).chunks == ()


def test_a_draft_model_of_few_requests_has_graphs_for_their_prompts() -> None:
    sizes = GraphSizes.up_to(32).with_chunks(512)
    assert sizes.short[-1] == 32
    assert sizes.padded(33) is None
    assert [sizes.padded(rows, rows) for rows in (17, 33, 300, 512, 513)] == [32, 64, 384, 512, None]


def test_costs_of_draft_passes_are_taken_of_warm_kernels_and_of_catching_up() -> None:
    """A first pass of a size takes a hundred times as long, and 1,024 rows are not 1,024 requests."""
    timed: Counter[int] = Counter()

    def time_rows(rows: int) -> float:
        timed[rows] += 1
        return 0.1 if timed[rows] == 1 else 1e-3 + rows * 1e-6

    model = SimpleNamespace(catch_up_rows=2048, time_rows=time_rows)
    runner: Any = SimpleNamespace(
        draft_model=model, state=SimpleNamespace(device=torch.device("cuda")), time_rows=time_rows
    )
    request = SimpleNamespace(
        draft=SimpleNamespace(weights=1 << 30, block_bytes=1 << 16), block_size=16, weights=1 << 33,
        block_bytes=1 << 17,
    )  # fmt: skip
    plan: Any = SimpleNamespace(request=request)
    found = measure_draft_costs(runner, plan)
    assert found is not None
    assert dict(found[0]) == {rows: 1e-3 + rows * 1e-6 for rows in timed}
    assert max(timed) == 2048
    assert {512, 1024} <= timed.keys()
    timed.clear()
    assert dict(measure_step_costs(runner, plan)[0]) == {rows: 1e-3 + rows * 1e-6 for rows in timed}


@needs_triton
def test_the_plan_counts_what_a_gpu_holds_beside_the_cache(config: EngineConfig) -> None:
    few, many = (
        plan_worker(on(config, H200, max_num_batched_tokens=rows), choose_kernels(on(config, H200)))
        for rows in (512, 8192)
    )
    assert few.request.budget == int(H200.memory * 0.9)
    assert 0 < few.request.activations < many.request.activations


def test_out_of_memory_at_the_start_names_the_knobs() -> None:
    with pytest.raises(InsufficientMemoryError, match="gpu_memory_utilization"), explained_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
