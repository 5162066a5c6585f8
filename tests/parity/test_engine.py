"""The whole engine says what transformers says, however the work is cut.

Small random checkpoints in float32, greedy. Each way of running the same requests (alone, in a
batch, prompts in chunks, with and without prefix caching, a cache so small that requests are
preempted, device state dropped and rebuilt, one step late) must give the tokens of transformers.
A difference is forgiven only at a near-tie: see `tests/parity/ties.py`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.parity.ties import check_few, find_partings
from tests.parity.ways import assert_same_bits, run, ways

LENGTH = 24  # tokens generated
SMALL_CACHE = 9  # blocks
WAYS = ways(SMALL_CACHE)

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


@pytest.fixture(scope="module", params=CHECKPOINTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A checkpoint, its prompts, and what transformers makes of them."""
    name = str(request.param)
    folder = make_checkpoint(tmp_path_factory.mktemp(name), **CHECKPOINTS[name])
    prompts = make_prompts(131)
    yield folder, prompts, [transformers_greedy(folder, prompt, LENGTH) for prompt in prompts]
    transformers_model.cache_clear()


# The reference takes its time, and most ways differ in the brain alone.
RUNS = [(way, "auto") for way in WAYS]
RUNS += [(way, backend) for way in ("together", "all-at-once") for backend in ("torch", "sdpa")]


@pytest.mark.parametrize(("way", "backend"), RUNS)
def test_every_way_gives_the_tokens_of_transformers(case: Any, way: str, backend: str) -> None:
    folder, prompts, expected = case
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    outputs = run(folder, prompts, params, WAYS[way], attention_backend=backend)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * len(prompts)

    def scores(number: int, at: int) -> torch.Tensor:
        return logits_after(folder, prompts[number] + expected[number][:at])

    mine = [output.outputs[0].token_ids for output in outputs]
    check_few(find_partings(mine, expected, scores), len(prompts))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_gives_the_same_bits(tmp_path: Path, dtype: str) -> None:
    """Samples and log-probabilities, bit for bit, with deterministic=True."""
    folder = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM")
    prompts = make_prompts(131, 24)
    params = [
        SamplingParams(
            temperature=1.3, top_p=0.95, seed=index, max_tokens=LENGTH, ignore_eos=True, logprobs=2
        )
        for index in range(len(prompts))
    ]
    plain = run(folder, prompts, params, WAYS["together"], dtype=dtype, deterministic=True)
    for name, way in WAYS.items():
        assert_same_bits(run(folder, prompts, params, way, dtype=dtype, deterministic=True), plain, name)
