"""Models on the card: the Triton path against plain torch and transformers, and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.attention.torch_backend import TorchBackend
from octavo.kernels import triton as triton_kernels
from octavo.layers.ops import TorchOps
from tests.checkpoints import make_checkpoint
from tests.gpu.on_device import load, run
from tests.gpu_report import Record, kind_of

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not triton_kernels.available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from octavo.attention.triton_backend import TritonBackend  # noqa: E402
from octavo.models.gpu_ops import GpuOps  # noqa: E402

WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 2048,
    "num_attention_heads": 8,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama odd": ("LlamaForCausalLM", {}),
    "llama biases": (
        "LlamaForCausalLM",
        {**WIDE, "head_dim": 64, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral window": ("MistralForCausalLM", {**WIDE, "sliding_window": 300, "head_dim": 128}),
    "qwen2": ("Qwen2ForCausalLM", {**WIDE, "num_key_value_heads": 1, "head_dim": 32}),
    "qwen3": ("Qwen3ForCausalLM", {**WIDE, "head_dim": 128, "tie_word_embeddings": True}),
    "qwen3 partial rotary": ("Qwen3ForCausalLM", {**WIDE, "head_dim": 64, "partial_rotary_factor": 0.5}),
}


def token_rows(seed: int, count: int, vocab: int = 131) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


STEPS: list[tuple[list[tuple[int, list[int]]], int]] = [
    ([(0, token_rows(0, 90))], 0),
    ([(1, token_rows(1, 400)), (0, token_rows(2, 1))], 3),
    ([(0, token_rows(3, 1)), (1, token_rows(4, 5)), (2, token_rows(5, 60))], 0),
    ([(0, token_rows(6, 1)), (1, token_rows(7, 1)), (2, token_rows(8, 1)), (3, token_rows(9, 1))], 4),
    ([(1, token_rows(10, 300)), (2, token_rows(11, 17))], 0),
    ([(1, token_rows(12, 1))], 0),
]


def fitting(steps: Any, longest: int) -> Any:
    """The steps, cut to what a model of short contexts can hold."""
    return [
        ([(request, tokens[: max(1, len(tokens) * longest // 800)]) for request, tokens in rows], padding)
        for rows, padding in steps
    ]


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_as_plain_torch(name: str, dtype: torch.dtype, tmp_path: Path, record: Record) -> None:
    architecture, options = CASES[name]
    folder = make_checkpoint(tmp_path / "m", architecture, **options)
    longest = 800 if "max_position_embeddings" in options else 110
    reference = run(load(folder, torch.float32, TorchOps(), TorchBackend()), TorchBackend(), 4, longest + 20)
    rounded = run(load(folder, dtype, TorchOps(), TorchBackend()), TorchBackend(), 4, longest + 20)
    backend = TritonBackend()
    ours = run(load(folder, dtype, GpuOps(), backend), backend, 4, longest + 20)
    for rows, padding in fitting(STEPS, longest):
        expected = reference.step(rows, padding)
        theirs = rounded.step(rows, padding)
        got = ours.step(rows, padding)
        norm = expected.norm()
        error, allowed = float((got - expected).norm() / norm), float((theirs - expected).norm() / norm)
        record(f"logits of whole models, {kind_of(dtype)}", error)
        record(f"logits of whole models by plain torch, {kind_of(dtype)}", allowed)
        assert error < (1e-5 if dtype == torch.float32 else 1.5 * allowed + 2e-3), (rows, error, allowed)


@pytest.mark.parametrize("name", ["llama biases", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanted_rows_alone(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The last row of each request; what the others left in the cache is read by the steps behind."""
    architecture, options = CASES[name]
    folder = make_checkpoint(tmp_path / "m", architecture, **options)
    backend = TritonBackend()
    reference = run(load(folder, torch.float32, TorchOps(), TorchBackend()), TorchBackend(), 4, 820)
    model = load(folder, dtype, GpuOps(), backend)
    every, some = run(model, backend, 4, 820), run(model, backend, 4, 820)
    longer = [([(2, token_rows(13, 350)), (3, token_rows(14, 300))], 0), ([(2, [1]), (3, [2])], 0)]
    for rows, padding in [*STEPS, *longer]:
        ends = torch.tensor([len(tokens) for _, tokens in rows]).cumsum(0)
        expected = reference.step(rows, padding)[ends - 1]
        among_all = every.step(rows, padding)[ends - 1]
        alone = some.step(rows, padding, (ends - 1).tolist())
        error, allowed = (float((got - expected).norm() / expected.norm()) for got in (alone, among_all))
        assert error < 1.5 * allowed + (1e-5 if dtype == torch.float32 else 2e-3), (rows, error, allowed)
    assert len(some.step([(0, token_rows(15, 90))], 2, [])) == 0


@pytest.mark.parametrize("few_rows", [64, 128])
def test_rows_do_not_depend_on_their_neighbours(few_rows: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM", **WIDE, head_dim=128)
    backend = TritonBackend()
    model = load(folder, torch.bfloat16, GpuOps(few_rows=few_rows), backend)
    prompts = [token_rows(seed, 40 + 13 * seed) for seed in range(8)]
    alone, together = run(model, backend, 60, 700), run(model, backend, 60, 700)
    for request, prompt in enumerate(prompts):
        alone.step([(request, prompt[:100])])
        together.step([(request, prompt[:100])])
    single = [alone.step([(request, [request + 1])]) for request in range(8)]
    for others in (0, 1, 9, 28, 52):
        if 8 + 2 * others > few_rows:
            continue
        extra = [(8 + index, token_rows(index, 2)) for index in range(others)]
        for request in range(8):
            together.num_computed[request] = alone.num_computed[request] - 1
        batch = together.step([*extra, *((request, [request + 1]) for request in range(8))])[-8:]
        for request in range(8):
            assert torch.equal(batch[request], single[request][0]), (others, request)


@pytest.mark.parity
@pytest.mark.parametrize("name", list(CASES))
def test_greedy_as_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    architecture, options = CASES[name]
    if "partial_rotary_factor" in options:
        pytest.skip("transformers' model has no partial rotary")
    folder = make_checkpoint(tmp_path / "m", architecture, **options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda").eval()
    backend = TritonBackend()
    ours = run(load(folder, torch.float32, GpuOps(), backend), backend, 2, 128)
    prompt = token_rows(1, 37)
    with torch.inference_mode():
        out = theirs.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=50, min_new_tokens=50, do_sample=False
        )
    assert ours.greedy(0, prompt, 50) == out[0, len(prompt) :].tolist()
    assert ours.greedy(1, prompt, 50, chunk=5) == out[0, len(prompt) :].tolist()
