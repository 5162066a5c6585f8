"""What a GPU worker is built from, decided without a GPU: kernels, sizes of graphs, memory, refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.attention.backend import AttentionMetadata
from octavo.attention.sdpa_backend import SdpaBackend
from octavo.attention.torch_backend import TorchBackend
from octavo.config import EngineArgs, EngineConfig
from octavo.engine.setup import resolve
from octavo.errors import ConfigError, InsufficientMemoryError
from octavo.kernels import triton as triton_kernels
from octavo.platform import Gpu
from octavo.sampling.device_draw import DeviceDraw
from octavo.worker.build import (
    choose_kernels,
    measure_draft_costs,
    measure_step_costs,
    padded_rows,
    plan_worker,
)
from octavo.worker.cuda_graph import CudaGraphs, StepBuffers
from octavo.worker.gpu_build import (
    draft_graph_sizes_of,
    explained_out_of_memory,
    gpu_draft_ops,
    graph_sizes_of,
    why_not_triton,
)
from octavo.worker.graph_sizes import SHORT_ROWS, GraphKey, GraphSizes, graph_sizes
from tests.checkpoints import make_checkpoint

H200 = Gpu(0, "NVIDIA H200", (9, 0), 150 * 10**9)
T4 = Gpu(0, "Tesla T4", (7, 5), 16 * 10**9)
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
    assert type(reference.backend) is TorchBackend
    by_torch = choose_kernels(on(config, H200, attention_backend="sdpa"))
    assert (by_torch.ops.name, by_torch.backend.name, by_torch.notes) == ("torch", "sdpa", ())
    assert isinstance(by_torch.draw, DeviceDraw)


def test_an_old_gpu_takes_plain_torch_and_says_why(config: EngineConfig) -> None:
    old = on(config, T4)
    if triton_kernels.available():
        assert "7.5" in (why_not_triton(old) or "")
    chosen = choose_kernels(old)
    assert isinstance(chosen.backend, SdpaBackend)
    assert isinstance(chosen.draw, DeviceDraw)
    assert any("Triton" in note for note in chosen.notes)
    with pytest.raises(ConfigError, match="device='cpu'"):
        choose_kernels(on(config, T4, deterministic=True))
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
    sizes = GraphSizes.of_a_draft_model(32, catch_up=8192)
    assert sizes.short[-1] == 32
    assert sizes.padded(33) is None
    assert [sizes.padded(rows) for rows in (1, 2, 3, 16, 17)] == [1, 2, 4, 16, 32]
    assert [sizes.padded(rows, rows) for rows in (17, 514, 641, 1280, 1281)] == [640, 640, 1280, 1280, None]
    assert GraphSizes.of_a_draft_model(32, catch_up=192).chunks == (192,)


@pytest.mark.parametrize("seqs", [1, 3, 16, 100, 256])
def test_graphs_are_few_with_a_draft_model_too(config: EngineConfig, seqs: int) -> None:
    draft: Any = SimpleNamespace(model=config.model)
    auto: Any = SimpleNamespace(num_speculative_tokens=None)
    both = replace(on(config, H200), draft=draft, speculative=auto, max_num_seqs=seqs)
    sizes, passes = graph_sizes_of(both), draft_graph_sizes_of(both)
    assert sizes.shared
    # and one row of a draft model has two graphs where contexts may be long
    assert len(sizes.keys) + len(passes.keys) + 1 <= 45
    assert passes.padded(min(512, 2 * seqs)) == min(512, 2 * seqs)  # the first pass of all
    assert sizes.padded(512, SHORT_ROWS + 1) == 512
    # a prompt of 512 tokens, its first new token, and the row of padding that drafting takes
    assert passes.padded(514, SHORT_ROWS + 1) in (514, 640)
    for rows in range(1, 513):
        decoding, verifying = sizes.graph_for(rows, 1), sizes.graph_for(rows, 3)
        assert decoding is not None
        assert verifying is not None
        assert decoding.verifies == (rows > seqs)
        assert verifying.verifies
        for key in (decoding, verifying):
            assert rows <= key.rows <= max(8, 2 * rows)
    assert sizes.padded(513) is None


def test_steps_that_verify_have_graphs_that_pack_rows_together(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    auto: Any = SimpleNamespace(num_speculative_tokens=None)
    sizes = graph_sizes_of(replace(on(config, H200), speculative=auto, max_num_seqs=64))
    assert sizes.most_decoded == 8 // (config.model.num_heads // config.model.num_kv_heads) == 2
    table = torch.zeros(64, 6, dtype=torch.int32)
    buffers = StepBuffers.allocate(512, 64, table, tile_rows=8, usual_query_len=4)
    seen: dict[GraphKey, int | None] = {}
    graphs = CudaGraphs(lambda ids, step: ids, sizes, buffers, 100)
    for key in graphs.keys:

        def forward(ids: torch.Tensor, step: AttentionMetadata, key: GraphKey = key) -> torch.Tensor:
            seen[key] = step.usual_query_len
            return ids

        graphs._forward = forward
        graphs._work_of(key)()
    assert set(sizes.short) == {key.rows for key, usual in seen.items() if usual == 1}
    assert all(usual == 4 for key, usual in seen.items() if key.verifies or key.has_chunk or key.shares)
    assert not graph_sizes_of(on(config, H200)).verify


@pytest.mark.parametrize("longest", [100, 4096, 20_000])
def test_one_row_has_a_graph_of_its_own_for_long_contexts(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    buffers = StepBuffers.allocate(8, 4, torch.zeros(4, 6, dtype=torch.int32))
    seen: list[tuple[int, int]] = []

    def forward(input_ids: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        seen.append((metadata.num_tokens, metadata.max_seq_len))
        return input_ids

    sizes = GraphSizes((1, 2), ())
    graphs = CudaGraphs(forward, sizes, buffers, longest, one_row_context=4096)
    assert graphs.one_row(min(longest, 4096)) == GraphKey(1, False)
    assert graphs.one_row(longest + 15) in graphs.keys  # a bound in whole blocks
    assert len(graphs.keys) == (3 if longest > 4096 else 2)
    assert graphs.one_row(4097).is_long == (longest > 4096)
    for key in graphs.keys:
        graphs._work_of(key)()
    assert sorted(set(seen)) == sorted({(1, min(longest, 4096)), (1, longest), (2, longest)})
    alike = CudaGraphs(forward, sizes, buffers, longest)
    assert alike.one_row(longest) == alike.one_row(1) == GraphKey(1, False)


@needs_triton
def test_only_a_draft_model_runs_as_one_kernel(config: EngineConfig) -> None:
    """Its bits differ from those of larger steps: no text may depend on them."""
    from octavo.models.gpu_ops import GpuOps

    target = choose_kernels(on(config, H200)).ops
    ops = gpu_draft_ops(on(config, H200), target)
    assert isinstance(target, GpuOps)
    assert isinstance(ops, GpuOps)
    assert ops is not target
    assert (target.runs_as_one, ops.runs_as_one) == (False, True)
    fixed = on(config, H200, deterministic=True, max_num_batched_tokens=128)
    same = choose_kernels(fixed).ops
    assert gpu_draft_ops(fixed, same) is same
    assert isinstance(same, GpuOps)
    assert not same.runs_as_one


def test_costs_of_draft_passes_are_taken_of_warm_kernels_and_of_catching_up() -> None:
    """A first pass of a size takes a hundred times as long, and 1,024 rows are not 1,024 requests."""
    timed: Counter[int] = Counter()

    def time_rows(rows: int) -> float:
        timed[rows] += 1
        return 0.1 if timed[rows] == 1 else 1e-3 + rows * 1e-6

    model = SimpleNamespace(catch_up_rows=2048, time_rows=time_rows)
    runner: Any = SimpleNamespace(
        draft_model=model, state=SimpleNamespace(device=torch.device("cuda")), time_rows=time_rows,
        graphs=None,
    )  # fmt: skip
    request = SimpleNamespace(
        draft=SimpleNamespace(weights=1 << 30, block_bytes=1 << 16), block_size=16, weights=1 << 33,
        block_bytes=1 << 17,
    )  # fmt: skip
    plan: Any = SimpleNamespace(request=request)
    found = measure_draft_costs(runner, plan)
    assert found is not None
    assert dict(found[0]) == {rows: 1e-3 + rows * 1e-6 for rows in timed}
    assert max(timed) == 2048
    assert {512, 640, 1024} <= timed.keys()
    timed.clear()
    assert dict(measure_step_costs(runner, plan)[0]) == {rows: 1e-3 + rows * 1e-6 for rows in timed}
    timed.clear()
    runner.graphs = SimpleNamespace(sizes=GraphSizes((1, 2, 8), (64,), (16,), (4, 8, 32), 2))
    table, _ = measure_step_costs(runner, plan)
    assert [rows for rows, _ in table] == list(padded_rows(runner)) == [1, 2, 4, 8, 32]


@needs_triton
def test_the_plan_counts_what_a_gpu_holds_beside_the_cache(config: EngineConfig) -> None:
    few, many = (
        plan_worker(on(config, H200, max_num_batched_tokens=rows), choose_kernels(on(config, H200)))
        for rows in (512, 8192)
    )
    assert few.request.budget == int(H200.memory * 0.9)
    assert 0 < few.request.activations < many.request.activations


def test_the_plan_of_torch_alone_counts_its_scratch(config: EngineConfig) -> None:
    few, many = (
        plan_worker(on(config, T4, max_num_batched_tokens=rows), choose_kernels(on(config, T4)))
        for rows in (512, 8192)
    )
    assert few.request.budget == int(T4.memory * 0.9)
    assert 700 << 20 < few.request.activations < many.request.activations < 2 << 30


def test_out_of_memory_at_the_start_names_the_knobs() -> None:
    with pytest.raises(InsufficientMemoryError, match="gpu_memory_utilization"), explained_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
