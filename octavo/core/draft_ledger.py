"""What steps took and what their drafts brought: the draft budget's observations in seconds.

Every step that was read corrects the cost models, the target's and the draft model's, and is booked:
what drafting and verifying cost each request, what its accepted drafts saved, and what the steps took
longer than plain ones at the same load would have. The last two make the net speed-up.
"""

from __future__ import annotations

from octavo.core.cost_model import CostModel
from octavo.core.draft_plan import BudgetReport, DraftState, StepResult
from octavo.core.draft_trials import Trials
from octavo.core.messages import DraftPasses

_LATE = 1.3  # a step that takes longer than this times its expectation has met something else
_WINDOW_ERROR_RATE = 0.1


class Ledger:
    """`book` once a step that was read. `target`, `draft` and `report` are the budget's own."""

    def __init__(self, target: CostModel, draft: CostModel | None, report: BudgetReport) -> None:
        self._target = target
        self._draft = draft
        self._report = report
        self._lost_seconds = 0.0  # what speculating steps took longer than plain ones, all together
        self.lookup_seconds = 2e-6  # of one request's lookup

    def open(self, state: DraftState) -> None:
        """From now on the request is in the account."""
        state.started = (self._report.seconds, self._lost_seconds)

    def net_speedup(self, state: DraftState) -> float:
        """The estimate for one request, over the device time since it was added."""
        seconds = self._report.seconds - state.started[0]
        lost = self._lost_seconds - state.started[1]
        return 1.0 + (state.saved_seconds - lost) / seconds if seconds > 0.0 else 1.0

    def book(self, result: StepResult, trials: Trials) -> None:
        """Learn what a step with these rows takes, and account for it."""
        report = self._report
        report.num_steps += 1
        speculated = any(result.asked)
        seconds = self._observe_target(result, speculated, trials) + self._observe_drafting(result)
        report.seconds += seconds
        trials.earn(seconds)
        if not result.num_verify:
            return
        self._share_drafting(result)
        if speculated or (result.plan is not None and any(result.plan.num_drafts)):
            plain = self._compare(result, seconds)
            if speculated:
                report.num_speculating_steps += 1
                self._share_verifying(result, plain)

    def book_rest(
        self, num_requests: int, kv_tokens: int, seconds: float, count: int, trials: Trials
    ) -> None:
        """Plain steps of which this one was looked at; `count` of them, alike."""
        wanted = self._target.seconds(num_requests, kv_tokens)
        if seconds > 0.0:
            self._target.observe(num_requests, kv_tokens, seconds)
            wanted = min(seconds, _LATE * wanted)
        self._report.num_steps += count
        self._report.seconds += count * wanted
        trials.earn(count * wanted)

    def _observe_target(self, result: StepResult, speculated: bool, trials: Trials) -> float:
        """Correct the cost model. Returns the seconds, without what was nobody's fault."""
        rows, kv_tokens, seconds = result.rows, result.kv_tokens, result.target_seconds
        wanted = self._target.seconds(rows, kv_tokens)
        if seconds <= 0.0:  # not measured
            return wanted
        is_plain = not speculated and not result.chunk_rows and result.num_verify > 0
        in_window = is_plain and trials.was_window()
        if in_window:
            error = abs(self._target.surprise(rows, kv_tokens, seconds))
            self._report.window_error += _WINDOW_ERROR_RATE * (error - self._report.window_error)
            trials.window_showed(error)
        self._target.observe(rows, kv_tokens, seconds, deliberate=in_window)
        return min(seconds, _LATE * wanted)

    def _observe_drafting(self, result: StepResult) -> float:
        """The same for the drafts made at the end of the step."""
        plan, seconds = result.plan, result.draft_seconds
        if plan is None or seconds <= 0.0:
            return 0.0
        if result.passes is not None:
            assert self._draft is not None, "passes without a draft model"
            return self._observe_passes(result, result.passes, self._draft)
        drafting = sum(1 for count in plan.num_drafts if count)
        if not drafting:
            return 0.0
        self.lookup_seconds *= 1.1 if seconds > drafting * self.lookup_seconds else 1.0 / 1.1
        return min(seconds, _LATE * drafting * self.lookup_seconds)

    def _observe_passes(self, result: StepResult, passes: DraftPasses, draft: CostModel) -> float:
        """The draft model said what it ran: the first pass may have caught up, the others are alike."""
        seconds, rows = result.draft_seconds, list(passes.rows)
        wanted = 0.0
        for count in rows:
            wanted += draft.seconds(count, result.kv_tokens)
        if passes.first_seconds > 0.0:
            draft.observe(rows.pop(0), result.kv_tokens, passes.first_seconds)
            seconds -= passes.first_seconds
        if rows:
            draft.observe(round(sum(rows) / len(rows)), result.kv_tokens, seconds / len(rows))
        return min(result.draft_seconds, _LATE * wanted)

    def _share_drafting(self, result: StepResult) -> None:
        """The drafts at the end of this step: who they were made for."""
        plan = result.plan
        total = sum(plan.num_drafts) if plan is not None else 0
        if plan is None or not total or result.draft_seconds <= 0.0:
            return
        self._report.draft_seconds += result.draft_seconds
        share = result.draft_seconds / total
        for state, count in zip(plan.states, plan.num_drafts, strict=True):
            state.draft_seconds += share * count

    def _compare(self, result: StepResult, seconds: float) -> float:
        """What this step saved, compared with plain steps at the same load, whose time is returned."""
        batch, kv_tokens = result.num_verify, result.kv_tokens
        plain = self._target.seconds(batch, kv_tokens)
        longer = seconds - plain
        if result.chunk_rows:
            longer = seconds - self._target.seconds(batch + result.chunk_rows, kv_tokens)
        self._lost_seconds += longer
        self._report.saved_seconds += plain * sum(result.accepted) / batch - longer
        return plain

    def _share_verifying(self, result: StepResult, plain_seconds: float) -> None:
        row_seconds = result.target_seconds / result.rows
        for state, asked, accepted in zip(result.states, result.asked, result.accepted, strict=True):
            if not asked:
                continue
            state.saved_seconds += accepted * plain_seconds
            verifying = (1 + asked) * row_seconds
            state.verify_seconds += verifying
            self._report.verify_seconds += verifying
