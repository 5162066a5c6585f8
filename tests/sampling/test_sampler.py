"""The sampler with its torch kernels: right distribution, right kept sets, right order, right seeds."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from octavo.core.messages import TokenLogprobs
from octavo.core.mix import mix64
from octavo.sampling.batch import SamplingBatch
from octavo.sampling.sampler import (
    NO_TOKEN,
    Sampler,
    SamplerOutput,
    TorchDraw,
    kept_tokens,
    token_logprobs,
)
from octavo.sampling_params import SamplingParams
from tests.sampling.helpers import make_batch, random_logits

INF = float("inf")
SAMPLER = Sampler(TorchDraw())


def draw(logits: torch.Tensor, params: list[SamplingParams], **options: object) -> list[int]:
    batch = make_batch(params, vocab_size=logits.shape[1], **options)  # type: ignore[arg-type]
    tokens: list[int] = SAMPLER(logits.clone(), batch).tokens.tolist()
    return tokens


def oracle_kept(
    logits: npt.NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> list[int]:
    """The definition, token by token, in float64."""
    order = sorted((i for i in range(len(logits)) if logits[i] > -INF), key=lambda i: (-float(logits[i]), i))
    if top_k > 0:
        order = order[:top_k]
    weights = [math.exp((float(logits[i]) - float(logits[order[0]])) / temperature) for i in order]
    total = math.fsum(weights)
    if top_p < 1.0:
        count = next(
            (n for n in range(1, len(order) + 1) if math.fsum(weights[:n]) >= top_p * total), len(order)
        )
        order, weights = order[:count], weights[:count]
    return sorted(i for i, weight in zip(order, weights, strict=True) if weight >= min_p)


# -- kept sets


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (7, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 0.05, 0.0),
        (0, 1.0, 0.1),
        (50, 0.7, 0.02),
        (5000, 0.999, 0.0),
        (3, 0.5, 1.0),
    ],
)
def test_kept_sets_equal_the_float64_oracle(
    vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    for seed in range(3):
        row = random_logits(1, vocab_size, seed)[0]
        found = kept_tokens(row, temperature, top_k, top_p, min_p).tolist()
        assert found == oracle_kept(row.numpy(), temperature, top_k, top_p, min_p)


@given(
    values=st.lists(st.sampled_from([-INF, -2.0, -1.0, 0.0, 1.0, 1.5]), min_size=1, max_size=40),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1.0, 0.95, 0.61, 0.33, 0.011]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
@settings(max_examples=300)
def test_kept_sets_with_ties_and_masks(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    row = torch.tensor(values)
    found = kept_tokens(row, 1.0, top_k, top_p, min_p).tolist()
    if max(values) == -INF:
        assert found == []
    else:
        assert found == oracle_kept(row.numpy(), 1.0, top_k, top_p, min_p)


def test_ties_go_to_the_lowest_ids_and_top_k_is_exact() -> None:
    row = torch.tensor([0.0, 5.0, 5.0, 5.0, 7.0, 5.0])
    assert kept_tokens(row, 1.0, 3, 1.0, 0.0).tolist() == [1, 2, 4]
    assert kept_tokens(torch.zeros(100), 1.0, 10, 1.0, 0.0).tolist() == list(range(10))
    assert kept_tokens(torch.zeros(100), 1.0, 0, 0.25, 0.0).tolist() == list(range(25))
    assert kept_tokens(torch.zeros(100), 1.0, 0, 1e-9, 0.0).tolist() == [0]


@pytest.mark.parametrize("seed", range(5))
def test_kept_sets_equal_transformers_warpers(seed: int) -> None:
    logits = random_logits(1, 500, seed)
    for temperature, top_k, top_p, min_p in [(0.7, 40, 0.9, 0.0), (1.0, 0, 0.8, 0.0), (1.5, 100, 0.95, 0.05)]:
        warpers = LogitsProcessorList()
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            warpers.append(MinPLogitsWarper(min_p))
        theirs = warpers(torch.zeros(1, 1, dtype=torch.int64), logits / temperature)  # type: ignore[arg-type]
        expected = torch.nonzero(theirs[0] > -INF)[:, 0].tolist()
        assert kept_tokens(logits[0], temperature, top_k, top_p, min_p).tolist() == expected


# -- the draw


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.2)],
)
def test_draws_follow_the_softmax_of_the_kept_tokens(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Chi-square over 3,000 positions; the seed is fixed, the bound is that of p = 0.001."""
    num, vocab_size = 3000, 20
    row = random_logits(1, vocab_size, 5, scale=1.5)[0]
    kept = kept_tokens(row, temperature, top_k, top_p, min_p)
    probabilities = (row[kept].double() / temperature).softmax(0)
    batch = SamplingBatch(
        temperature=torch.full((num,), temperature),
        top_k=torch.full((num,), top_k, dtype=torch.int32),
        top_p=torch.full((num,), top_p),
        min_p=torch.full((num,), min_p),
        seed=torch.full((num,), 11),
        position=torch.arange(num),
    )
    tokens = SAMPLER(row.repeat(num, 1), batch).tokens
    counts = torch.bincount(tokens, minlength=vocab_size).double()
    assert int(counts.sum()) == int(counts[kept].sum()) == num
    expected = probabilities * num
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = len(kept) - 1
    # Wilson and Hilferty's approximation of the chi-square quantile
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


def test_the_draw_is_the_argmax_of_logit_and_noise_over_the_whole_row() -> None:
    """Leaving out tokens too far below the best must not change any draw."""
    from octavo.sampling.noise import exponentials, noise_words

    vocab_size = 3000
    logits = random_logits(20, vocab_size, 3, scale=8.0)
    for temperature in (0.2, 1.0, 5.0):
        params = [SamplingParams(temperature=temperature, seed=row * 7919) for row in range(20)]
        found = draw(logits, params)
        rounded = float(torch.tensor(temperature))
        for row in range(20):
            noise = exponentials(noise_words(row * 7919, 10, torch.arange(vocab_size))).log()
            assert found[row] == int((logits[row].double() / rounded - noise).argmax())


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = random_logits(12, 300, 1)
    params = [
        SamplingParams(temperature=0.0 if row % 5 == 0 else 1.0, seed=row, top_k=row * 3, top_p=1 - row / 20)
        for row in range(12)
    ]
    positions = list(range(3, 15))
    together = draw(logits, params, positions=positions)
    assert together == draw(logits, params, positions=positions)  # nothing is kept between calls
    alone = [draw(logits[r : r + 1], params[r : r + 1], positions=positions[r : r + 1])[0] for r in range(12)]
    assert together == alone
    order = [7, 3, 11, 0, 1, 2, 4, 5, 6, 8, 9, 10]
    shuffled = draw(logits[order], [params[r] for r in order], positions=[positions[r] for r in order])
    assert shuffled == [together[r] for r in order]


def test_other_seeds_positions_and_children_draw_differently() -> None:
    flat = torch.zeros(40, 10_000)
    params = [SamplingParams()] * 40
    by_seed = draw(flat, params, seeds=list(range(40)))
    by_position = draw(flat, params, positions=list(range(1, 41)), seeds=[0] * 40)
    by_child = draw(flat, params, seeds=[mix64(123, i) for i in range(40)])
    for tokens in (by_seed, by_position, by_child):
        assert len(set(tokens)) > 35
    assert len(set(by_seed + by_child)) > 70


def test_greedy_takes_the_lowest_id_of_the_greatest_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [-INF, -INF, -2.0, -3.0]])
    greedy = [SamplingParams(temperature=0, top_k=2, min_p=0.5, seed=row) for row in range(3)]
    assert draw(logits, greedy) == [1, 0, 2]
    mixed = [*greedy[:2], SamplingParams(temperature=1.0, top_k=1)]
    assert draw(logits, mixed) == [1, 0, 2]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.zeros(200, 50)
    params = [
        SamplingParams(allowed_token_ids=[3, 49], top_k=10, logit_bias={3: 5.0}, seed=i) for i in range(200)
    ]
    tokens = draw(logits, params)
    assert set(tokens) == {3, 49}
    assert tokens.count(3) > 180


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_legal_token_is_flagged_and_harms_no_other(temperature: float) -> None:
    logits = random_logits(4, 30)
    logits[1] = -INF
    logits[2] = math.nan
    logits[3, 5:] = math.nan
    params = [SamplingParams(temperature=temperature, seed=9, top_p=0.9)] * 4
    tokens = draw(logits, params)
    assert tokens[0] == draw(logits[:1], params[:1])[0]
    assert tokens[1:3] == [NO_TOKEN, NO_TOKEN]
    assert 0 <= tokens[3] < 5
    only = SamplingParams(temperature=temperature, allowed_token_ids=[2], min_tokens=3)
    assert draw(logits[:1], [only], stop_ids=[2]) == [NO_TOKEN]


def test_infinite_logits_are_drawn_without_a_crash() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 4] = INF
    assert draw(logits, [SamplingParams(top_p=0.5), SamplingParams(temperature=0)]) == [4, 4]


def test_padding_rows_are_passed_over() -> None:
    batch = make_batch([SamplingParams(), SamplingParams()], vocab_size=20)
    batch.position[1] = -1
    assert SAMPLER(torch.zeros(2, 20), batch).tokens.shape == (2,)


# -- log-probabilities


def one(output: SamplerOutput, row: int) -> TokenLogprobs:
    assert output.logprobs is not None
    found = output.logprobs[row]
    assert found is not None
    return found


def test_logprobs_are_of_the_raw_logits_whatever_changed_them() -> None:
    logits = random_logits(4, 200)
    raw = torch.log_softmax(logits, dim=-1)
    params = [
        SamplingParams(logprobs=5, temperature=0.3, logit_bias={7: 50.0}),
        SamplingParams(),
        SamplingParams(logprobs=0, repetition_penalty=2.0, temperature=0),
        SamplingParams(logprobs=3, top_k=1),
    ]
    output = SAMPLER(logits.clone(), make_batch(params, vocab_size=200))
    tokens = output.tokens.tolist()
    assert tokens[0] == 7
    assert output.logprobs is not None
    assert output.logprobs[1] is None
    for row, count in ((0, 5), (2, 0), (3, 3)):
        found = one(output, row)
        assert found.logprob == float(raw[row, tokens[row]])
        assert found.rank == int((raw[row] > raw[row, tokens[row]]).sum()) + 1
        expected = raw[row].topk(count)
        assert found.top_ids == expected.indices.tolist()
        assert found.top_logprobs == expected.values.tolist()
    assert one(output, 3).rank == 1


def test_logprobs_leave_the_logits_alone() -> None:
    logits = random_logits(3, 50)
    before = logits.clone()
    batch = make_batch([SamplingParams(logprobs=2)] * 3, vocab_size=50)
    SAMPLER(logits, batch)
    assert torch.equal(logits, before)


def logprobs_of(logits: torch.Tensor, tokens: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    return token_logprobs(SAMPLER.logprobs(logits, torch.tensor(tokens), max(num_top)), num_top)


def test_top_logprobs_break_ties_by_the_lowest_id_and_equals_share_a_rank() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 1.0]])
    found = logprobs_of(logits, [4], [4])[0]
    assert found.top_ids == [1, 3, 0, 2]
    assert found.rank == 3
    assert logprobs_of(logits, [1], [100])[0].top_ids == [1, 3, 0, 2, 4, 5]
    assert logprobs_of(logits, [NO_TOKEN], [0])[0] == (-INF, 0, [], [])


def test_the_top_list_holds_what_each_row_asked_for() -> None:
    logits = random_logits(3, 40)
    found = logprobs_of(logits, [1, 2, 3], [0, 7, 2])
    assert [len(entry.top_ids) for entry in found] == [0, 7, 2]
    assert [len(entry.top_logprobs) for entry in found] == [0, 7, 2]
