"""What may be given away to learn: a few drafts for the undrafted, a few plain steps for the drafted,
a few steps with more drafts than seem to pay.

All are paid from one allowance, a small part of the device time so far, before they are made. The
cost of an exploration is what its rows and its draft pass add to the step. The cost of a window of
plain steps is the time that drafting would have saved in it, that of a bolder choice what its drafts
are believed to bring too little.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from octavo.core.draft_plan import BudgetReport, DraftPlan, StepFacts

ALLOWANCE = 0.005  # of device time
_WINDOW_STEPS = 4
BOLD_STEPS = 4
_BOLD_DISTANCE = 48  # steps from one bolder choice to the next, at first
_WINDOW_DISTANCE = 100  # steps from one window to the next, at least
_FARTHEST_WINDOW = 1600  # where windows only show what was known
_CLEAR_GAIN = 1.2  # of drafting: windows may be rare
_KNOWN = 0.03  # of a plain step's time: so little is no news
_EXPLORE_TOGETHER = 8  # requests that share a step, and a draft pass, of exploration
_MOST_PROBED = 8  # drafts of one request in an exploration
_EXPLORE_DISTANCE = 4  # steps between two explorations of one request, at least


def next_probe(asked: int, accepted: int) -> int:
    """How many drafts the next exploration of a request makes, after one of `asked`."""
    return min(_MOST_PROBED, 2 * asked) if accepted >= asked else max(1, accepted)


class Trials:
    """The allowance, and who gets it. Steps are counted by `plan`."""

    def __init__(self, report: BudgetReport) -> None:
        self._report = report
        self._seconds = 0.0
        self.next_exploration = 0  # the step that may have the next one
        self._last_window = 0  # the step in which it began
        self._window_distance = _WINDOW_DISTANCE
        self._window_news = False  # the present window showed something
        self._window_left = 0
        self._window_unread = 0
        # By the size of the batch, in powers of two: the step of the next bolder choice, and how long after.
        self._bolder: dict[int, tuple[int, int]] = {}

    def earn(self, seconds: float) -> None:
        """Device time has passed."""
        self._seconds += ALLOWANCE * seconds

    def _pay(self, cost: float) -> bool:
        if cost > self._seconds:
            return False
        self._seconds -= max(0.0, cost)
        self._report.allowance_spent += max(0.0, cost)
        return True

    # ------------------------------------------------------------------ windows of plain steps

    def in_window(self, step: int, gain: float, plain_seconds: float, may_start: bool) -> bool:
        """True if the drafts of this step are to be left out. `gain` is what drafting promises."""
        if not self._window_left:
            if not may_start or not self._window_is_due(step, gain):
                return False
            if not self._pay(_WINDOW_STEPS * plain_seconds * (1.0 - 1.0 / gain)):
                return False
            self._last_window = step
            self._window_left = _WINDOW_STEPS
            self._report.num_windows += 1
        self._window_left -= 1
        self._window_unread += 1
        return True

    def was_window(self) -> bool:
        """True for a plain step that was read, if it is one that a window asked for."""
        if not self._window_unread:
            return False
        self._window_unread -= 1
        return True

    def window_showed(self, error: float) -> None:
        """A plain step of a window took longer or shorter than expected by so much, as a share.

        Where nothing new was seen the next one is farther away, else near.
        """
        self._window_news = self._window_news or error > _KNOWN
        if self._window_left or self._window_unread:  # not its last step
            return
        farther = min(2 * self._window_distance, _FARTHEST_WINDOW)
        self._window_distance = _WINDOW_DISTANCE if self._window_news else farther
        self._window_news = False

    def _window_is_due(self, step: int, gain: float) -> bool:
        """Where drafting brings little all hangs on what a plain step takes, and windows cost little too."""
        distance = self._window_distance if gain > _CLEAR_GAIN else _WINDOW_DISTANCE
        return gain > 1.0 and step >= self._last_window + distance

    def saves_for_window(self, step: int, gain: float) -> bool:
        """True while a window is due and cannot be paid yet."""
        return self._window_is_due(step, gain)

    # ------------------------------------------------------------------ bolder choices

    def may_be_bold(self, step: int, batch: int) -> bool:
        """True if it is time to try more drafts than seem to pay."""
        return step >= self._bolder.get(batch.bit_length(), (_BOLD_DISTANCE, 0))[0]

    def be_bold(self, step: int, batch: int, cost: float) -> bool:
        """Pay for it. Each time it takes twice as long to the next one."""
        if not self._pay(cost):
            return False
        _, distance = self._bolder.get(batch.bit_length(), (0, _BOLD_DISTANCE))
        self._bolder[batch.bit_length()] = (step + distance, 2 * distance)
        self._report.num_bold += 1
        return True

    def boldness_paid(self, step: int, batch: int) -> None:
        """The bolder choice was the better one: try the next soon."""
        self._bolder[batch.bit_length()] = (step + _BOLD_DISTANCE, 2 * _BOLD_DISTANCE)

    # ------------------------------------------------------------------ exploration

    def explore(
        self, step: int, plan: DraftPlan, facts: StepFacts, cost_of: Callable[[Mapping[int, int]], float]
    ) -> None:
        """A draft for the requests without drafts that have waited longest, if it can be paid.

        Those whose last ones were right go first and get more: one draft at a time would take long to
        show that a text has become easy, and what it showed would be forgotten meanwhile. `cost_of`
        says what so many drafts for each of these requests take, and of none, the whole step.
        """
        if step < self.next_exploration:
            return
        states = facts.states
        before = step - _EXPLORE_DISTANCE
        idle = [
            (states[index].explored, index)
            for index, count in enumerate(plan.num_drafts)
            if not count and states[index].may_explore and states[index].explored <= before
        ]
        if not idle:
            return
        # Those whose last draft was right, the latest at the end.
        chosen = [index for _, index in sorted((-since, index) for since, index in idle if since < 0)]
        if not chosen:
            chosen = [index for _, index in heapq.nsmallest(_EXPLORE_TOGETHER, idle)]
        drafts = {index: states[index].probe for index in chosen}
        cost = cost_of(drafts)
        if len(chosen) > _EXPLORE_TOGETHER and cost > self._seconds:
            # They show the same together as one after the other, and all learn from it.
            chosen = chosen[:_EXPLORE_TOGETHER]
            drafts = dict.fromkeys(chosen, 1)
            cost = cost_of(drafts)
        if not self._pay(cost):
            # Not before the allowance can have grown that far: half of that, as times vary.
            per_step = ALLOWANCE * cost_of({})
            self.next_exploration = step + 1 + int((cost - self._seconds) / per_step / 2)
            return
        self._report.num_explored += len(chosen)
        for index, count in drafts.items():
            plan.num_drafts[index] = count
            states[index].explored = step
        plan.explored = tuple(chosen)
