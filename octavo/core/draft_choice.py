"""Which drafts are worth a row: the best number of draft passes, then the best drafts under it.

All that matters of a request here is its curve: the chances that its drafts 1, 2, … are accepted.
A step's time depends on how many rows it has, not on whose rows they are, so for any number of rows
the best drafts are the most probable ones. They are counted by position and by chance, rounded to
1/40; then, for each number of passes, one walk from the most probable to the least sees every
number of rows worth considering. Its cost hardly depends on the number of requests.

Drafts found by lookup need no pass. Those of a draft model end at the number of passes. A request
may have both: the lookup where it matches, the model otherwise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from octavo.core.acceptance import MAX_DRAFTS

LEVELS = 40
_HOPELESS = 0.9  # of the best rate: a walk that has fallen so low does not come back


class Curve:
    """The drafts of one request: chances as levels, and cumulated as expected tokens.

    `rows` is what one draft is expected to cost: 1, or the chance of a match where rows without a
    match are not computed. A level belongs to a *row that is computed*.
    """

    __slots__ = ("gains", "levels", "rows")

    def __init__(self, chances: Sequence[float] = (), rows: float = 1.0) -> None:
        self.rows = rows
        self.levels = [int(chance * LEVELS) if chance < 1.0 else LEVELS - 1 for chance in chances]
        self.gains = gains = [0.0]
        total = 0.0
        for chance in chances:
            total += chance * rows
            gains.append(total)

    def gain(self, count: int) -> float:
        """Expected accepted tokens of the first `count` drafts."""
        gains = self.gains
        return gains[count] if count < len(gains) else gains[-1]


NOTHING = Curve()


class Candidate(Protocol):
    """A request as seen from here: `free` holds without a draft pass, `passed` where one is made.

    Without a draft model the two are the same curve, without a lookup `free` is empty.
    """

    free: Curve
    passed: Curve


def expected(candidate: Candidate, count: int, passes: int) -> tuple[float, float]:
    """The tokens and the rows that `count` drafts are expected to bring and to cost."""
    passed = candidate.passed
    if count <= passes:
        return passed.gain(count), passed.rows * count
    free = candidate.free
    gain = passed.gain(passes) + free.gain(count) - free.gain(passes)
    return gain, passed.rows * passes + free.rows * (count - passes)


@dataclass(slots=True)
class Choice:
    """So many passes, and every draft above `level`; `quota` rows of those at `level`.

    `count` is the answer itself where there is only one request.
    """

    passes: int
    level: int
    quota: float
    rate: float  # expected tokens a second
    count: int | None = None

    def drafts(self, candidates: Sequence[Candidate]) -> list[int]:
        """The number of drafts of each candidate."""
        if self.count is not None:
            return [self.count]
        if self.level >= LEVELS:
            return [0] * len(candidates)
        passes, level, quota = self.passes, self.level, self.quota
        counts: list[int] = []
        for candidate in candidates:
            count = 0
            for found in _levels(candidate, passes):
                if found < level:
                    break
                if found == level:
                    if quota <= 0.0:
                        break
                    quota -= candidate.passed.rows if count < passes else candidate.free.rows
                count += 1
            counts.append(count)
        return counts


def _levels(candidate: Candidate, passes: int) -> list[int]:
    if candidate.passed is candidate.free:
        return candidate.free.levels
    return candidate.passed.levels[:passes] + candidate.free.levels[passes:]


def choose(
    candidates: Sequence[Candidate],
    base_tokens: float,
    base_rows: int,
    max_draft_rows: int,
    seconds: Callable[[float], float],
    drafting_seconds: float,
    pass_seconds: float,
    edges: Sequence[float],
    passes_now: int = 0,
) -> Choice:
    """The choice with the most expected tokens a second.

    `seconds(rows)` is the time of a step without drafting, `drafting_seconds` what drafting adds
    in any case, `pass_seconds` one pass. `edges` are the numbers of rows where `seconds` bends or
    jumps. `base_tokens` and `base_rows` are there whatever is chosen. Not every number of passes is
    tried: those around `passes_now`, the number in force, and a few far from it.
    """
    if len(candidates) == 1:
        return _choose_alone(
            candidates[0], base_tokens, base_rows, max_draft_rows, seconds, drafting_seconds, pass_seconds
        )
    free = [[0.0] * LEVELS for _ in range(MAX_DRAFTS)]
    passed = [[0.0] * LEVELS for _ in range(MAX_DRAFTS)]
    most_passes = 0
    for candidate in candidates:
        curve = candidate.free
        rows = curve.rows
        for counts, level in zip(free, curve.levels):  # noqa: B905 - a curve may be shorter
            counts[level] += rows
        if candidate.passed is curve:
            for counts, level in zip(passed, curve.levels):  # noqa: B905
                counts[level] += rows
        else:
            curve = candidate.passed
            most_passes = max(most_passes, len(curve.levels))
            for counts, level in zip(passed, curve.levels):  # noqa: B905
                counts[level] += curve.rows
    total = [sum(column) for column in zip(*free, strict=True)]
    best = Choice(0, LEVELS, 0.0, base_tokens / seconds(base_rows))
    worth_trying = {0, 1, 2, passes_now // 2, passes_now - 1, passes_now, passes_now + 1, 2 * passes_now}
    for passes in range(most_passes + 1):
        if passes:
            added, removed = passed[passes - 1], free[passes - 1]
            total = [t + a - r for t, a, r in zip(total, added, removed, strict=True)]
        if passes not in worth_trying or not any(total):
            continue
        extra = drafting_seconds + passes * pass_seconds
        found = _walk(total, base_tokens, base_rows, max_draft_rows, seconds, extra, edges)
        found.passes = passes
        if found.rate > best.rate:
            best = found
    return best


def _choose_alone(
    candidate: Candidate,
    base_tokens: float,
    base_rows: int,
    max_draft_rows: int,
    seconds: Callable[[float], float],
    drafting_seconds: float,
    pass_seconds: float,
) -> Choice:
    """With one request each number of drafts can simply be tried."""
    best = Choice(0, LEVELS, 0.0, base_tokens / seconds(base_rows))
    has_model = candidate.passed is not candidate.free
    most = max(len(candidate.free.levels), len(candidate.passed.levels))
    for count in range(1, min(most, max_draft_rows) + 1):
        for passes in (0, count) if has_model else (0,):
            tokens, rows = expected(candidate, count, passes)
            time = seconds(base_rows + rows) + drafting_seconds + passes * pass_seconds
            rate = (base_tokens + tokens) / time
            if rate > best.rate:
                best = Choice(passes, 0, rows, rate, count)
    return best


def _walk(
    rows_at: Sequence[float],
    base_tokens: float,
    base_rows: int,
    max_draft_rows: int,
    seconds: Callable[[float], float],
    extra: float,
    edges: Sequence[float],
) -> Choice:
    """From the most probable drafts down. Between two edges the rate has no inner maximum, so
    only edges and the ends of levels are looked at."""
    best = Choice(0, LEVELS, 0.0, 0.0)
    tokens, here, last = base_tokens, float(base_rows), float(base_rows + max_draft_rows)
    for level in range(LEVELS - 1, -1, -1):
        count = rows_at[level]
        if count < 1e-9:
            continue
        chance = (level + 0.5) / LEVELS
        end = min(here + count, last)
        index = bisect_right(edges, here)
        while True:
            stop = min(edges[index], end) if index < len(edges) else end
            rate = (tokens + chance * (stop - here)) / (seconds(stop) + extra)
            if rate > best.rate:
                best = Choice(0, level, stop - here, rate)
            elif rate < _HOPELESS * best.rate:
                return best
            if stop >= end:
                break
            index += 1
        tokens += chance * (end - here)
        here = end
        if here >= last:
            break
    return best
