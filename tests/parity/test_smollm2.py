"""SmolLM2 says what transformers said: 50 prompts of 256 tokens, 256 greedy tokens each, float32.

The reference is tests/parity/smollm2_greedy.json (see make_references.py). Each run checks that it
belongs to the weights at hand and recomputes a part of it with transformers.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from tests.parity.make_references import load_model, reference, weights_checksum

TIE = 1e-4
REFERENCES = Path(__file__).with_name("smollm2_greedy.json")


@cache
def references() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(REFERENCES.read_text(encoding="utf-8"))
    return content


def differing(path: Path, num_cases: int, num_tokens: int, **options: Any) -> list[str]:
    """Run the first cases in one call; one line for each that parts from its reference."""
    cases = references()["cases"][:num_cases]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    options = {"dtype": "float32", "kv_cache_memory": "1500MB", "max_num_seqs": 64, **options}
    with LLM(str(path), **options) as llm:
        outputs = llm.generate([case["prompt"] for case in cases], params, use_tqdm=False)
    found = []
    for number, (case, output) in enumerate(zip(cases, outputs, strict=True)):
        mine, theirs = output.outputs[0].token_ids, case["tokens"][:num_tokens]
        if mine != theirs:
            at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            found.append(f"case {number} at token {at}; the smallest gap is {case['smallest_gap']}")
            assert case["smallest_gap"][0] <= at, "an earlier token was nearer to a tie"
            assert case["smallest_gap"][1] < TIE, found[-1]
    return found


def test_the_references_belong_to_these_weights(smollm2_path: Path) -> None:
    assert weights_checksum(smollm2_path) == references()["weights_sha256"]


def test_transformers_still_says_the_same(smollm2_path: Path) -> None:
    case = references()["cases"][3]
    tokens, _ = reference(load_model(smollm2_path), case["prompt"], 12)
    assert tokens == case["tokens"][:12]


def test_a_few_cases(smollm2_path: Path) -> None:
    assert differing(smollm2_path, 6, 48) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_chunk_tokens": 7, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 64, "pipeline_depth": 1},
        {"kv_cache_memory": "160MB"},  # 3,600 tokens for 50 requests of 512: preemption
    ],
    ids=["together", "alone", "chunks-of-7", "small-steps", "preempted"],
)
def test_all_cases(smollm2_path: Path, options: dict[str, Any]) -> None:
    assert len(differing(smollm2_path, 50, 256, **options)) <= 1
