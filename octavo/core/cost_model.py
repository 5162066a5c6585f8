"""How long a forward pass takes, as far as we know.

    seconds(rows, kv_tokens) = speed · (table(rows) · correction(rows) + kv · kv_tokens)

`table` is measured once at the start, at a few numbers of rows, and interpolated between them;
`kv` is the time to read one token's KV. Every step that was run then corrects the model: `speed`
follows the machine as a whole (a neighbour, a throttled clock), a table entry's own correction
follows what the start-up measurement got wrong there. Machines are noisy and now and then a step
takes five times as long, so a surprise counts for at most `_MAX_SURPRISE` however large it is: the
estimates follow the middle of what is seen, not its mean.

The draft model has one of these as well: its rows are the requests of a draft pass.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

_MAX_SURPRISE = 0.25  # of log(observed / expected)
_SPEED_RATE = 0.04  # at last; the first observations count for more
_LOCAL_RATE = 0.04  # at last; the first observations of a table entry count for more
_FIRST_WEIGHT = 4.0  # observations that the measurement at the start is worth
_WELL_KNOWN = 24.0  # observations
_UNEVEN = 1.1  # how much worse than its parts a larger pass may be
_DELIBERATE_RATE = 0.15  # of a measurement that was made on purpose, and is rare


class CostModel:
    """Seconds of a pass with a number of token rows and of KV tokens to read.

    `table` holds (rows, seconds) pairs, measured with hardly any KV. With `padded_sizes` a pass is
    padded to the next of these sizes, as CUDA graphs are, and costs what that size costs; above the
    last of them it is not padded.
    """

    def __init__(
        self,
        table: Sequence[tuple[int, float]],
        seconds_per_kv_token: float = 0.0,
        padded_sizes: Sequence[int] = (),
    ) -> None:
        assert table, "the cost model needs at least one measurement"
        ordered = sorted(table)
        self._rows = [float(rows) for rows, _ in ordered]
        self._measured: list[float] = []
        for index, (rows, seconds) in enumerate(ordered):
            # More rows are never faster, and never slower than several passes of fewer; where the
            # measurement says so it was disturbed.
            if index:
                least = self._measured[-1]
                passes = math.ceil(rows / ordered[index - 1][0])
                seconds = min(max(seconds, least), _UNEVEN * passes * least)
            self._measured.append(max(seconds, 1e-9))
        self._values = list(self._measured)
        self._local = [0.0] * len(ordered)  # log of the correction of each entry
        self._weight = [0.0] * len(ordered)  # how much was seen of it
        self._kv = seconds_per_kv_token
        self._speed = 1.0
        self._seen = 0
        self._sizes = sorted(padded_sizes)
        # Where the cost of one more row changes: the best number of rows is often one of these.
        self.edges: list[int] = self._sizes or [int(rows) for rows in self._rows]

    def seconds(self, rows: float, kv_tokens: float = 0.0) -> float:
        """The expected time of one pass. `rows` may be a fraction: an expected number."""
        return self._speed * (self._base(rows) + self._kv * kv_tokens)

    def _base(self, rows: float) -> float:
        if self._sizes and rows <= self._sizes[-1]:
            rows = self._sizes[bisect_left(self._sizes, rows)]
        knots, values = self._rows, self._values
        high = bisect_left(knots, rows)
        if high == 0:
            return values[0]
        if high == len(knots):
            if high == 1:
                return values[0] * rows / knots[0]
            high -= 1  # straight on
        low = high - 1
        share = (rows - knots[low]) / (knots[high] - knots[low])
        return values[low] + share * (values[high] - values[low])

    def surprise(self, rows: int, kv_tokens: int, seconds: float) -> float:
        """log(observed / expected), bounded."""
        ratio = seconds / self.seconds(rows, kv_tokens)
        if ratio <= 0.0:
            return 0.0
        return max(-_MAX_SURPRISE, min(_MAX_SURPRISE, math.log(ratio)))

    def observe(self, rows: int, kv_tokens: int, seconds: float, deliberate: bool = False) -> None:
        """Correct the model by one pass that took `seconds`; more by a `deliberate` measurement."""
        if seconds <= 0.0:
            return
        surprise = self.surprise(rows, kv_tokens, seconds)
        base = self._base(rows)
        kv = self._kv * kv_tokens
        kv_share = kv / (base + kv)
        self._seen += 1
        self._kv *= math.exp(_LOCAL_RATE * surprise * kv_share)
        if self._sizes and rows <= self._sizes[-1]:
            rows = self._sizes[bisect_left(self._sizes, rows)]
        high = min(bisect_left(self._rows, rows), len(self._rows) - 1)
        low = max(high - 1, 0)
        share = 1.0
        if low < high and rows < self._rows[high]:
            share = max(0.0, (rows - self._rows[low]) / (self._rows[high] - self._rows[low]))
        # Where little was seen of these sizes and much of others, it is the measurement that was wrong
        # here, and not the machine that has become slower.
        known = _FIRST_WEIGHT + share * self._weight[high] + (1.0 - share) * self._weight[low]
        known /= _FIRST_WEIGHT + min(_WELL_KNOWN, max(self._weight))
        self._speed *= math.exp(min(1.0, known) * max(_SPEED_RATE, 0.5 / self._seen) * surprise)
        self._correct(low, 1.0 - share, surprise * (1.0 - kv_share), deliberate)
        self._correct(high, share, surprise * (1.0 - kv_share), deliberate)

    def _correct(self, index: int, share: float, surprise: float, deliberate: bool) -> None:
        if share <= 0.0:
            return
        self._weight[index] += share * share
        least = _DELIBERATE_RATE if deliberate else _LOCAL_RATE
        rate = max(least, 1.0 / (self._weight[index] + _FIRST_WEIGHT))
        self._local[index] += rate * share * surprise
        self._values[index] = self._measured[index] * math.exp(self._local[index])
