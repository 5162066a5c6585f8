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
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from math import inf
from typing import Protocol

from octavo.core.acceptance import MAX_DRAFTS
from octavo.core.cost_model import CostModel

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

    Without a draft model the two are the same object, without a lookup `free` is empty.
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


class Economy:
    """What a step costs, and what it brings with so many drafts.

    `base_tokens` and `base_rows` are there whatever is chosen: one a request, and drafts of a fixed
    number with their `base_passes`. Where the step also computes a prompt's chunk, the seconds that
    the chunk adds to a plain step are left out. `trust` is the part of the expected tokens that can
    be counted on, `drafting_seconds` what drafting costs besides its passes.
    """

    __slots__ = ("_chunk_rows", "_chunk_seconds", "_hope", "_kv_tokens", "_sure_rows", "_sure_seconds",
                 "_target", "base_passes", "base_rows", "base_tokens", "drafting_seconds", "edges",
                 "max_rows", "pass_seconds", "plain_rate", "plain_seconds", "trust")  # fmt: skip

    def __init__(
        self,
        target: CostModel,
        *,
        batch: int,
        kv_tokens: int,
        chunk_rows: int,
        max_rows: int,
        pass_seconds: float,
        drafting_seconds: float,
        trust: float,
        fixed: Sequence[tuple[float, float, int]] = (),  # tokens, rows and passes of fixed drafts
    ) -> None:
        self._target = target
        self._sure_rows, self._sure_seconds, self._hope = inf, 0.0, 0.0
        self._kv_tokens = kv_tokens
        self._chunk_rows = chunk_rows
        self._chunk_seconds = 0.0
        self.plain_seconds = target.seconds(batch, kv_tokens)
        if chunk_rows:
            self._chunk_seconds = target.seconds(chunk_rows + batch, kv_tokens) - self.plain_seconds
        self.base_tokens = batch + sum(tokens for tokens, _, _ in fixed)
        self.base_rows = batch + sum(rows for _, rows, _ in fixed)
        self.base_passes = max((passes for _, _, passes in fixed), default=0)
        self.max_rows = max_rows
        self.pass_seconds = pass_seconds
        self.drafting_seconds = drafting_seconds
        self.trust = trust
        # Where the seconds bend or jump.
        self.edges = [edge - chunk_rows for edge in target.edges] if chunk_rows else target.edges
        self.plain_rate = self.base_tokens / self.seconds(self.base_rows)

    def seconds(self, rows: float) -> float:
        """A step with so many rows besides the chunk, without drafting."""
        seconds = self._target.seconds(self._chunk_rows + rows, self._kv_tokens) - self._chunk_seconds
        if rows > self._sure_rows:
            seconds -= self._hope * (seconds - self._sure_seconds)
        return seconds

    def hoping(self, rows: float, share: float) -> Economy:
        """The same, where what draft rows beyond `rows` add may be too much by this share of it."""
        found = copy(self)
        found._sure_rows, found._hope = self.base_rows + rows, share
        found._sure_seconds = self.seconds(found._sure_rows)
        return found

    def drafting(self, passes: int) -> float:
        """Seconds of making drafts with so many passes; those of fixed numbers are made anyway."""
        return self.drafting_seconds + max(0, passes - self.base_passes) * self.pass_seconds

    def rate(self, tokens: float, rows: float, passes: int) -> float:
        """Tokens a second with drafts that are expected to bring `tokens` with `rows`."""
        if rows <= 0.0:
            return self.plain_rate
        seconds = self.seconds(self.base_rows + rows) + self.drafting(passes)
        return (self.base_tokens + self.trust * tokens) / seconds

    def row_price(self, rows: float, step: float, rate: float) -> float:
        """What one more draft row costs in tokens, after `rows` (or one less, with step < 0)."""
        here = self.base_rows + rows
        there = max(self.base_rows, here + step)
        return rate * (self.seconds(there) - self.seconds(here)) / step


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


def choose(candidates: Sequence[Candidate], economy: Economy, passes_now: int = 0) -> Choice:
    """The choice with the most expected tokens a second.

    Not every number of passes is tried: those around `passes_now`, the number in force, and a few
    far from it.
    """
    if len(candidates) == 1:
        return _choose_alone(candidates[0], economy)
    free = [[0.0] * LEVELS for _ in range(MAX_DRAFTS)]
    passed = [[0.0] * LEVELS for _ in range(MAX_DRAFTS)]
    most_passes = 0
    for candidate in candidates:
        curve = candidate.free
        rows = curve.rows
        # A curve may be shorter than the table.
        for counts, level in zip(free, curve.levels):  # noqa: B905
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
    best = Choice(0, LEVELS, 0.0, economy.plain_rate)
    worth_trying = {0, 1, 2, 3, passes_now // 2, passes_now - 1, passes_now, passes_now + 1, 2 * passes_now}
    for passes in range(most_passes + 1):
        if passes:
            added, removed = passed[passes - 1], free[passes - 1]
            total = [t + a - r for t, a, r in zip(total, added, removed, strict=True)]
        if passes in worth_trying and any(total):
            found = _walk(total, economy, passes)
            if found.rate > best.rate:
                best = found
    return best


def _choose_alone(candidate: Candidate, economy: Economy) -> Choice:
    """With one request each number of drafts can simply be tried."""
    best = Choice(0, LEVELS, 0.0, economy.plain_rate, 0)
    has_model = candidate.passed is not candidate.free
    most = max(len(candidate.free.levels), len(candidate.passed.levels))
    for count in range(1, min(most, economy.max_rows) + 1):
        for passes in (0, count) if has_model else (0,):
            tokens, rows = expected(candidate, count, passes)
            rate = economy.rate(tokens, rows, passes)
            if rate > best.rate:
                best = Choice(passes, 0, rows, rate, count)
    return best


def _walk(rows_at: Sequence[float], economy: Economy, passes: int) -> Choice:
    """From the most probable drafts down.

    Between two edges of the cost the rate has no inner maximum, so only edges and the ends of
    levels are looked at.
    """
    seconds, edges, drafting = economy.seconds, economy.edges, economy.drafting(passes)
    best = Choice(passes, LEVELS, 0.0, 0.0)
    tokens, here = economy.base_tokens, float(economy.base_rows)
    last = here + economy.max_rows
    for level in range(LEVELS - 1, -1, -1):
        count = rows_at[level]
        if count < 1e-9:
            continue
        chance = economy.trust * (level + 0.5) / LEVELS
        end = min(here + count, last)
        index = bisect_right(edges, here)
        while True:
            stop = min(edges[index], end) if index < len(edges) else end
            rate = (tokens + chance * (stop - here)) / (seconds(stop) + drafting)
            if rate > best.rate:
                best = Choice(passes, level, stop - here, rate)
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
