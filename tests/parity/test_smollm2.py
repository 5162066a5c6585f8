"""SmolLM2 says what transformers said: 50 prompts of 256 tokens, greedy, float32, however they are run.

The reference is tests/parity/smollm2_greedy.json (see make_references.py). Each run checks that it
belongs to the weights at hand and recomputes a part of it with transformers.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.sampling_params import SamplingParams
from tests.parity.make_references import load_model, reference, weights_checksum
from tests.parity.ties import REQUESTS_PER_TIE, Parting, Scores, check_few, find_partings, perturbed
from tests.parity.ways import run, ways

REFERENCES = Path(__file__).with_name("smollm2_greedy.json")
SMALL_CACHE = 200  # blocks: 3,200 tokens for 50 requests of 320


@cache
def references() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(REFERENCES.read_text(encoding="utf-8"))["cases"]
    return cases


@cache
def transformers_model(path: Path) -> Any:
    return load_model(path)


def logits_after(path: Path, tokens: list[int]) -> torch.Tensor:
    """What transformers makes of `tokens`, without its cache.  # [vocab]"""
    with torch.inference_mode():
        logits: torch.Tensor = transformers_model(path)(torch.tensor([tokens]), logits_to_keep=1).logits[
            0, -1
        ]
    return logits


def partings(path: Path, num_cases: int, num_tokens: int, way: dict[str, Any]) -> list[Parting]:
    """Run the first cases in one call and compare them with their references."""
    cases = references()[:num_cases]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = run(path, [case["prompt"] for case in cases], params, way, kv_cache_memory="1500MB")
    mine = [output.outputs[0].token_ids for output in outputs]
    return find_partings(mine, [case["tokens"][:num_tokens] for case in cases], scores(path))


def scores(path: Path) -> Scores:
    def at_token(number: int, at: int) -> torch.Tensor:
        case = references()[number]
        return logits_after(path, case["prompt"] + case["tokens"][:at])

    return at_token


def test_the_references_belong_to_these_weights(smollm2_path: Path) -> None:
    stored = json.loads(REFERENCES.read_text(encoding="utf-8"))["weights_sha256"]
    assert weights_checksum(smollm2_path) == stored


def test_transformers_still_says_the_same(smollm2_path: Path) -> None:
    case = references()[3]
    tokens, _ = reference(transformers_model(smollm2_path), case["prompt"], 12)
    assert tokens == case["tokens"][:12]


def test_a_planted_difference_is_found(smollm2_path: Path) -> None:
    """One wrong token among right ones, even the next best: no near-tie excuses it."""
    theirs = [case["tokens"][:20] for case in references()[:3]]
    computed = cache(scores(smollm2_path))
    assert find_partings(theirs, theirs, computed) == []
    for at in (0, 19):
        mine = [list(tokens) for tokens in theirs]
        mine[1][at] = int(computed(1, at).topk(2).indices[1])
        with pytest.raises(AssertionError, match=f"no near-tie: request 1 parts at token {at}:"):
            find_partings(mine, theirs, computed)


def test_samples_are_the_draws_that_the_noise_makes(smollm2_path: Path) -> None:
    """The scores of a request that samples, from transformers' logits and the reference noise."""
    params = SamplingParams(temperature=0.9, seed=2**63 + 11, max_tokens=8, ignore_eos=True)
    prompt = references()[5]["prompt"][:40]
    (output,) = run(smollm2_path, [prompt], [params], {}, kv_cache_memory="64MB")
    tokens = output.outputs[0].token_ids

    def at_token(number: int, at: int) -> torch.Tensor:
        return perturbed(logits_after(smollm2_path, prompt + tokens[:at]), len(prompt) + at, params)

    drawn = [int(at_token(0, at).argmax()) for at in range(len(tokens))]
    assert find_partings([tokens], [drawn], at_token) == []
    greedy = [int(logits_after(smollm2_path, prompt + tokens[:at]).argmax()) for at in range(len(tokens))]
    assert tokens != greedy, "nothing was sampled after all"


@pytest.mark.parametrize(("num_cases", "num_tokens"), [(2, 12), (6, 48)], ids=["briefly", "longer"])
def test_a_few_cases(smollm2_path: Path, num_cases: int, num_tokens: int) -> None:
    check_few(partings(smollm2_path, num_cases, num_tokens, {}), num_cases)


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"max_num_batched_tokens": 64, "pipeline_depth": 1}])
def test_all_cases_to_their_end(smollm2_path: Path, way: dict[str, Any]) -> None:
    check_few(partings(smollm2_path, 50, 256, way), 50)


@pytest.mark.slow
def test_all_cases_in_every_way(smollm2_path: Path) -> None:
    """At least 500 requests, of which one may part at a near-tie."""
    found: list[Parting] = []
    num_requests = 0
    for way in ways(SMALL_CACHE).values():
        found += partings(smollm2_path, 50, 64, way)
        num_requests += 50
    assert num_requests >= REQUESTS_PER_TIE
    check_few(found, num_requests)
