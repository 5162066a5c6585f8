"""SmolLM2 in bfloat16: the same tokens and log-probabilities, bit for bit, however the requests are run.

With deterministic=True on every machine that has Octavo's CPU kernels, and by default wherever these
are what a machine gets. Half of the requests sample, with the filters and penalties that need the
whole vocabulary; many begin alike. In float32, where it is allowed to differ at near-ties, too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.kernels.cpu.choose import choose
from octavo.sampling_params import SamplingParams
from tests.parity.test_smollm2 import logits_after, references
from tests.parity.ties import Parting, check_few, find_partings, perturbed
from tests.parity.ways import assert_same_bits, run, ways

SMALL_CACHE = 120  # blocks: 1,920 tokens, of the 4,900 that 64 requests hold


def make_requests(
    count: int, num_tokens: int, lengths: Sequence[int] = (1, 7, 16, 33, 64, 100)
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of these lengths, every third behind 48 common tokens, and all kinds of sampling."""
    rng = random.Random(11)
    cases = references()
    prompts, params = [], []
    for index in range(count):
        own = cases[index % len(cases)]["prompt"][index % 7 :]
        own = own[: rng.choice(lengths)]
        prompts.append(cases[0]["prompt"][:48] + own if index % 3 == 0 else own)
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 0.0, "repetition_penalty": 1.2},
            {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "frequency_penalty": 0.3},
            {"temperature": 1.3, "min_p": 0.02},
        ]
        params.append(
            SamplingParams(
                **kinds[index % len(kinds)], seed=index, max_tokens=num_tokens, ignore_eos=True, logprobs=2
            )
        )
    return prompts, params


def test_the_same_bits(smollm2_path: Path) -> None:
    """A small form: a few short requests, the ways that differ most."""
    prompts, params = make_requests(10, 24, lengths=(1, 7, 16, 33))
    options: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_memory": "64MB", "deterministic": True}
    plain = run(smollm2_path, prompts, params, {}, **options)
    alone = {"max_num_seqs": 1, "enable_prefix_caching": False}
    late = {"max_chunk_tokens": 7, "pipeline_depth": 1, "rebuild": True, "blocks": 14}
    for way in (alone, late):
        assert_same_bits(run(smollm2_path, prompts, params, way, **options), plain, str(way))


def test_a_planted_difference_is_found(smollm2_path: Path) -> None:
    """Another seed changes tokens; a bias too small to change any changes log-probabilities."""
    prompts, params = make_requests(3, 4)
    options: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_memory": "64MB"}
    plain = run(smollm2_path, prompts, params, {}, **options)
    assert_same_bits(plain, run(smollm2_path, prompts, params, {}, **options), "again")
    other = [*params[:1], params[1].replace(seed=99), *params[2:]]
    with pytest.raises(AssertionError, match="planted: request 1 has another token"):
        assert_same_bits(run(smollm2_path, prompts, other, {}, **options), plain, "planted")
    nudged = run(smollm2_path, prompts, params, {}, **{**options, "attention_backend": "torch"})
    with pytest.raises(AssertionError, match="planted: request 0 has other log-probabilities"):
        assert_same_bits(nudged, plain, "planted")


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_every_way_gives_the_same_bits(smollm2_path: Path, deterministic: bool) -> None:
    if not deterministic and choose(torch.bfloat16).name != "octavo":
        pytest.skip("this machine's default kernels are not Octavo's, and promise nothing")
    prompts, params = make_requests(64, 24)
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_cache_memory": "500MB",
        "deterministic": deterministic,
    }
    plain = run(smollm2_path, prompts, params, {}, **options)
    for name, way in ways(SMALL_CACHE).items():
        assert_same_bits(run(smollm2_path, prompts, params, way, **options), plain, name)


@pytest.mark.slow
def test_every_way_gives_the_same_float32_up_to_near_ties(smollm2_path: Path) -> None:
    """Greedy and sampled without filters: those are the ones whose scores another engine can compute."""
    prompts, params = make_requests(64, 24)
    plain_kinds = [params[index % 2].replace(seed=index, logprobs=None) for index in range(64)]
    outputs = [
        [
            output.outputs[0].token_ids
            for output in run(smollm2_path, prompts, plain_kinds, way, kv_cache_memory="1GB")
        ]
        for way in ways(SMALL_CACHE).values()
    ]

    def scores(number: int, at: int) -> torch.Tensor:
        tokens = prompts[number] + outputs[0][number][:at]
        return perturbed(logits_after(smollm2_path, tokens), len(tokens), plain_kinds[number])

    found: list[Parting] = []
    for mine in outputs[1:]:
        found += find_partings(mine, outputs[0], scores)
    check_few(found, 64 * (len(outputs) - 1))
