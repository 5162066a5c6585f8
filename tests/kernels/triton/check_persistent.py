"""All layers in one kernel against plain torch, and which models it serves."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from octavo.attention.torch_backend import TorchBackend  # noqa: E402
from octavo.attention.triton_backend import TritonBackend  # noqa: E402
from octavo.kernels.triton import persistent, persistent_attention, persistent_kernel  # noqa: E402
from octavo.kernels.triton.persistent_products import (  # noqa: E402
    normed_row,
    plain_row,
    row_tiles,
    times,
    weight_tiles,
)
from octavo.layers.ops import TorchOps  # noqa: E402
from octavo.models.gpu_ops import GpuOps  # noqa: E402
from tests.checkpoints import make_checkpoint  # noqa: E402
from tests.kernels.triton.check_model import SMALL, run  # noqa: E402
from tests.kernels.triton.turns import Turns  # noqa: E402

# name -> architecture, config
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": (
        "Qwen3ForCausalLM",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96},
    ),
    "llama biases": (
        "LlamaForCausalLM",
        {**SMALL, "head_dim": 16, "attention_bias": True, "mlp_bias": True, "intermediate_size": 96},
    ),
    "mistral window": (
        "MistralForCausalLM",
        {**SMALL, "sliding_window": 37, "head_dim": 16, "intermediate_size": 96},
    ),
}


@pytest.fixture(autouse=True)
def _short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of keys within short contexts."""
    monkeypatch.setattr(persistent, "TOKENS", 16)
    monkeypatch.setattr(persistent, "CHUNK", 32)


@pytest.mark.parametrize("name", list(CASES))
def test_as_plain_torch(name: str, tmp_path: Path) -> None:
    architecture, options = CASES[name]
    folder = make_checkpoint(tmp_path / "m", architecture, **options)
    ops = GpuOps((torch.float32,), runs_as_one=True)
    expected, ours = run(folder, TorchOps(), TorchBackend()), run(folder, ops, TritonBackend())
    assert ops.decoder is not None
    kernel = ops.decoder._persistent
    assert kernel is not None
    launches = 0
    whole = kernel.run

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal launches
        launches += 1
        return whole(*arguments)

    kernel.run = counted  # type: ignore[method-assign, assignment]
    steps: list[tuple[list[tuple[int, list[int]]], int]] = [
        ([(0, list(range(3, 50))), (1, [4, 5])], 0),  # more rows than it takes
        ([(0, [5])], 0),  # two parts of the context, of two tiles and one
        ([(1, [7])], 0),  # one part
        ([(0, [7]), (1, [9, 10, 11])], 0),
        ([(0, [1])], 0),
    ]
    for rows, padding in steps:
        torch.testing.assert_close(
            ours.step(rows, padding), expected.step(rows, padding), atol=5e-4, rtol=1e-4
        )
    assert launches == 3
    assert not kernel._done.any()  # what programs count is as it was
    assert not kernel._counters.any()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {"head_dim": 16, "intermediate_size": 77}),  # no whole units
        ("Qwen3ForCausalLM", {"head_dim": 256, "intermediate_size": 96}),  # a head fills the memory
    ],
)
def test_other_models_keep_their_kernels(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", architecture, **{**SMALL, **options})
    ops = GpuOps((torch.float32,), runs_as_one=True)
    run(folder, ops, TritonBackend())
    assert ops.decoder is not None
    assert ops.decoder.few_rows > 0
    assert ops.decoder._persistent is None


def test_a_device_that_cannot_hold_all_programs_takes_separate_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path / "m", "LlamaForCausalLM", **{**SMALL, "intermediate_size": 96})
    expected, ops = run(folder, TorchOps(), TorchBackend()), GpuOps((torch.float32,), runs_as_one=True)
    ours = run(folder, ops, TritonBackend())
    assert ops.decoder is not None
    contexts = [ops.decoder.one_row_context]

    class Refusing:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                raise RuntimeError(reasons.pop())

            return launch

    reasons = ["Triton Error [CUDA]: too many blocks in cooperative launch", "an illegal address"]
    monkeypatch.setattr(persistent, "decoder_kernel", Refusing())
    with pytest.raises(RuntimeError, match="illegal address"):  # any other error is an error
        ours.step([(0, [5])], 0)
    ours.num_computed = [0, 0, 0]
    torch.testing.assert_close(ours.step([(0, [5])], 0), expected.step([(0, [5])], 0), atol=5e-4, rtol=1e-4)
    assert "separate kernels" in caplog.text
    assert not reasons
    assert [*contexts, ops.decoder.one_row_context] == [persistent.LONGEST, None]
    expected_next = expected.step([(0, [7])], 0)
    torch.testing.assert_close(ours.step([(0, [7])], 0), expected_next, atol=5e-4, rtol=1e-4)


def test_long_contexts_take_separate_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "m", "LlamaForCausalLM", **{**SMALL, "intermediate_size": 96})
    ops = GpuOps((torch.float32,), runs_as_one=True)
    ours = run(folder, ops, TritonBackend())
    monkeypatch.setattr(persistent, "LONGEST", 3)
    assert ops.decoder is not None
    kernel = ops.decoder._persistent
    assert kernel is not None
    contexts: list[int] = []
    whole = kernel.run

    def noted(ids: Any, caches: Any, metadata: Any) -> torch.Tensor:
        contexts.append(metadata.max_seq_len)
        return whole(ids, caches, metadata)

    kernel.run = noted  # type: ignore[method-assign, assignment]
    for token in range(5):
        ours.step([(0, [token])], 0)
    assert contexts == [1, 2, 3]


@triton.jit
def _product_kernel(
    x_ptr, norm_ptr, w_ptr, out_ptr, UNITS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    weights = weight_tiles(w_ptr, 0, 0, UNITS, K, CHUNK, UNITS, 1)
    if NORMED:
        row, scale = normed_row(x_ptr, row_tiles(norm_ptr, K, CHUNK), 1e-6, K, CHUNK)
    else:
        row, scale = plain_row(x_ptr, K, CHUNK), 1.0
    for unit in tl.static_range(UNITS):
        tl.store(out_ptr + unit * 8 + tl.arange(0, 8), times(weights, unit, row, K, CHUNK) * scale)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("k", [64, 112])
def test_numbers_that_are_loaded_two_in_a_word(k: int, normed: bool) -> None:
    source = torch.Generator().manual_seed(k)
    x, norm, weight = (
        torch.randn(*shape, generator=source).to(torch.bfloat16) for shape in ((k,), (k,), (16, k))
    )
    out = torch.full((16,), float("nan"))
    _product_kernel[(1,)](x, norm, weight, out, UNITS=2, K=k, CHUNK=32, NORMED=normed)
    wide = x.double()
    if normed:
        wide = (wide * norm.double()).bfloat16().double() * (wide.square().mean() + 1e-6).rsqrt()
    # the interpreter cuts a bfloat16 off where a GPU rounds it; columns that change places are off by 10
    tolerance = 0.1 if normed else 1e-5
    torch.testing.assert_close(out.double(), weight.double() @ wide, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("programs", [5])
def test_programs_that_wait_for_one_another(
    programs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More units than programs, and fewer; and whoever goes on first, all of them come to the same end."""
    options = {**SMALL, "head_dim": 32, "partial_rotary_factor": 0.5, "num_key_value_heads": 2}
    options["intermediate_size"] = 40
    folder = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM", **options)
    monkeypatch.setattr(persistent, "programs_of", lambda device: programs)
    ops = GpuOps((torch.float32,), runs_as_one=True)
    expected, ours = run(folder, TorchOps(), TorchBackend()), run(folder, ops, TritonBackend())
    assert ops.decoder is not None
    kernel = ops.decoder._persistent
    assert kernel is not None
    waits = 0

    class InTurns:
        def __getitem__(self, grid: tuple[int]) -> Any:
            assert grid == (programs,)

            def launch(*arguments: Any, **options: Any) -> None:
                nonlocal waits
                turns = Turns(programs, seed=waits)
                monkeypatch.setattr(persistent_kernel, "wait", turns.wait)
                monkeypatch.setattr(persistent_attention, "wait", turns.wait)
                turns.launch(persistent_kernel.decoder_kernel, *arguments, **options)
                waits += turns.waits

            return launch

    monkeypatch.setattr(persistent, "decoder_kernel", InTurns())
    steps: list[list[tuple[int, list[int]]]] = [
        [(0, list(range(3, 43))), (1, [4, 5])],
        [(0, [5])],
        [(1, [7])],
        [(0, [1])],
    ]
    for rows in steps:
        torch.testing.assert_close(ours.step(rows, 0), expected.step(rows, 0), atol=5e-4, rtol=1e-4)
    assert waits > 3 * programs
    assert not kernel._done.any()
    assert not kernel._counters.any()
