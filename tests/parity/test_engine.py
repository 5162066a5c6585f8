"""The whole engine says what transformers says, however the work is cut.

Small random checkpoints in float32, greedy. Each way of running the same requests (alone, in a
batch, prompts in chunks, with and without prefix caching, a cache so small that requests are
preempted, device state dropped and rebuilt, one step late) must give the tokens of transformers.
A difference is forgiven only where it is a tie: see `assert_same_or_tied`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.llm import LLM
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint

TIE = 1e-4  # two logits this close are a tie in float32
LENGTH = 24  # tokens generated

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "llama-mqa-tied": {
        "architecture": "LlamaForCausalLM",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3-rope": {
        "architecture": "LlamaForCausalLM",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral-window": {"architecture": "MistralForCausalLM", "sliding_window": 11},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "num_key_value_heads": 3},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 14},
}

# How the same work is run. The first one is the plain one.
WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "alone": {"max_num_seqs": 1},
    "chunks-of-1": {"max_chunk_tokens": 1},
    "chunks-of-7": {"max_chunk_tokens": 7},
    "tiny-budget": {"max_num_batched_tokens": 9},
    "no-prefix-caching": {"enable_prefix_caching": False},
    "preempted": {"num_blocks": 9},
    "one-step-late": {"pipeline_depth": 1},
    "one-step-late-preempted": {"pipeline_depth": 1, "num_blocks": 9, "max_chunk_tokens": 7},
    "rebuilt": {"rebuild": True},
}


def make_prompts(vocab_size: int, count: int = 12) -> list[list[int]]:
    """Prompts of 1 to 50 tokens; half of them begin alike."""
    rng = random.Random(5)
    common = [rng.randrange(3, vocab_size) for _ in range(40)]
    found = []
    for index in range(count):
        length = rng.choice([1, 2, 15, 16, 17, 33, 50])
        own = [rng.randrange(3, vocab_size) for _ in range(length)]
        found.append(common[:length] + own[:1] if index % 2 else own)
    return found


@functools.cache
def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]


def logits_after(folder: Path, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        out = transformers_model(folder)(input_ids=torch.tensor([tokens]), use_cache=False)
    logits: torch.Tensor = out.logits[0, -1]
    return logits


def transformers_greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(folder, tokens).argmax()))
    return tokens[len(prompt) :]


def assert_same_or_tied(folder: Path, prompt: list[int], mine: list[int], theirs: list[int]) -> bool:
    """True if equal, False if they part at a tie; an AssertionError that shows the gap otherwise."""
    if mine == theirs:
        return True
    at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    logits = logits_after(folder, prompt + theirs[:at])
    gap = float(logits[theirs[at]] - logits[mine[at]])
    assert gap < TIE, f"token {at}: {mine[at]} instead of {theirs[at]}, whose logit is {gap:.2e} greater"
    return False


def run(folder: Path, prompts: list[list[int]], way: dict[str, Any], **options: Any) -> list[RequestOutput]:
    way = {"max_num_seqs": 64, "kv_cache_memory": "4MB", "dtype": "float32", **way, **options}
    rebuild = way.pop("rebuild", False)
    if (num_blocks := way.pop("num_blocks", None)) is not None:
        way["kv_cache_memory"] = num_blocks * block_bytes(folder)
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    with LLM(str(folder), skip_tokenizer_init=True, **way) as llm:
        engine = llm._engine_parts().engine
        if rebuild:
            plain_step, steps = engine.step, iter(range(10**6))

            def step() -> list[RequestOutput]:
                if next(steps) % 3 == 1 and not engine.scheduler.num_unread_steps:
                    engine.scheduler.drop_device_state()
                return plain_step()

            engine.step = step  # type: ignore[method-assign]
        outputs = llm.generate(list(prompts), params, use_tqdm=False)
        engine.scheduler.check_integrity()
        if num_blocks is not None:
            assert engine.scheduler.stats.num_preemptions > 3, "the cache was not too small after all"
        return outputs


def block_bytes(folder: Path) -> int:
    from octavo.models.config import ModelConfig

    config = ModelConfig.from_folder(folder)
    # The C kernels round the head size up; the most any layout takes is asked for here.
    head_dim = -(-config.head_dim // 16) * 16
    return 2 * config.num_layers * config.num_kv_heads * head_dim * 4 * 16


@pytest.fixture(scope="module", params=CHECKPOINTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A checkpoint, its prompts, and what transformers makes of them."""
    name = str(request.param)
    folder = make_checkpoint(tmp_path_factory.mktemp(name), **CHECKPOINTS[name])
    prompts = make_prompts(131)
    yield folder, prompts, [transformers_greedy(folder, prompt, LENGTH) for prompt in prompts]
    transformers_model.cache_clear()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_tokens_of_transformers(case: Any, way: str, backend: str) -> None:
    if backend == "torch" and way not in ("together", "preempted"):
        pytest.skip("the reference takes its time; the other ways differ in the brain alone")
    folder, prompts, expected = case
    outputs = run(folder, prompts, WAYS[way], attention_backend=backend)
    ties = 0
    for prompt, output, tokens in zip(prompts, outputs, expected, strict=True):
        assert output.outputs[0].finish_reason == "length"
        ties += not assert_same_or_tied(folder, prompt, output.outputs[0].token_ids, tokens)
    assert ties <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_gives_the_same_bits(tmp_path: Path, dtype: str) -> None:
    """Alone, in a batch, in chunks, preempted: the same samples, bit for bit, with deterministic=True."""
    folder = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM")
    prompts = make_prompts(131, 24)
    params = [
        SamplingParams(temperature=1.3, top_p=0.95, seed=index, max_tokens=LENGTH, ignore_eos=True)
        for index in range(len(prompts))
    ]
    found: dict[str, list[list[int]]] = {}
    for name, way in WAYS.items():
        way = {"max_num_seqs": 64, "kv_cache_memory": "4MB", **way}
        if way.pop("rebuild", False):
            continue
        if (num_blocks := way.pop("num_blocks", None)) is not None:
            way["kv_cache_memory"] = num_blocks * block_bytes(folder)
        with LLM(str(folder), skip_tokenizer_init=True, dtype=dtype, deterministic=True, **way) as llm:
            outputs = llm.generate(list(prompts), params, use_tqdm=False)
            found[name] = [output.outputs[0].token_ids for output in outputs]
    for name, tokens in found.items():
        assert tokens == found["together"], name
