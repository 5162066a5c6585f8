"""The comparison itself: it forgives near-ties, few of them, and nothing else."""

from __future__ import annotations

import pytest
import torch

from octavo.sampling_params import SamplingParams
from tests.parity.ties import TIE, Parting, check_few, find_partings, perturbed


def scores_with_gap(gap: float, second: int = 4) -> torch.Tensor:
    """Ten scores: token 3 is best, `second` is `gap` behind, all others far off."""
    scores = torch.full((10,), -5.0, dtype=torch.float64)
    scores[3], scores[second] = 1.0, 1.0 - gap
    return scores


def test_equal_runs_are_not_looked_at() -> None:
    def never(number: int, at: int) -> torch.Tensor:
        raise AssertionError("the scores were asked for")

    assert find_partings([[1, 2], [3]], [[1, 2], [3]], never) == []


def test_a_near_tie_is_found_with_its_place_and_gap() -> None:
    asked = []

    def scores(number: int, at: int) -> torch.Tensor:
        asked.append((number, at))
        return scores_with_gap(5e-5)

    (found,) = find_partings([[7], [1, 4, 9]], [[7], [1, 3, 8]], scores)
    assert asked == [(1, 1)]  # what comes after a parting is another text
    assert (found.request, found.at, found.mine, found.theirs) == (1, 1, 4, 3)
    assert found.gap == pytest.approx(5e-5)
    assert "request 1 parts at token 1: 4 or 3" in str(found)


@pytest.mark.parametrize("gap", [1.01 * TIE, 2e-4, 0.5])
def test_a_wider_gap_is_a_defect_whichever_run_is_right(gap: float) -> None:
    for mine, theirs in ([3], [4]), ([4], [3]):
        with pytest.raises(AssertionError, match="no near-tie"):
            find_partings([mine], [theirs], lambda number, at: scores_with_gap(gap))


def test_two_that_agree_with_each_other_must_agree_with_the_best() -> None:
    """Tokens 5 and 6 are tied, and both are wrong."""
    scores = scores_with_gap(0.5)
    with pytest.raises(AssertionError, match="no near-tie"):
        find_partings([[5]], [[6]], lambda number, at: scores)


def test_a_text_that_ends_early_is_no_tie() -> None:
    with pytest.raises(AssertionError, match="has 2 tokens in one run and 3 in the other"):
        find_partings([[1, 2]], [[1, 2, 3]], lambda number, at: scores_with_gap(0))


def test_near_ties_must_be_few(capsys: pytest.CaptureFixture[str]) -> None:
    one = Parting(3, 1, 4, 5, 2e-5)
    check_few([], 1)
    check_few([one], 500)
    assert "1 near-ties in 500 requests\nrequest 3 parts at token 1: 4 or 5" in capsys.readouterr().out
    for partings, num_requests in ([one], 499), ([one, one], 999):
        with pytest.raises(AssertionError, match=f"of {num_requests} requests part"):
            check_few(partings, num_requests)
    check_few([one, one], 1000)


def test_noise_depends_on_place_and_seed_alone() -> None:
    logits = torch.zeros(50)
    params = SamplingParams(temperature=2.0, seed=5)
    here = perturbed(logits, 7, params)
    assert torch.equal(here, perturbed(logits, 7, params))
    assert not torch.equal(here, perturbed(logits, 8, params))
    assert not torch.equal(here, perturbed(logits, 7, params.replace(seed=6)))
    assert torch.equal(perturbed(logits, 7, params.replace(temperature=0.0)), logits.double())
    # the logits are divided by the temperature, the noise is not
    assert torch.allclose(perturbed(logits + 3.0, 7, params), here + 1.5)
