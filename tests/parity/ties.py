"""Where two runs of the same requests part: at a near-tie, or at a defect.

Float32 sums in another order differ in their last bits, so two correct engines may choose
differently where the two best scores are nearly equal, and from there on their texts differ. (A
score is what the choice is the greatest of: a logit for a greedy request, logit/T + noise for one
that samples.) Such a parting is forgiven only if an independent computation of the scores at that
very token finds both choices within TIE of the best, and only for one request in REQUESTS_PER_TIE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from octavo.core.mix import mix64
from octavo.sampling.noise import exponentials, noise_words
from octavo.sampling_params import SamplingParams

TIE = 1e-4
REQUESTS_PER_TIE = 500

# (number of the request, index of the output token) -> the scores of all tokens there  # [vocab]
Scores = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Parting:
    """Two runs of one request choose differently, at a near-tie."""

    request: int
    at: int  # index of the first output token that differs
    mine: int
    theirs: int
    gap: float  # from the best score to the lesser of the two

    def __str__(self) -> str:
        return (
            f"request {self.request} parts at token {self.at}: {self.mine} or {self.theirs}, "
            f"whose scores are within {self.gap:.1e} of the best"
        )


def find_partings(
    mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], scores: Scores
) -> list[Parting]:
    """The requests whose two runs part at a near-tie; an AssertionError for one that parts elsewhere."""
    found = []
    for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        if list(one) == list(other):
            continue
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        assert at is not None, (
            f"request {number} has {len(one)} tokens in one run and {len(other)} in the other"
        )
        there = scores(number, at)
        parting = Parting(
            number, at, one[at], other[at], float(there.max() - min(there[one[at]], there[other[at]]))
        )
        assert parting.gap < TIE, f"no near-tie: {parting}"
        found.append(parting)
    return found


def check_few(partings: Sequence[Parting], num_requests: int) -> None:
    """Report the near-ties; more than one in REQUESTS_PER_TIE requests is an AssertionError."""
    report = "\n".join(map(str, partings))
    print(f"{len(partings)} near-ties in {num_requests} requests\n{report}".strip())
    allowed = num_requests // REQUESTS_PER_TIE
    assert len(partings) <= allowed, (
        f"{len(partings)} of {num_requests} requests part, not {allowed}\n{report}"
    )


def perturbed(logits: torch.Tensor, position: int, params: SamplingParams) -> torch.Tensor:
    """The scores of a request without top-k, top-p, min-p, masks and penalties.  # [vocab] float64

    logits [vocab] are those that choose the token at `position`, counted from the prompt's first.
    """
    if params.is_greedy:
        return logits.double()
    assert params.seed is not None
    words = noise_words(mix64(params.seed, 0), position, torch.arange(len(logits)))
    return logits.double() / params.temperature - exponentials(words).log()
