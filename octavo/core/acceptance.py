"""How likely a draft is to be accepted: per request and drafter, by position.

The rate at a position is *conditional*: of the drafts whose predecessors were all accepted, how many
were accepted too. The chance that draft j is accepted is then the product of the rates up to j.

A single request shows few tokens, so its rates lean on what all requests with that drafter showed
(`SharedAcceptance`), in two steps. First the request as a whole is compared with the others: if it
accepts more than they would have at the same positions, the odds of *all* its positions rise. Then
each position's own counts are added to that expectation. Both are pseudo-counts of a beta
distribution, and all counts decay, because texts change.

A lookup drafter often finds nothing. That is counted apart, as the chance of a match: the rates
above hold for the steps in which it found something. A draft that was asked for and not made,
though earlier ones were, counts as refused: its row was planned and brought nothing.
"""

from __future__ import annotations

from octavo.core.draft_limits import MAX_DRAFTS

_OWN_DECAY = 0.94  # a step; about the last 16 steps count
_MAX_STEPS_DECAYED = 4  # for one observation, however long ago the last one was
_SHARED_DECAY = 0.998  # an observation; about the last 500 count
_SHARED_WEIGHT = 3.0  # pseudo-counts of a position's expectation against its own counts
_REQUEST_WEIGHT = 4.0  # pseudo-counts of "like the others" against the request's own record
_START_WEIGHT = 2.0  # pseudo-counts of the rates assumed before anything was seen
_START_RATE = 0.6
_START_MATCH = 0.5
NEGLIGIBLE = 0.025  # drafts with less than this chance are not worth thinking about


class SharedAcceptance:
    """What all requests together showed of one drafter: the prior of each of them."""

    __slots__ = ("_hits", "_match_hits", "_match_trials", "_new", "_trials", "match", "new_hits",
                 "new_match_hits", "new_match_trials", "new_trials", "rates")  # fmt: skip

    def __init__(self, rate: float = _START_RATE, match: float = _START_MATCH) -> None:
        self._hits = [0.0] * MAX_DRAFTS
        self._trials = [0.0] * MAX_DRAFTS
        self._match_hits = match * _START_WEIGHT
        self._match_trials = _START_WEIGHT
        self.rates = [rate] * MAX_DRAFTS  # conditional, by position
        self.match = match
        self._hits[0] = rate * _START_WEIGHT
        self._trials[0] = _START_WEIGHT
        # Filled by RequestAcceptance.fold, taken in by `refresh`.
        self.new_hits = [0] * MAX_DRAFTS
        self.new_trials = [0] * MAX_DRAFTS
        self.new_match_hits = 0
        self.new_match_trials = 0

    def refresh(self) -> None:
        """Take in what the requests have shown since the last time."""
        count = self.new_match_trials
        if not count:
            return
        decay = _SHARED_DECAY**count
        self._match_hits = self._match_hits * decay + self.new_match_hits
        self._match_trials = self._match_trials * decay + count
        self.match = self._match_hits / self._match_trials
        hits, trials = self._hits, self._trials
        expected = _START_RATE
        for position, seen in enumerate(self.new_trials):
            hits[position] = hits[position] * decay + self.new_hits[position]
            trials[position] = trials[position] * decay + seen
            # A position hardly seen is expected to be like the one before it.
            expected = (hits[position] + _START_WEIGHT * expected) / (trials[position] + _START_WEIGHT)
            self.rates[position] = min(0.995, max(0.005, expected))
        self.new_hits = [0] * MAX_DRAFTS
        self.new_trials = [0] * MAX_DRAFTS
        self.new_match_hits = self.new_match_trials = 0


class RequestAcceptance:
    """What one request showed of one drafter. `record` is cheap; `fold` does the arithmetic."""

    __slots__ = ("_depth", "_hits", "_match_hits", "_match_trials", "_refused", "_stopped", "_trials",
                 "num_pending", "num_unmatched", "step", "shared")  # fmt: skip

    def __init__(self, shared: SharedAcceptance, step: int = 0) -> None:
        self.shared = shared
        self.step = step  # of the last fold
        self.num_pending = 0  # steps recorded since the last fold
        self.num_unmatched = 0  # those in which the drafter found nothing
        # Steps by the number of accepted drafts: the next one was refused, or none was left.
        self._refused = [0] * (MAX_DRAFTS + 1)
        self._stopped = [0] * (MAX_DRAFTS + 1)
        self._hits = [0.0] * MAX_DRAFTS
        self._trials = [0.0] * MAX_DRAFTS
        self._match_hits = 0.0
        self._match_trials = 0.0
        self._depth = 0  # positions ever tried

    def record(self, asked: int, drafted: int, accepted: int) -> None:
        """One verified step: drafts asked for, really made, and accepted."""
        self.num_pending += 1
        if not drafted:
            self.num_unmatched += 1
        elif accepted < asked:
            self._refused[accepted] += 1
        else:
            self._stopped[accepted] += 1
        if asked > self._depth:
            self._depth = asked

    def fold(self, step: int) -> None:
        """Take what was recorded into the decayed counts, the request's and the shared ones."""
        shared = self.shared
        elapsed = min(step - self.step, _MAX_STEPS_DECAYED * self.num_pending)
        decay = _OWN_DECAY**elapsed
        self.step = step
        matched = self.num_pending - self.num_unmatched
        self._match_hits = self._match_hits * decay + matched
        self._match_trials = self._match_trials * decay + self.num_pending
        shared.new_match_hits += matched
        shared.new_match_trials += self.num_pending
        hits, trials, refused, stopped = self._hits, self._trials, self._refused, self._stopped
        passed = 0  # steps that accepted the draft at `position`
        for position in range(self._depth - 1, -1, -1):
            passed += refused[position + 1] + stopped[position + 1]
            tried = passed + refused[position]
            hits[position] = hits[position] * decay + passed
            trials[position] = trials[position] * decay + tried
            shared.new_hits[position] += passed
            shared.new_trials[position] += tried
        self._refused = [0] * (MAX_DRAFTS + 1)
        self._stopped = [0] * (MAX_DRAFTS + 1)
        self.num_pending = self.num_unmatched = 0

    @property
    def match(self) -> float:
        """The chance that the drafter finds anything."""
        weight = _REQUEST_WEIGHT
        return (self._match_hits + weight * self.shared.match) / (self._match_trials + weight)

    def chances(self) -> list[float]:
        """The chance that drafts 1, 2, … are accepted, given that drafts were made.

        Ends where the chance is negligible.
        """
        rates, hits, trials = self.shared.rates, self._hits, self._trials
        depth = self._depth
        got = seen = expected = 0.0
        for position in range(depth):
            count = trials[position]
            got += hits[position]
            seen += count
            expected += count * rates[position]
        like_others = (expected + rates[0]) / (seen + 1.0)
        own = (got + _REQUEST_WEIGHT * like_others) / (seen + _REQUEST_WEIGHT)
        odds = own * (1.0 - like_others) / ((1.0 - own) * like_others)
        chance = 1.0
        chances: list[float] = []
        for position in range(MAX_DRAFTS):
            rate = rates[position]
            rate = odds * rate / (1.0 - rate + odds * rate)
            if position < depth:
                rate = (hits[position] + _SHARED_WEIGHT * rate) / (trials[position] + _SHARED_WEIGHT)
            chance *= rate
            if chance < NEGLIGIBLE:
                break
            chances.append(chance)
        return chances
