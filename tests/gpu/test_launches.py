"""Launches on the card: what is launched quickly, or again for another layer, does what it did at first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import SamplingParams
from octavo.kernels import triton as triton_kernels
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not triton_kernels.available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from octavo.attention.triton_backend import TritonBackend  # noqa: E402
from octavo.kernels.triton import many_rows, quick  # noqa: E402
from octavo.kernels.triton.quick import Kernel, Recording  # noqa: E402
from octavo.models.gpu_ops import GpuOps  # noqa: E402
from tests.gpu.on_device import load, run  # noqa: E402
from tests.gpu.test_engine import engine, tokens  # noqa: E402
from tests.gpu.test_models import CASES, STEPS, WIDE, token_rows  # noqa: E402


@contextmanager
def _never_whole() -> Iterator[Recording]:
    with quick.recorded() as recording:
        yield recording
    recording.is_whole = False


@pytest.mark.parametrize("name", ["llama biases", "mistral window", "qwen3"])
def test_repeated_layers_are_computed_as_the_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, options = CASES[name]
    folder = make_checkpoint(tmp_path / "m", architecture, **{**options, "num_hidden_layers": 4})
    backend = TritonBackend()
    model = load(folder, torch.bfloat16, GpuOps(), backend)
    repeats: list[int] = []
    repeat = Recording.repeat

    def counted(self: Recording, tensors: Any) -> None:
        repeats.append(1)
        repeat(self, tensors)

    monkeypatch.setattr(Recording, "repeat", counted)

    def results() -> list[torch.Tensor]:
        steps = run(model, backend, 4, 820)
        return [steps.step(rows, padding) for rows, padding in STEPS]

    repeated = results()
    # the first time a step's forms may be new; from then on three of its four layers are repeated
    before = len(repeats)
    again = results()
    assert len(repeats) - before == 3 * sum(sum(len(t) for _, t in rows) + more > 64 for rows, more in STEPS)
    monkeypatch.setattr(many_rows, "recorded", _never_whole)
    one_by_one = results()
    for got, second, expected in zip(repeated, again, one_by_one, strict=True):
        assert torch.equal(got, expected)
        assert torch.equal(second, expected)


def test_the_second_prompts_are_launched_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts of several steps, with decode rows beside chunks and contexts that are continued."""
    folder = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM", **WIDE, head_dim=128, eos_token_id=999)
    usual: list[Any] = []
    launch = Kernel.launch_as_usual

    def counted(self: Any, *args: Any) -> Any:
        usual.append((self.__name__, args[0]))
        return launch(self, *args)

    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompts = [[token_rows(seed + 10 * turn, 900) for seed in range(5)] for turn in range(2)]
    with engine(folder, max_num_batched_tokens=1024, enable_prefix_caching=False) as llm:
        first = tokens(llm, prompts[0], [params] * 5)
        monkeypatch.setattr(Kernel, "launch_as_usual", counted)
        tokens(llm, prompts[1], [params] * 5)
        assert not usual, usual[:3]
        assert tokens(llm, prompts[0], [params] * 5) == first
