"""What keeps a choice of drafts in force, and what changes it.

The choice for a whole batch lives in `ChoiceInForce`. Between two decisions, and where nothing is 3%
better for all together, single requests still come and change: at the price that the choice in
force puts on a row, a draft is worth its row or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.core.acceptance import MAX_DRAFTS
from octavo.core.draft_choice import Economy, choose, expected
from octavo.core.draft_plan import DraftState

MIN_GAIN = 1.03  # what drafting must promise where there was none
MIN_BETTER = 1.015  # and another choice of drafts than the one in force, for the whole batch
_HOPE = 0.25  # the share of what more rows cost that may be a mistake
_UNLEARNED_STEPS = 8  # after which a choice is looked at again though nothing was learned


@dataclass(slots=True)
class ChoiceInForce:
    """The choice in force, one for steps without a prompt's chunk and one for steps with one."""

    passes: int = 0
    gain: float = 1.0  # expected speed-up against plain decoding
    price: float = 1.0  # of one more draft row, in tokens
    could_pay: bool = True  # if every draft were accepted
    plain_seconds: float = 0.0
    saved_seconds: float = 0.0  # a step
    extra_tokens: float = 0.0  # a step
    batch: int = 0
    chunk_rows: int = 0
    steps_left: int = 0  # to the next decision
    on_trial: bool = False  # in force only to see whether its steps take as long as believed
    news: int = -1  # what the budget had learned by then

    def is_due(self, batch: int, chunk_rows: int, news: int) -> bool:
        """True if it is time for a decision, or the load is not what the last one was made for.

        Where nothing was learned since, only the machine can have changed, and that is looked at seldom.
        """
        self.steps_left -= 1
        if load_changed(batch, self.batch):
            return True
        if self.steps_left < 0 and (news != self.news or self.steps_left < -_UNLEARNED_STEPS):
            return True
        return chunk_rows > 2 * self.chunk_rows or 2 * chunk_rows < self.chunk_rows


def load_changed(batch: int, before: int) -> bool:
    """True if a choice made for `before` requests says little about so many."""
    return abs(batch - before) * 4 > before


def brings(states: Sequence[DraftState], counts: Sequence[int], passes: int) -> tuple[float, float]:
    """Expected tokens and rows of all these drafts."""
    tokens = rows = 0.0
    for state, count in zip(states, counts, strict=True):
        more_tokens, more_rows = expected(state, count, passes)
        tokens += more_tokens
        rows += more_rows
    return tokens, rows


def promise(states: Sequence[DraftState], counts: Sequence[int], passes: int) -> tuple[float, float]:
    """Expected tokens and rows of all these drafts; each request is held to its part."""
    tokens = rows = 0.0
    for state, count in zip(states, counts, strict=True):
        if count:
            state.promised, more_rows = expected(state, count, passes)
            tokens += state.promised
            rows += more_rows
        else:
            state.promised = 0.0
    return tokens, rows


def changed_alone(
    states: Sequence[DraftState],
    now: Sequence[int],
    best: Sequence[int],
    passes: int,
    economy: Economy,
    rate: float,
    rows: float,
) -> list[int]:
    """Requests for which the best choice is 3% better than theirs, at the price of its rows.

    The passes stay as they are.
    """
    step = max(1.0, len(states) / 8)
    dearer, cheaper = economy.row_price(rows, step, rate), economy.row_price(rows, -step, rate)
    counts: list[int] = []
    for state, old, new in zip(states, now, best, strict=True):
        counts.append(old)
        old_tokens, old_rows = expected(state, old, passes)
        state.promised = old_tokens
        if new == old or (new > passes and state.lookup is None):
            continue
        new_tokens, new_rows = expected(state, new, passes)
        price = cheaper if new > old else dearer
        profit = economy.trust * (new_tokens - old_tokens) - price * (new_rows - old_rows)
        if profit > (MIN_GAIN - 1.0) * (1.0 + old_tokens):
            counts[-1] = new
            state.promised = new_tokens
    return counts


def count_worth(state: DraftState, choice: ChoiceInForce) -> int:
    """For a new request: the drafts that pay at the price in force, none if they bring less than 3%."""
    best, profit = 0, MIN_GAIN - 1.0
    most = MAX_DRAFTS if state.lookup is not None else choice.passes
    for count in range(1, most + 1):
        tokens, rows = expected(state, count, choice.passes)
        if tokens - choice.price * rows > profit:
            best, profit = count, tokens - choice.price * rows
    return best


@dataclass(slots=True)
class Bolder:
    """A choice with more drafts than the one in force. `lost` are the seconds of a step of it, as believed,
    that the tokens it brings do not pay for."""

    passes: int
    counts: list[int]
    tokens: float
    rows: float
    rate: float
    lost: float


def bolder(
    states: Sequence[DraftState], now: Sequence[int], now_rate: float, passes: int, economy: Economy
) -> Bolder | None:
    """What would be chosen if more rows cost less than believed; None if it is what is in force.

    What a step with so many rows takes is only seen by making it. What is believed to be too dear is not
    made, and would stay too dear.
    """
    _, rows = brings(states, now, passes)
    hoped = economy.hoping(rows, _HOPE)
    choice = choose(states, hoped, passes)
    counts = choice.drafts(states)
    tokens, more_rows = brings(states, counts, choice.passes)
    if more_rows <= rows or hoped.rate(tokens, more_rows, choice.passes) <= MIN_GAIN * now_rate:
        return None
    rate = economy.rate(tokens, more_rows, choice.passes)
    seconds = (economy.base_tokens + economy.trust * tokens) / rate
    lost = max(0.0, seconds * (1.0 - rate / now_rate))
    return Bolder(choice.passes, counts, tokens, more_rows, rate, lost)


def could_pay(states: Sequence[DraftState], economy: Economy, row_price: float) -> bool:
    """Could drafts pay if all were accepted? If not, nothing is worth exploring."""
    has_lookup = any(state.lookup is not None for state in states)
    if has_lookup and row_price * MIN_GAIN < 1.0:
        return True
    count = len(states)
    return any(
        economy.rate(count * n, count * n, 0 if has_lookup else n) > MIN_GAIN * economy.plain_rate
        for n in (1, 2, 4, 8, MAX_DRAFTS)
    )
