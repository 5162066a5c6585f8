"""The way of GPUs that the Triton kernels do not serve, taken by force on one that they do.

`attention_backend="sdpa"`: torch for everything, no graph. A GPU of compute capability 7.x takes it by
itself; here one is pretended.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo import SamplingParams
from octavo.attention.backend import AttentionSpec
from octavo.attention.sdpa_backend import SdpaBackend
from octavo.attention.torch_backend import TorchBackend
from octavo.errors import ConfigError
from octavo.kernels import triton as triton_kernels
from octavo.platform import hardware
from octavo.sampling.device_draw import DeviceDraw
from octavo.worker.step_math import TorchStep
from tests.checkpoints import make_checkpoint
from tests.gpu_report import Record, kind_of
from tests.sampling.test_device_draw import compare, make_batch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not triton_kernels.available():
    pytest.skip("needs a CUDA device, and Triton to compare with", allow_module_level=True)

from tests.gpu.test_engine import PROMPTS, engine, runner_of, tokens  # noqa: E402
from tests.gpu.test_kernels import DEVICE, attention_case, on_device  # noqa: E402
from tests.gpu.test_models import WIDE, token_rows  # noqa: E402

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128, "eos_token_id": 999}),
    "mistral window": ("MistralForCausalLM", {"head_dim": 64, "sliding_window": 100, "eos_token_id": 999}),
}
# Prompts that begin alike: the later ones hit what the first left.
ALIKE = [token_rows(1, 100) + token_rows(seed, 20) for seed in range(12)]
GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, options = MODELS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp("model"), architecture, **{**WIDE, **options})


@pytest.fixture(autouse=True)
def _kernels_of_older_gpus() -> Iterator[None]:
    """Torch has others as well for newer ones."""
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(32, 8, 128, 128**-0.5),
        AttentionSpec(14, 2, 64, 0.125, sliding_window=500),
        AttentionSpec(16, 8, 128, 0.09, soft_cap=50.0),
    ],
    ids=["8B", "window", "soft cap"],
)
def test_attention_as_the_oracle(spec: AttentionSpec, dtype: torch.dtype, record: Record) -> None:
    torch.manual_seed(7)
    backend, oracle = SdpaBackend(), TorchBackend()
    for contexts, rows in (
        ([5000], [1]),
        ([900, 4000, 17, 2500], [1, 6, 3, 1]),
        ([1200, 3000, 40], [700, 1, 33]),
        ([1000] * 40, [1] * 40),
        ([9000], [3000]),  # in several calls
    ):
        num_blocks = sum(-(-context // 16) for context in contexts) + 5
        meta, total = attention_case(spec, contexts, rows, num_blocks, 0)
        cache = torch.randn(backend.kv_cache_shape(num_blocks, 16, spec), device=DEVICE).to(dtype)
        query = 2 * torch.randn(total, spec.num_heads, spec.head_dim, device=DEVICE).to(dtype)
        meta = on_device(meta)
        found = backend.attend(query, cache, meta, spec).float()
        expected = oracle.attend(query.float(), cache.float(), meta, spec)
        error = float((found - expected).norm() / expected.norm())
        record(f"attention by torch's kernels, {kind_of(dtype)}", error)
        assert error < (2e-3 if dtype == torch.float16 else 1e-5), (contexts, error)


@pytest.mark.parity
def test_greedy_as_transformers(folder: Path) -> None:
    """However it is cut: whole prompts, chunks, prefix hits, preemption, lookups, a draft model."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda").eval()
    expected = []
    with torch.inference_mode():
        for prompt in ALIKE:
            out = theirs.generate(
                torch.tensor([prompt], device="cuda"), max_new_tokens=60, min_new_tokens=60, do_sample=False
            )
            expected.append(out[0, len(prompt) :].tolist())
    lookup = {"method": "prompt_lookup", "num_speculative_tokens": 4}
    draft = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    for options in (
        {},
        {"pipeline_depth": 0},
        {"max_num_batched_tokens": 48, "enable_prefix_caching": False},
        {"kv_cache_memory": 40 * 16 * 2 * 2 * 128 * 3 * 4, "max_model_len": 256},
        {"speculative": lookup},
        {"speculative": {"method": "suffix"}},
        {"speculative": draft},
    ):
        with engine(folder, dtype="float32", attention_backend="sdpa", **options) as llm:
            assert tokens(llm, ALIKE, GREEDY) == expected, options
            assert tokens(llm, ALIKE, GREEDY) == expected, options  # from the prefix cache
            runner = runner_of(llm)
            assert (runner.num_replayed, runner.graphs) == (0, None)


def test_every_kind_of_request_as_with_triton(folder: Path) -> None:
    """Seeds, filters, penalties, bans, log-probabilities: in float32 both draw the same."""
    with engine(folder, dtype="float32") as llm:
        expected = tokens(llm)
    with engine(folder, dtype="float32", attention_backend="sdpa") as llm:
        assert tokens(llm) == expected
    lookup = {"method": "prompt_lookup", "num_speculative_tokens": 4}
    with engine(folder, dtype="float32", attention_backend="sdpa", speculative=lookup) as llm:
        assert tokens(llm) == expected


def test_an_older_gpu_takes_it_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hardware._gpus()
    older = tuple(replace(gpu, name="Tesla T4", capability=(7, 5)) for gpu in found)
    monkeypatch.setattr(hardware, "_gpus", lambda: older)
    monkeypatch.setattr(hardware, "_why_no_code_for", lambda gpu: None)
    with engine(folder, dtype="float16") as llm:
        runner: Any = runner_of(llm)
        assert isinstance(runner._steps, TorchStep)
        assert any("7.5" in note for note in llm._engine_parts().notes)
        tokens(llm)
    with pytest.raises(ConfigError, match="--dtype float16"), engine(folder, dtype="bfloat16"):
        pass
    with (
        pytest.raises(ConfigError, match="Tesla T4"),
        engine(folder, attention_backend="triton", dtype="auto"),
    ):
        pass


def test_float16_is_close_to_float32(folder: Path, record: Record) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    found: list[list[float]] = []
    for dtype in ("float32", "float16"):
        with engine(folder, dtype=dtype, attention_backend="sdpa") as llm:
            outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
        logprobs = []
        for output in outputs:
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
            logprobs += [next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry]
        found.append(logprobs)
    wide, half = torch.tensor(found)
    error = float((half - wide).norm() / wide.norm())
    record("log-probabilities by torch's kernels, float16", error)
    assert len(wide) == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert error < 2e-3


def test_memory_stays_within_the_plan(tmp_path: Path, record: Record) -> None:
    """Prompts that fill a step, all of them sampled with log-probabilities; weights of a small model."""
    options = {**WIDE, "vocab_size": 50_000, "max_position_embeddings": 8192, "head_dim": 128}
    model = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM", **options)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with engine(
        model, dtype="float16", attention_backend="sdpa", max_model_len=8192, max_num_seqs=64,
        kv_cache_memory="1GB",
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=4, temperature=1.0, top_p=0.9, seed=1, logprobs=5)
        tokens(llm, [token_rows(1, 8000), *(token_rows(seed, 130) for seed in range(63))], params)
        plan = llm._engine_parts().plan
        used = torch.cuda.max_memory_reserved() - before
    record("memory by torch's kernels, share of the plan", used / plan.total)
    assert used < plan.total


@pytest.mark.parametrize("vocab_size", [1000, 151_936])
def test_rows_drawn_together_as_alone(vocab_size: int) -> None:
    compare(DEVICE, vocab_size, rows=40)


def test_draws_wait_once_for_many_rows() -> None:
    logits = torch.randn(64, 32_000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    batch = make_batch(64, seed=1)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            DeviceDraw().draw(logits, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 64 // 4
