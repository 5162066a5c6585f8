"""How likely a draft is to be accepted: per request and drafter, by position.

The rate at a position is *conditional*: of the drafts whose predecessors were all accepted, how many
were accepted too. The chance that draft j is accepted is then the product of the rates up to j.

A single request shows few tokens, so its rates lean on what all requests with that drafter showed
(`SharedAcceptance`), in two steps. First the request as a whole is compared with the others: if it
accepts more than they would have at the same positions, the odds of *all* its positions rise. Then
each position's own counts are added to that expectation. Both are pseudo-counts of a beta
distribution, and all counts decay, because texts change.

How fast they decay and how much the others weigh is not for us to know: where requests are alike,
a difference is luck and should weigh little, else the drafts of the lucky are chosen, and luck does
not last; where they differ or change, their own last steps are the best guide. So several `_VIEWS`
forecast each step, and the one that has forecast best is believed.

A lookup drafter often finds nothing. That is counted apart, as the chance of a match: the rates
above hold for the steps in which it found something. A draft that was asked for and not made,
though earlier ones were, counts as refused: its row was planned and brought nothing.
"""

from __future__ import annotations

from math import log

from octavo.sampling_params import MAX_SPECULATIVE_TOKENS

MAX_DRAFTS = MAX_SPECULATIVE_TOKENS  # a request and step
NEGLIGIBLE = 0.025  # drafts with less than this chance are not worth thinking about

_FAST, _SLOW = 0.75, 0.94  # what a step's counts keep of the ones before; 4 and 16 steps are remembered
# (memory, pseudo-counts of "like the others" against the request's own record)
_VIEWS = ((0, 2.0), (0, 6.0), (1, 4.0), (1, 15.0), (1, 80.0))
_DECAYS = (_FAST, _SLOW)
_SCORE_DECAY = 0.985  # a forecast
_FIRST_VIEW = 2
_BEYOND_LUCK = 9.0  # squared standard deviations
_POSITION_WEIGHT = 6.0  # at least; pseudo-counts of a position's expectation against its own counts
_MATCH_WEIGHT = 4.0  # the same for the chance of a match
_MAX_STEPS_DECAYED = 4  # for one observation, however long ago the last one was
_SHARED_DECAY = 0.998  # an observation; about the last 500 count
_START_WEIGHT = 2.0  # pseudo-counts of the rates assumed before anything was seen
_LIKE_BEFORE = 8.0  # pseudo-counts of a position's expectation from the one before
_START_RATE = 0.65
_START_MATCH = 0.8


class SharedAcceptance:
    """What all requests together showed of one drafter: the prior of each of them."""

    __slots__ = ("_hits", "_match_hits", "_match_trials", "_scores", "_trials", "match", "new_hits",
                 "new_match_hits", "new_match_trials", "new_trials", "rates", "view")  # fmt: skip

    def __init__(self, rate: float = _START_RATE, match: float = _START_MATCH) -> None:
        self._hits = [0.0] * MAX_DRAFTS
        self._trials = [0.0] * MAX_DRAFTS
        self._match_hits = match * _START_WEIGHT
        self._match_trials = _START_WEIGHT
        self.rates = [rate] * MAX_DRAFTS  # conditional, by position
        self.match = match
        self._hits[0] = rate * _START_WEIGHT
        self._trials[0] = _START_WEIGHT
        self._scores = [0.0] * len(_VIEWS)  # log-likelihood of what came
        self.view = _FIRST_VIEW
        # Filled by RequestAcceptance.fold, taken in by `refresh`.
        self.new_hits = [0] * MAX_DRAFTS
        self.new_trials = [0] * MAX_DRAFTS
        self.new_match_hits = 0
        self.new_match_trials = 0

    def judge(
        self, got: int, tried: int, usual: float, records: tuple[tuple[float, float], tuple[float, float]]
    ) -> None:
        """Score the views by how well each would have forecast `got` accepted of `tried` drafts.

        `usual` is what the others would have accepted; `records` holds, for each memory, what the
        request had accepted before and what the others would have.
        """
        mean = usual / tried
        refused = tried - got
        scores, best, view = self._scores, -1e30, self.view
        for index, (memory, weight) in enumerate(_VIEWS):
            before, usual_before = records[memory]
            forecast = mean * (before + weight * mean) / (usual_before + weight * mean)
            forecast = min(0.98, max(0.02, forecast))
            score = _SCORE_DECAY * scores[index] + got * log(forecast) + refused * log(1.0 - forecast)
            scores[index] = score
            if score > best:
                best, view = score, index
        self.view = view

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
            # A position hardly seen is expected to be like the one before it. Few refusals must not count for
            # much: what they stop is not tried again.
            weight = _LIKE_BEFORE if position else _START_WEIGHT
            expected = (hits[position] + weight * expected) / (trials[position] + weight)
            self.rates[position] = min(0.995, max(0.005, expected))
        self.new_hits = [0] * MAX_DRAFTS
        self.new_trials = [0] * MAX_DRAFTS
        self.new_match_hits = self.new_match_trials = 0


class RequestAcceptance:
    """What one request showed of one drafter. `record` is cheap; `fold` does the arithmetic."""

    __slots__ = ("_depth", "_hits", "_match_hits", "_match_trials", "_records", "_refused", "_step",
                 "_stopped", "_trials", "num_folds", "num_pending", "num_unmatched", "shared")  # fmt: skip

    def __init__(self, shared: SharedAcceptance, step: int = 0) -> None:
        self.shared = shared
        self.num_pending = 0  # steps recorded since the last fold
        self.num_unmatched = 0  # those in which the drafter found nothing
        self.num_folds = 0
        self._step = step  # of the last fold
        # Steps by the number of accepted drafts: the next one was refused, or none was left.
        self._refused = [0] * (MAX_DRAFTS + 1)
        self._stopped = [0] * (MAX_DRAFTS + 1)
        self._hits = [0.0] * MAX_DRAFTS
        self._trials = [0.0] * MAX_DRAFTS
        self._match_hits = 0.0
        self._match_trials = 0.0
        self._depth = 0  # positions ever tried
        # For each memory: drafts accepted, and what the others would have accepted of the same.
        self._records = ((0.0, 0.0), (0.0, 0.0))

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
        elapsed = min(step - self._step, _MAX_STEPS_DECAYED * self.num_pending)
        keeps_fast, keeps_slow = _FAST**elapsed, _SLOW**elapsed
        keeps = keeps_slow if _VIEWS[shared.view][0] else keeps_fast
        self._step = step
        self.num_folds += 1
        matched = self.num_pending - self.num_unmatched
        self._match_hits = self._match_hits * keeps_slow + matched
        self._match_trials = self._match_trials * keeps_slow + self.num_pending
        shared.new_match_hits += matched
        shared.new_match_trials += self.num_pending
        self.num_pending = self.num_unmatched = 0
        if not matched:
            return
        hits, trials, refused, stopped = self._hits, self._trials, self._refused, self._stopped
        rates = shared.rates
        passed = got = num_tried = 0
        usual = 0.0
        for position in range(self._depth - 1, -1, -1):
            passed += refused[position + 1] + stopped[position + 1]  # steps that accepted this one
            tried = passed + refused[position]
            hits[position] = hits[position] * keeps + passed
            trials[position] = trials[position] * keeps + tried
            if tried:
                shared.new_hits[position] += passed
                shared.new_trials[position] += tried
                got += passed
                num_tried += tried
                usual += tried * rates[position]
        shared.judge(got, num_tried, usual, self._records)
        (fast, fast_usual), (slow, slow_usual) = self._records
        self._records = (
            (fast * keeps_fast + got, fast_usual * keeps_fast + usual),
            (slow * keeps_slow + got, slow_usual * keeps_slow + usual),
        )
        self._refused = [0] * (MAX_DRAFTS + 1)
        self._stopped = [0] * (MAX_DRAFTS + 1)

    @property
    def match(self) -> float:
        """The chance that the drafter finds anything."""
        weight = _MATCH_WEIGHT
        return (self._match_hits + weight * self.shared.match) / (self._match_trials + weight)

    def chances(self) -> list[float]:
        """The chance that drafts 1, 2, … are accepted, given that drafts were made.

        Ends where the chance is negligible.
        """
        shared = self.shared
        rates, hits, trials, depth = shared.rates, self._hits, self._trials, self._depth
        _, weight = _VIEWS[shared.view]
        usual = got = seen = 0.0
        for position in range(depth):
            count = trials[position]
            got += hits[position]
            seen += count
            usual += count * rates[position]
        like_others = (usual + rates[0]) / (seen + 1.0)
        # A record that luck cannot explain stands for itself, however alike the others are.
        deviation = (got - usual) ** 2 / (usual * (1.0 - like_others) + 0.25)
        if deviation > _BEYOND_LUCK:
            weight *= _BEYOND_LUCK / deviation
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
            chance *= rate
            if chance < NEGLIGIBLE:
                break
            chances.append(chance)
        return chances
