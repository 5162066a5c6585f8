"""How likely a draft is to be accepted: per request and drafter, by position.

The rate at a position is *conditional*: of the drafts whose predecessors were all accepted, how many
were accepted too. The chance that draft j is accepted is then the product of the rates up to j.

A single request shows few tokens, so its rates lean on what all requests with that drafter showed
(`SharedAcceptance`), in two steps. First the request as a whole is compared with the others: if it
accepts more than they would have at the same positions, the odds of *all* its positions rise. Then
each position's own counts are added to that expectation. Both are pseudo-counts of a beta
distribution, and all counts decay, because texts change. How much a request must show before it
counts as different is learned too: where requests really differ, or one has just changed, little;
where what looks like a difference is luck, much. Else the drafts of the lucky would be chosen, and
luck does not last.

A lookup drafter often finds nothing. That is counted apart, as the chance of a match: the rates
above hold for the steps in which it found something. A draft that was asked for and not made,
though earlier ones were, counts as refused: its row was planned and brought nothing.
"""

from __future__ import annotations

MAX_DRAFTS = 16  # a request and step
_OWN_DECAY = 0.94  # a step; about the last 16 steps count
_MAX_STEPS_DECAYED = 4  # for one observation, however long ago the last one was
_SHARED_DECAY = 0.998  # an observation; about the last 500 count
_POSITION_WEIGHT = 8.0  # at least; pseudo-counts of a position's expectation against its own counts
_MIN_WEIGHT, _MAX_WEIGHT = 3.0, 60.0  # pseudo-counts of "like the others" against the own record
_MATCH_WEIGHT = 4.0  # the same for the chance of a match
_MOMENTS_DECAY = 0.97  # a fold
_SURPRISE = 8.0  # squared deviations beyond which a request must have changed
_KEPT_AFTER_CHANGE = 0.1  # of its record
_START_WEIGHT = 2.0  # pseudo-counts of the rates assumed before anything was seen
_START_RATE = 0.65
_START_MATCH = 0.8
NEGLIGIBLE = 0.025  # drafts with less than this chance are not worth thinking about


class SharedAcceptance:
    """What all requests together showed of one drafter: the prior of each of them."""

    __slots__ = ("_excess", "_hits", "_luck", "_match_hits", "_match_trials", "_trials", "changes_last", "match",
                 "new_hits", "new_match_hits", "new_match_trials", "new_trials", "rates", "weight")  # fmt: skip

    def __init__(self, rate: float = _START_RATE, match: float = _START_MATCH) -> None:
        self._hits = [0.0] * MAX_DRAFTS
        self._trials = [0.0] * MAX_DRAFTS
        self._match_hits = match * _START_WEIGHT
        self._match_trials = _START_WEIGHT
        self.rates = [rate] * MAX_DRAFTS  # conditional, by position
        self.match = match
        # Pseudo-counts by which a request is like the others; see `compare`.
        self.weight = _MIN_WEIGHT
        self._luck = self._excess = 0.0
        self.changes_last = 0.5  # above 0: what looks like a change usually is one
        self._hits[0] = rate * _START_WEIGHT
        self._trials[0] = _START_WEIGHT
        # Filled by RequestAcceptance.fold, taken in by `refresh`.
        self.new_hits = [0] * MAX_DRAFTS
        self.new_trials = [0] * MAX_DRAFTS
        self.new_match_hits = 0
        self.new_match_trials = 0

    def compare(self, got: float, expected: float, trials: float) -> None:
        """Of one request: accepted, expected from the others' rates, tried. Learns `weight`.

        By moments: the squared difference beyond what luck explains is what requests differ by.
        """
        if trials <= 0.0:
            return
        mean = expected / trials
        variance = max(0.005, mean * (1.0 - mean))
        difference = got - expected
        self._luck = self._luck * _MOMENTS_DECAY + variance * trials * trials
        self._excess = self._excess * _MOMENTS_DECAY + difference * difference - trials * variance
        if self._excess * _MAX_WEIGHT <= self._luck:
            self.weight = _MAX_WEIGHT
        else:
            self.weight = max(_MIN_WEIGHT, self._luck / self._excess)

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

    __slots__ = ("_depth", "_hits", "_match_hits", "_match_trials", "_new_rate", "_old_rate", "_rates", "_refused",
                 "_stopped", "_surprise", "_trials", "_variance", "_weight", "num_folds", "num_pending",
                 "num_unmatched", "shared", "step")  # fmt: skip

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
        self._rates = list(shared.rates)  # as estimated last, conditional, by position
        self._weight = _MAX_WEIGHT  # the most that the others may weigh for this request
        self._surprise = self._variance = 0.0
        self._new_rate: float | None = None  # what the last surprise promised
        self._old_rate = 0.0
        self.num_folds = 0  # since the start or the last change

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
        got, wanted, variance, num_tried = 0, 0.0, 0.0, 0
        new: list[tuple[int, int, int]] = []  # position, accepted, tried
        for position in range(self._depth - 1, -1, -1):
            passed += refused[position + 1] + stopped[position + 1]
            tried = passed + refused[position]
            if tried:
                rate = self._rates[position]
                new.append((position, passed, tried))
                got += passed
                num_tried += tried
                wanted += tried * rate
                variance += tried * rate * (1.0 - rate)
        if num_tried and self._has_changed(got, wanted, variance, num_tried):
            decay *= _KEPT_AFTER_CHANGE
        for position in range(self._depth):
            hits[position] *= decay
            trials[position] *= decay
        for position, passed, tried in new:
            hits[position] += passed
            trials[position] += tried
            shared.new_hits[position] += passed
            shared.new_trials[position] += tried
        seen = sum(trials)
        if seen:
            rates = shared.rates
            shared.compare(sum(hits), sum([t * r for t, r in zip(trials, rates, strict=True)]), seen)
        self._refused = [0] * (MAX_DRAFTS + 1)
        self._stopped = [0] * (MAX_DRAFTS + 1)
        self.num_pending = self.num_unmatched = 0

    def _has_changed(self, got: int, wanted: float, variance: float, num_tried: int) -> bool:
        """True if what came is too far from what was expected to be luck.

        Where texts alternate fast, a surprise says nothing about what comes next; so it counts only
        as long as, after surprises, "it goes on like this" has been the better guess.
        """
        shared = self.shared
        if self._new_rate is not None:
            like_this = abs(got - self._new_rate * num_tried)
            shared.changes_last += 0.1 * ((like_this < abs(got - self._old_rate * num_tried)) - 0.5 - shared.changes_last)
            self._new_rate = None
        self._surprise = 0.5 * self._surprise + got - wanted
        self._variance = 0.5 * self._variance + variance
        if self._surprise**2 <= _SURPRISE * (self._variance + 0.25):
            self._weight = min(_MAX_WEIGHT, 1.1 * self._weight)
            self.num_folds += 1
            return False
        self._new_rate, self._old_rate = got / num_tried, wanted / num_tried
        self._surprise = self._variance = 0.0
        if shared.changes_last < 0.0:
            return False
        self._weight = _MIN_WEIGHT
        self.num_folds = 0
        return True

    @property
    def match(self) -> float:
        """The chance that the drafter finds anything."""
        weight = _MATCH_WEIGHT
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
        weight = min(self._weight, self.shared.weight)
        own = (got + weight * like_others) / (seen + weight)
        odds = own * (1.0 - like_others) / ((1.0 - own) * like_others)
        weight = max(_POSITION_WEIGHT, weight)
        chance = 1.0
        chances: list[float] = []
        for position in range(MAX_DRAFTS):
            rate = rates[position]
            rate = odds * rate / (1.0 - rate + odds * rate)
            if position < depth:
                rate = (hits[position] + weight * rate) / (trials[position] + weight)
            self._rates[position] = rate
            chance *= rate
            if chance < NEGLIGIBLE:
                break
            chances.append(chance)
        return chances
