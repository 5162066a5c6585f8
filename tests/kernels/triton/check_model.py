"""Whole models by the Triton kernels against plain torch: paged attention, both decoder paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.attention.backend import ForwardContext  # noqa: E402
from octavo.attention.torch_backend import TorchBackend  # noqa: E402
from octavo.attention.triton_backend import TritonBackend  # noqa: E402
from octavo.kernels.triton import attention  # noqa: E402
from octavo.layers.ops import TorchOps  # noqa: E402
from octavo.models.config import ModelConfig  # noqa: E402
from octavo.models.gpu_ops import GpuOps  # noqa: E402
from octavo.models.registry import build_model  # noqa: E402
from octavo.models.weights import load_weights  # noqa: E402
from octavo.sampling.gpu_draw import GpuDraw  # noqa: E402
from octavo.worker.cuda_graph import StepBuffers  # noqa: E402
from tests.checkpoints import make_checkpoint  # noqa: E402
from tests.paged import PagedRun  # noqa: E402

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
# name -> architecture, config, whether few rows take the five-kernel path
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama odd": ("LlamaForCausalLM", {"num_hidden_layers": 2}, False),
    "llama biases": (
        "LlamaForCausalLM",
        {**SMALL, "head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        True,
    ),
    "mistral window": ("MistralForCausalLM", {**SMALL, "sliding_window": 37, "head_dim": 16}, True),
    "qwen3": ("Qwen3ForCausalLM", {**SMALL, "head_dim": 32, "partial_rotary_factor": 0.5}, True),
}


class Layerwise(GpuOps):
    """The same kernels, layer by layer."""

    def fuse(self, parts: Any, backend: Any) -> None:
        return None


@pytest.fixture(autouse=True)
def _short_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups within short contexts."""
    monkeypatch.setattr(attention, "GROUP", 32)


def run(folder: Path, ops: Any, backend: Any) -> PagedRun:
    model = build_model(ModelConfig.from_folder(folder), torch.float32, torch.device("cpu"), ops, backend)
    load_weights(model, str(folder))
    return PagedRun(model, backend, 3, 90)


@pytest.mark.parametrize("name", list(CASES))
def test_as_plain_torch(name: str, tmp_path: Path) -> None:
    architecture, options, few = CASES[name]
    folder = make_checkpoint(tmp_path / "m", architecture, **options)
    ops = GpuOps((torch.float32,))
    expected, ours = run(folder, TorchOps(), TorchBackend()), run(folder, ops, TritonBackend())
    assert ops.decoder is not None
    assert (ops.decoder.few_rows > 0) == few
    steps: list[tuple[list[tuple[int, list[int]]], int]] = [
        ([(0, list(range(3, 73)))], 0),  # more rows than the five-kernel path takes
        ([(1, list(range(5, 45))), (0, [5])], 2),  # a chunk, a decode row and padding
        ([(0, [7]), (1, [9, 10, 11])], 3),  # decode and verify
        ([(1, [1])], 0),
    ]
    for rows, padding in steps:
        torch.testing.assert_close(
            ours.step(rows, padding), expected.step(rows, padding), atol=5e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["llama odd", "qwen3", "mistral window"])
def test_wanted_rows_alone(name: str, tmp_path: Path) -> None:
    architecture, options, _ = CASES[name]
    folder = make_checkpoint(tmp_path / "m", architecture, **{**options, "num_hidden_layers": 2})
    expected = run(folder, TorchOps(), TorchBackend())
    ours = run(folder, GpuOps((torch.float32,)), TritonBackend())
    steps: list[tuple[list[tuple[int, list[int]]], list[int]]] = [
        ([(0, list(range(3, 70))), (1, list(range(9)))], [66, 75]),
        ([(2, list(range(5, 75)))], []),  # nothing is drawn
        ([(1, [8]), (2, [7, 3, 4])], [0, 2]),  # few rows
    ]
    for rows, wanted in steps:
        torch.testing.assert_close(
            ours.step(rows, 2, wanted), expected.step(rows)[wanted], atol=5e-4, rtol=1e-4
        )


def test_products_of_large_steps_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM", num_hidden_layers=1)
    ops = GpuOps((torch.float32,))
    run(folder, ops, TritonBackend())
    assert ops.decoder is not None
    shapes: dict[str, list[tuple[int, int]]] = {"mm": [], "addmm": []}

    def noted(name: str, place: int) -> Any:
        function = getattr(torch, name)

        def call(*args: torch.Tensor, out: torch.Tensor) -> None:
            shapes[name].append((len(args[place]), args[place + 1].shape[1]))
            function(*args, out=out)

        return call

    monkeypatch.setattr(torch, "mm", noted("mm", 0))
    monkeypatch.setattr(torch, "addmm", noted("addmm", 1))
    ops.decoder.load_products(512)
    assert not shapes["mm"]
    ops.decoder.load_products(2600)
    sizes = [*range(640, 2049, 128), 2304, 2560]
    assert sorted({rows for rows, _ in shapes["mm"]}) == sizes
    assert len(shapes["mm"]) == len(shapes["addmm"]) == 2 * len(sizes)
    assert {width for _, width in shapes["addmm"]} == {36}  # o and down, into the stream


def test_layer_by_layer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM", num_hidden_layers=1)
    expected = run(folder, TorchOps(), TorchBackend())
    ours = run(folder, Layerwise((torch.float32,)), TritonBackend())
    for rows in ([(0, list(range(40)))], [(0, [3]), (1, [4, 5])]):
        torch.testing.assert_close(ours.step(rows), expected.step(rows), atol=5e-4, rtol=1e-4)


def test_wide_gate_up_in_both_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.kernels.triton import wide_gate_up
    from octavo.kernels.triton.launch import next_power_of_2

    asked: list[int] = []

    def choose(weight: torch.Tensor, rows: int) -> wide_gate_up.WideTiling | None:
        asked.append(rows)
        return wide_gate_up.WideTiling(next_power_of_2(rows), 32, 0, 2, 4) if rows >= 17 else None

    monkeypatch.setattr(wide_gate_up, "choose_tiling", choose)
    options = {**SMALL, "num_hidden_layers": 1, "head_dim": 16, "intermediate_size": 96, "mlp_bias": True}
    folder = make_checkpoint(tmp_path / "m", "LlamaForCausalLM", **options)
    expected, ours = (
        run(folder, TorchOps(), TorchBackend()),
        run(folder, GpuOps((torch.float32,)), TritonBackend()),
    )
    for rows in ([(0, list(range(3, 73)))], [(1, list(range(5, 24)))], [(0, [7]), (1, [9])]):
        torch.testing.assert_close(ours.step(rows), expected.step(rows), atol=5e-4, rtol=1e-4)
    assert asked == [70, 19, 2]


def test_programs_that_share_a_row_fold_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.kernels.triton import query_tiles

    folder = make_checkpoint(tmp_path / "m", "LlamaForCausalLM", num_hidden_layers=1)
    shared, alone, lonely = (run(folder, GpuOps((torch.float32,)), TritonBackend()) for _ in range(3))
    shared.step([(0, list(range(75)))])
    for each in (alone, lonely):  # go on from there
        each.num_computed = list(shared.num_computed)
        each.kv_caches = [cache.clone() for cache in shared.kv_caches]
    together = shared.step([(0, [1])])
    monkeypatch.setattr(attention, "FULL", 1)  # each tile alone, though several programs might share it
    assert torch.equal(together, lonely.step([(0, [1])]))
    monkeypatch.setattr(query_tiles, "SHARED_ROWS", 0)
    assert torch.equal(together, alone.step([(0, [1])]))


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where the host would have to wait for a GPU, or a shape would depend on what it holds."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in self.FORBIDDEN or masks:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["qwen3", "mistral window"])
def test_nothing_captured_waits_for_the_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards of few and of many rows, the head, and each kind of draw."""

    def refuse(tensor: torch.Tensor) -> None:
        raise AssertionError("a tensor is read on the host")

    architecture, options, _ = CASES[name]
    folder = make_checkpoint(tmp_path / "m", architecture, **{**options, "num_hidden_layers": 1})
    backend = TritonBackend()
    model = build_model(
        ModelConfig.from_folder(folder), torch.float32, torch.device("cpu"), GpuOps((torch.float32,)), backend
    )
    load_weights(model, str(folder))
    table = torch.arange(8, dtype=torch.int32).expand(8, 8).contiguous()
    buffers = StepBuffers.allocate(80, 8, table)
    buffers.positions[:] = buffers.slot_mapping[:] = torch.arange(80)
    caches = [torch.zeros(backend.kv_cache_shape(8, 16, spec)) for spec in model.attention_specs]
    draw = GpuDraw()
    with NoWaiting():  # type: ignore[no-untyped-call]
        for rows, longest in ((4, 4), (70, 70)):
            buffers.query_start_loc[1:] = rows  # one request
            metadata = buffers.metadata(rows, rows, longest, 100)
            context = ForwardContext(metadata, caches)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "tolist", refuse)
                hidden = model.forward(buffers.input_ids[:rows], metadata.positions, context)
                draw.argmax(model.logits(hidden[:4]))


def test_the_mode_notices() -> None:
    for wait in (lambda x: x.item(), lambda x: bool(x.any()), lambda x: x[x > 0]):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():  # type: ignore[no-untyped-call]
            wait(torch.ones(1))
