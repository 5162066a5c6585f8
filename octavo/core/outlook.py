"""What speculation should bring, from what steps take: for `octavo plan`, before anything is served.

With drafts that are accepted with chance a each, if those before were, a step with k of them brings

    1 + a + a² + … + a^k     tokens a request instead of 1,

and takes the target's pass over batch · (k + 1) rows instead of batch, and k draft passes. The draft
budget decides by the same arithmetic, with what it observes in place of a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.core.acceptance import MAX_DRAFTS
from octavo.core.cost_model import CostModel

BATCHES = (1, 8, 64)
ACCEPTANCES = (0.3, 0.5, 0.7, 0.9)
CONTEXT = 512  # tokens of each request
_ROUNDING = 1e-9
_STEPS = 40  # of the search for a break-even: far finer than it is printed


@dataclass(frozen=True, slots=True)
class Prospect:
    """One batch size."""

    batch: int
    plain_seconds: float  # a step without drafts
    pass_seconds: float  # one draft pass; 0 for drafters without one
    break_even: float | None  # the least acceptance that pays; None: not even drafts that are all right do
    gains: tuple[tuple[float, int], ...]  # for each of ACCEPTANCES: speed-up, and the drafts it takes


def prospects(
    target: CostModel,
    draft: CostModel | None,
    context: int,
    max_rows: int,
    *,
    fixed: int | None = None,
    batches: Sequence[int] = BATCHES,
) -> list[Prospect]:
    """For each batch size that a step of max_rows rows can hold.

    draft: None where drafts cost no pass. fixed: the number of drafts, None for the best one.
    """
    found = []
    for batch in batches:
        if batch > max_rows:
            continue
        case = _Case(target, draft, batch, batch * context, max_rows, fixed)
        gains = tuple(case.best(acceptance) for acceptance in ACCEPTANCES)
        found.append(Prospect(batch, case.plain, case.draft_pass, case.break_even(), gains))
    return found


class _Case:
    """One batch size: the time of a step by its number of drafts."""

    def __init__(
        self,
        target: CostModel,
        draft: CostModel | None,
        batch: int,
        kv_tokens: int,
        max_rows: int,
        fixed: int | None,
    ) -> None:
        self.plain = target.seconds(batch, kv_tokens)
        self.draft_pass = draft.seconds(batch, kv_tokens) if draft is not None else 0.0
        most = min(MAX_DRAFTS, max_rows // batch - 1)
        self._counts = range(most + 1) if fixed is None else (min(fixed, most),)
        self._seconds = {
            count: target.seconds(batch * (1 + count), kv_tokens) + count * self.draft_pass
            for count in self._counts
        }

    def best(self, acceptance: float) -> tuple[float, int]:
        """The best speed-up, and the number of drafts that brings it: 0 if none does."""
        speedups = [
            (sum(acceptance**i for i in range(count + 1)) * self.plain / seconds, count)
            for count, seconds in self._seconds.items()
        ]
        return max(speedups, key=lambda pair: (pair[0], -pair[1]))

    def break_even(self) -> float | None:
        """By halving: what pays at one acceptance pays at every higher one."""
        if self.best(1.0)[0] <= 1.0 + _ROUNDING:
            return None
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if self.best(middle)[0] > 1.0 + _ROUNDING:
                high = middle
            else:
                low = middle
        return high
