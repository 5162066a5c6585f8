"""The whole engine on the card: texts against transformers, and against itself run in other ways."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, InsufficientMemoryError
from octavo.kernels import triton as triton_kernels
from octavo.worker.gpu_build import GRAPH_ROWS
from octavo.worker.model_runner import ModelRunner
from tests.checkpoints import make_checkpoint
from tests.gpu.test_models import CASES, WIDE, token_rows

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not triton_kernels.available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

PROMPTS = [token_rows(seed, 5 + 37 * seed) for seed in range(9)]
# Kinds of requests that leave the device's plain path one way or another.
PARAMS = [
    SamplingParams(max_tokens=40, temperature=0.0),
    SamplingParams(max_tokens=33, temperature=1.0, seed=3),
    SamplingParams(max_tokens=40, temperature=0.8, top_k=20, top_p=0.9, seed=4),
    SamplingParams(max_tokens=25, temperature=0.7, min_p=0.02, seed=5, logprobs=3),
    SamplingParams(max_tokens=40, temperature=0.9, seed=6, repetition_penalty=1.2, presence_penalty=0.3),
    SamplingParams(max_tokens=30, temperature=1.0, seed=7, logit_bias={5: 4.0, 9: -3.0}),
    SamplingParams(max_tokens=30, temperature=1.0, seed=8, stop_token_ids=list(range(40)), min_tokens=9),
    SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2),
    SamplingParams(max_tokens=40, temperature=1.0, seed=9, allowed_token_ids=list(range(100, 200))),
]
# The same at once: rules of all kinds, and every answer there is.
PARAMS[4] = PARAMS[4].replace(frequency_penalty=0.2, logprobs=2)
PARAMS[7] = PARAMS[7].replace(max_tokens=20, presence_penalty=1.0, logit_bias={3: 2.0})


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    options.setdefault("max_model_len", 1024)
    options.setdefault("max_num_seqs", 32)
    if options.setdefault("kv_cache_memory", "256MB") is not None:
        options.setdefault("gpu_memory_utilization", 0.2)  # other tests use the card at the same time
    llm = LLM(model=str(folder), device="cuda", skip_tokenizer_init=True, **options)
    try:
        yield llm
    finally:
        llm.shutdown()


def runner_of(llm: LLM) -> ModelRunner:
    parts: Any = llm._parts
    runner: ModelRunner = parts.engine.executor.runner
    return runner


def tokens(llm: LLM, prompts: Any = None, params: Any = None) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in (PROMPTS if prompts is None else prompts)],
        PARAMS if params is None else params, use_tqdm=False,
    )  # fmt: skip
    assert not any(output.error for output in outputs)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**WIDE, "head_dim": 128, "eos_token_id": 999}
    return make_checkpoint(tmp_path_factory.mktemp("qwen"), "Qwen3ForCausalLM", **options)


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in CASES if "partial" not in name])
def test_greedy_as_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    architecture, options = CASES[name]
    folder = make_checkpoint(tmp_path / "m", architecture, **options)
    longest = 90 if "max_position_embeddings" not in options else 400
    prompts = [prompt[:longest] for prompt in PROMPTS]
    count = 30
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda").eval()
    expected = []
    with torch.inference_mode():
        for prompt in prompts:
            out = theirs.generate(
                torch.tensor([prompt], device="cuda"), max_new_tokens=count, min_new_tokens=count,
                do_sample=False,
            )  # fmt: skip
            expected.append(out[0, len(prompt) :].tolist())
    params = SamplingParams(max_tokens=count, min_tokens=count, temperature=0.0)
    with engine(folder, dtype="float32", max_model_len=longest + count) as llm:
        assert tokens(llm, prompts, params) == expected


def test_graphs_and_depth_change_nothing(qwen: Path) -> None:
    """Replayed or eager, one step late or in line: the same kernels, so the same bits."""
    found = []
    for options in (
        {}, {"pipeline_depth": 0}, {"enforce_eager": True}, {"enforce_eager": True, "pipeline_depth": 0},
    ):  # fmt: skip
        with engine(qwen, **options) as llm:
            found.append(tokens(llm))
            runner = runner_of(llm)
            if "enforce_eager" in options:
                assert runner.num_replayed == 0
            else:
                assert runner.num_replayed > 0
    for other in found[1:]:
        assert other == found[0]


def test_no_small_step_outside_a_graph(qwen: Path) -> None:
    with engine(qwen, max_num_batched_tokens=2048) as llm:
        tokens(llm)
        runner = runner_of(llm)
        assert runner.num_eager <= 1  # the nine prompts together are longer than the largest graph
        assert runner.num_replayed >= 39
        prompts = [token_rows(1, GRAPH_ROWS - 60), token_rows(2, 60)]
        before = runner.num_eager
        tokens(llm, prompts, SamplingParams(max_tokens=4, temperature=0.0))
        assert runner.num_eager == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deterministic(qwen: Path, dtype: str) -> None:
    """Alone and together, with and without speculation, in any chunking: the same bits."""
    options = {"deterministic": True, "dtype": dtype}
    with engine(qwen, **options) as llm:
        together = tokens(llm)
        alone = [tokens(llm, [p], [q])[0] for p, q in zip(PROMPTS, PARAMS, strict=True)]
    assert alone == together
    with engine(qwen, **options, max_num_batched_tokens=48, enable_prefix_caching=False) as llm:
        assert tokens(llm) == together
    for drafts in ("auto", 4):
        speculative = {"method": "prompt_lookup", "num_speculative_tokens": drafts}
        with engine(qwen, **options, speculative=speculative) as llm:
            assert tokens(llm) == together


def test_deterministic_refuses_what_it_cannot_keep(qwen: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="max_num_batched_tokens"),
        engine(qwen, deterministic=True, max_num_batched_tokens=512),
    ):
        pass
    odd = make_checkpoint(tmp_path / "odd", "LlamaForCausalLM")
    with (
        pytest.raises(ConfigError, match="deterministic"),
        engine(odd, deterministic=True, max_model_len=100),
    ):
        pass


def test_preemption_and_prefix_hits(qwen: Path) -> None:
    """So few blocks that requests push one another out, and prompts that begin alike."""
    prompts = [token_rows(1, 100) + token_rows(seed, 20) for seed in range(12)]
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    with engine(qwen, deterministic=True) as llm:
        expected = tokens(llm, prompts, params)
    few_blocks = 40 * 16 * 2 * 2 * 128 * 3 * 2
    with engine(qwen, deterministic=True, kv_cache_memory=few_blocks, max_model_len=256) as llm:
        assert tokens(llm, prompts, params) == expected


@pytest.mark.parametrize("drafts", [1, 4])
def test_a_draft_model_keeps_the_text(qwen: Path, tmp_path: Path, drafts: int) -> None:
    """A draft model that is the target itself is nearly always right; a stranger nearly never."""
    with engine(qwen, deterministic=True) as llm:
        expected = tokens(llm)
    options = {**WIDE, "head_dim": 128, "eos_token_id": 999, "num_hidden_layers": 1}
    stranger = make_checkpoint(tmp_path / "s", "Qwen3ForCausalLM", **options, seed=9)
    for folder, least, most in ((qwen, 0.8, 1.0), (stranger, 0.0, 0.2)):
        speculative = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": drafts}
        for more in ({}, {"pipeline_depth": 0}, {"enforce_eager": True}):
            with engine(qwen, deterministic=True, speculative=speculative, **more) as llm:
                assert tokens(llm) == expected
                params = SamplingParams(max_tokens=40, temperature=0.7, seed=1, ignore_eos=True)
                found = llm.generate(
                    [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
                )
            metrics = [output.metrics.speculation for output in found if output.metrics is not None]
            drafted = sum(metric.drafted for metric in metrics if metric is not None)
            accepted = sum(metric.accepted for metric in metrics if metric is not None)
            assert drafted > 100
            assert least <= accepted / drafted <= most


def test_nothing_is_compiled_while_serving(qwen: Path) -> None:
    from triton import knobs

    compiled: list[str] = []

    def note(**what: Any) -> None:
        compiled.append(str(what["fn"].name))

    speculative = {"method": "prompt_lookup", "num_speculative_tokens": 4}
    for options in ({}, {"speculative": speculative}):
        with engine(qwen, max_num_batched_tokens=1024, **options) as llm:
            knobs.runtime.jit_post_compile_hook = note
            try:
                for count in (1, 5, 9):
                    tokens(llm, PROMPTS[:count], PARAMS[:count])
                tokens(llm, [token_rows(seed, 30 * seed + 1) for seed in range(32)], PARAMS[0])
            finally:
                knobs.runtime.jit_post_compile_hook = None
    assert compiled == []


@pytest.mark.parametrize("kind", ["plain", "eager", "prompt_lookup", "draft_model"])
def test_nothing_but_answers_is_waited_for(qwen: Path, kind: str) -> None:
    """Penalties, bans, masks, filters, log-probabilities, drafts: no call waits for the device.

    torch raises where one does. What a step brought is waited for by an event, which is no such call.
    """
    options: dict[str, Any] = {"deterministic": True}
    if kind in ("prompt_lookup", "draft_model"):
        options["speculative"] = {"method": kind, "num_speculative_tokens": 3}
    if kind == "draft_model":
        options["speculative"]["model"] = str(qwen)
    with engine(qwen, enforce_eager=kind == "eager", **options) as llm:
        expected = tokens(llm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            assert tokens(llm) == expected
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="others use the card")
def test_memory_is_what_was_asked_for_and_comes_back(qwen: Path) -> None:
    share = 0.5
    with engine(qwen, kv_cache_memory=None, max_num_seqs=256, max_model_len=2048) as llm:
        tokens(llm)
    before, total = torch.cuda.mem_get_info()  # the kernels' code stays
    with engine(
        qwen, kv_cache_memory=None, gpu_memory_utilization=share, max_model_len=2048, max_num_seqs=100_000
    ) as llm:
        tokens(llm)
        used = (total - torch.cuda.mem_get_info()[0]) / total
        print(f"used {used:.4f} of the card, asked for {share}")
        assert share - 0.01 <= used <= share + 0.001
    assert before - torch.cuda.mem_get_info()[0] < 128 << 20
    with (
        pytest.raises(InsufficientMemoryError, match="gpu_memory_utilization"),
        engine(qwen, kv_cache_memory=None, gpu_memory_utilization=0.002),
    ):
        pass
