"""How many tokens to draft: a decision about time, made anew as loads and texts change.

A step that verifies drafts takes longer than a plain one and brings more tokens. What counts is

                     1 token per request  +  the drafts expected to be accepted
    objective  =  ---------------------------------------------------------------
                    t_target(rows, KV tokens)  +  passes · t_draft  +  catch-up

in tokens a second. With plain decoding there are no drafts: the same formula, and the bar to pass.
The times come from `cost_model` (measured, then corrected by every step), the expected tokens from
`acceptance` (of each request and drafter), the best drafts under the objective from `draft_choice`.
A prompt's chunk in the same step is work that must be done anyway: the time it adds to a plain step
is left out, but where it has filled the cheap rows the drafts' rows are dear, and are priced so.

This file adds what makes a sequence of such decisions good:

* *Steadiness.* A different choice is taken up only if it promises 3% more; but as soon as
  speculation promises less than plain decoding it stops. One request alone may change its number
  when that pays for itself by 3%, at the current price of a row.
* *Sobriety.* What drafts promised when they were chosen is compared with what they brought. Where
  promises are not kept, because texts change faster than one can follow, they are discounted.
* *Curiosity, on an allowance* (`draft_trials`). 0.5% of the device's time may be given away. A
  request that has stopped drafting gets one draft now and then, to see whether its text has changed.
* *Honesty.* From the same allowance, short windows of plain steps at the same load show what a
  plain step really takes. They correct the cost model, and the net speed-up is reported by it.
* *Limits* (`draft_limits`). Drafts never take more than the token budget, the free KV blocks and
  the request's own limit leave, and leave half of the free rows to waiting prompts. What a fixed
  number (`num_speculative_tokens`) loses by that is counted.

Draft models and lookups are the same here: a lookup's drafts just need no pass. A draft model that
has fallen behind must first catch up; a request starts (again) only if what its drafts save over
the tokens to come is worth that.

Plain Python, no tensors: `plan` when a step is built, `observe` when its output was read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from octavo.core.acceptance import MAX_DRAFTS, RequestAcceptance, SharedAcceptance
from octavo.core.cost_model import CostModel
from octavo.core.draft_choice import Economy, choose, expected
from octavo.core.draft_in_force import (
    MIN_GAIN,
    ChoiceInForce,
    changed_alone,
    could_pay,
    count_worth,
    promise,
)
from octavo.core.draft_limits import CATCH_UP_ROWS, catch_up, draft_room, keep_limits, leave_out_blocked
from octavo.core.draft_plan import BudgetReport, DraftPlan, DraftPolicy, DraftState, StepFacts, StepResult
from octavo.core.draft_trials import Trials
from octavo.core.messages import DraftPasses

__all__ = ["BudgetReport", "DraftBudget", "DraftPlan", "DraftPolicy", "DraftState", "StepFacts", "StepResult"]

_CATCH_UP_HORIZON = 128  # tokens over which a draft model's catch-up must pay off
_PROMISE_DECAY = 0.995  # a step
_PROMISE_WEIGHT = 20.0  # tokens for which promises are believed without proof
_FOLDS = 8  # requests whose records are worked into their chances, a step
_LATE = 1.3  # a step that takes longer than this times its expectation has met something else


class DraftBudget:
    """The DraftPolicy of `num_speculative_tokens="auto"`, and the keeper of fixed numbers.

    `reserves_rows`: a row planned for a draft is computed even if the drafter finds nothing (a
    pipelined device must; a host that sees the drafts first need not).
    """

    def __init__(
        self,
        target: CostModel,
        draft: CostModel | None = None,
        *,
        max_num_batched_tokens: int,
        reserves_rows: bool = True,
        catch_up_rows: int = CATCH_UP_ROWS,
    ) -> None:
        """`catch_up_rows`: the most rows of a step that bring the draft model's KV up to date."""
        self.target = target
        self.draft = draft
        self.report = BudgetReport()
        self._max_rows = max_num_batched_tokens
        self._reserves_rows = reserves_rows
        self._catch_up_rows = catch_up_rows
        self._shared: dict[str, SharedAcceptance] = {}
        self._choices = (ChoiceInForce(), ChoiceInForce())
        self._trials = Trials(self.report)
        self._step = 0
        self._to_fold: deque[DraftState] = deque()
        self._lookup_seconds = 2e-6  # a request
        self._promised = self._kept = 0.0  # tokens, decayed
        self._lost_seconds = 0.0  # what speculating steps took longer than plain ones, all together

    # ------------------------------------------------------------------ requests

    def add(
        self,
        request_id: str,
        *,
        lookup: str | None = None,
        model: str | None = None,
        fixed: int | None = None,
    ) -> DraftState:
        """A new request with its drafters' names: a free one, a draft model, both or none."""
        assert model is None or self.draft is not None, "a draft model without its cost model"
        if lookup is None and model is None:
            fixed = 0
        state = DraftState(request_id, self._acceptance(lookup), self._acceptance(model), fixed)
        state.started = (self.report.seconds, self._lost_seconds)
        state.explored = self._step
        state.update_curves(self._reserves_rows)
        if fixed is None:
            state.chosen = [count_worth(state, choice) for choice in self._choices]
        return state

    def _acceptance(self, drafter: str | None) -> RequestAcceptance | None:
        if drafter is None:
            return None
        shared = self._shared.get(drafter)
        if shared is None:
            shared = self._shared[drafter] = SharedAcceptance()
        return RequestAcceptance(shared, self._step)

    def net_speedup(self, state: DraftState) -> float:
        """The estimate for one request, over the device time since it was added."""
        seconds = self.report.seconds - state.started[0]
        lost = self._lost_seconds - state.started[1]
        return 1.0 + (state.saved_seconds - lost) / seconds if seconds > 0.0 else 1.0

    # ------------------------------------------------------------------ plan

    def plan(self, facts: StepFacts) -> DraftPlan:
        """The drafts to make at the end of this step, for each request that samples in it."""
        self._step += 1
        states = facts.states
        if not states:
            return DraftPlan()
        if self.draft is not None:
            self._note_blocked(facts)
        mixed = facts.chunk_rows > 0
        choice = self._choices[mixed]
        if choice.is_due(len(states), facts.chunk_rows):
            self._decide(choice, mixed, facts)
        plan = DraftPlan(states, gain=choice.gain)
        if self._trials.in_window(self._step, choice.gain, choice.plain_seconds, may_start=not mixed):
            plan.counterfactual = True
            plan.num_drafts = [state.fixed or 0 for state in states]
        else:
            plan.num_drafts = [state.chosen[mixed] for state in states]
            if choice.could_pay and not self._trials.saves_for_window(self._step, choice.gain):
                self._explore(plan, facts)
        if min(facts.rooms) < MAX_DRAFTS:
            plan.num_drafts = list(map(min, plan.num_drafts, facts.rooms))
        if facts.blocked:
            leave_out_blocked(plan, facts, self.report)
        room = draft_room(facts, self._max_rows)
        if facts.owed and any(facts.owed):
            catch_up(
                plan, facts, room, self._catch_up_rows,
                lambda index: self._catching_up_pays(index, plan, choice, facts),
            )  # fmt: skip
        keep_limits(plan, facts, room, self.report)
        if self.draft is not None:
            plan.passes = _num_passes(plan, choice.passes)
        return plan

    def _note_blocked(self, facts: StepFacts) -> None:
        """Whom the draft model cannot serve now, it promises nothing."""
        for index, state in enumerate(facts.states):
            blocked = index in facts.blocked
            if state.blocked is not blocked:
                state.blocked = blocked
                state.update_curves(self._reserves_rows)

    def _decide(self, choice: ChoiceInForce, mixed: bool, facts: StepFacts) -> None:
        """Find the best choice, and take it up if it is enough better than the one in force."""
        batch = len(facts.states)
        choice.batch, choice.chunk_rows = batch, facts.chunk_rows
        choice.steps_left = _steps_between(batch) - 1
        autos = [state for state in facts.states if state.fixed is None]
        economy = self._economy(facts, all_auto=len(autos) == batch)
        now = [state.chosen[mixed] for state in autos]
        now_tokens, now_rows = promise(autos, now, choice.passes)
        now_rate = economy.rate(now_tokens, now_rows, choice.passes)
        stops = now_rate < economy.plain_rate
        if stops:
            now, now_tokens, now_rows, now_rate = [0] * len(autos), 0.0, 0.0, economy.plain_rate

        best = choose(autos, economy, choice.passes)
        counts = best.drafts(autos)
        tokens, rows = promise(autos, counts, best.passes)
        rate = economy.rate(tokens, rows, best.passes)
        starts = rate > MIN_GAIN * now_rate
        if starts:
            choice.passes = best.passes
            now, now_tokens, now_rate = counts, tokens, rate
        elif stops:
            choice.passes = 0
        elif batch > 1:
            now = changed_alone(autos, now, counts, choice.passes, economy, rate, rows)
        if starts or stops:
            self.report.num_changes += 1
            promise(autos, now, choice.passes)
        for state, count in zip(autos, now, strict=True):
            state.chosen[mixed] = count
        choice.price = economy.row_price(rows, max(1.0, batch / 8), rate)
        choice.gain = now_rate / economy.plain_rate
        choice.could_pay = could_pay(autos, economy, choice.price)
        choice.plain_seconds = economy.plain_seconds
        choice.extra_tokens = now_tokens
        all_tokens = economy.base_tokens + now_tokens
        choice.saved_seconds = all_tokens / economy.plain_rate - all_tokens / now_rate

    def _economy(self, facts: StepFacts, all_auto: bool) -> Economy:
        batch = len(facts.states)
        fixed: list[tuple[float, float, int]] = []
        for state in () if all_auto else facts.states:
            if state.fixed:
                passes = state.fixed if state.model is not None else 0
                fixed.append((*expected(state, state.fixed, passes), passes))
        room = draft_room(facts, self._max_rows) - int(sum(rows for _, rows, _ in fixed))
        return Economy(
            self.target,
            batch=batch,
            kv_tokens=facts.kv_tokens,
            chunk_rows=facts.chunk_rows,
            max_rows=max(0, min(room, facts.kv_room)),
            pass_seconds=self._pass_seconds(facts.states, facts.kv_tokens),
            drafting_seconds=self._lookup_seconds * batch,
            trust=min(1.0, (self._kept + _PROMISE_WEIGHT) / (self._promised + _PROMISE_WEIGHT)),
            fixed=fixed,
        )

    def _pass_seconds(self, states: Sequence[DraftState], kv_tokens: int) -> float:
        if self.draft is None:
            return 0.0
        count = sum(1 for state in states if state.model is not None and not state.blocked)
        return self.draft.seconds(count, kv_tokens * count / len(states)) if count else 0.0

    def _explore(self, plan: DraftPlan, facts: StepFacts) -> None:
        states, kv_tokens, target = facts.states, facts.kv_tokens, self.target
        rows = facts.chunk_rows + len(states) + sum(plan.num_drafts)
        without = target.seconds(rows, kv_tokens)

        def cost_of(indices: list[int]) -> float:
            """Of one draft for each of these; of the whole step for none."""
            if not indices:
                return without
            cost = target.seconds(rows + len(indices), kv_tokens) - without
            cost += self._lookup_seconds * len(indices)
            if self.draft is not None and any(states[index].model is not None for index in indices):
                if not any(plan.num_drafts):
                    cost += self._pass_seconds(states, kv_tokens)
                if facts.owed and (behind := sum(facts.owed[index] for index in indices)):
                    cost += self.draft.seconds(behind)
            return cost

        self._trials.explore(self._step, plan, facts, cost_of)

    def _catching_up_pays(self, index: int, plan: DraftPlan, choice: ChoiceInForce, facts: StepFacts) -> bool:
        """Does what the request's drafts save, over the tokens it may still have, pay for it?"""
        assert self.draft is not None, "only a draft model can be behind"
        gain, _ = expected(facts.states[index], plan.num_drafts[index], choice.passes)
        share = gain / choice.extra_tokens if choice.extra_tokens > 0.0 else 0.0
        steps = min(facts.rooms[index], _CATCH_UP_HORIZON) / (1.0 + gain)
        return share * choice.saved_seconds * steps > MIN_GAIN * self.draft.seconds(facts.owed[index])

    # ------------------------------------------------------------------ observe

    def observe(self, result: StepResult) -> None:
        """Learn from a step that was read: what it took, and what became of its drafts."""
        report = self.report
        report.num_steps += 1
        speculated = any(result.asked)
        seconds = self._observe_target(result, speculated) + self._observe_drafting(result)
        report.seconds += seconds
        self._trials.earn(seconds)
        self._promised *= _PROMISE_DECAY
        self._kept *= _PROMISE_DECAY
        if not result.states:
            return
        self._share_drafting(result)
        if speculated or (result.plan is not None and any(result.plan.num_drafts)):
            plain = self._account(result, seconds)
            if speculated:
                report.num_speculating_steps += 1
                self._record(result, plain)
        if self._to_fold:
            self._fold(_FOLDS)

    def _observe_target(self, result: StepResult, speculated: bool) -> float:
        """Correct the cost model. Returns the seconds, without what was nobody's fault."""
        rows, kv_tokens, seconds = result.rows, result.kv_tokens, result.target_seconds
        wanted = self.target.seconds(rows, kv_tokens)
        if seconds <= 0.0:  # not measured
            return wanted
        is_plain = not speculated and not result.chunk_rows and bool(result.states)
        in_window = is_plain and self._trials.was_window()
        if in_window:
            error = abs(self.target.surprise(rows, kv_tokens, seconds))
            self.report.window_error += 0.1 * (error - self.report.window_error)
        self.target.observe(rows, kv_tokens, seconds, deliberate=in_window)
        return min(seconds, _LATE * wanted)

    def _observe_drafting(self, result: StepResult) -> float:
        """The same for the drafts made at the end of the step."""
        plan, seconds = result.plan, result.draft_seconds
        if plan is None or seconds <= 0.0:
            return 0.0
        if result.passes is not None and self.draft is not None:
            return self._observe_passes(result, result.passes, self.draft)
        if plan.passes and self.draft is not None:
            if plan.catch_up:  # how long the passes alone took is not known
                return seconds
            batch = sum(1 for state in plan.states if state.model is not None)
            kv_tokens = result.kv_tokens * batch // max(1, len(plan.states))
            wanted = plan.passes * self.draft.seconds(batch, kv_tokens)
            self.draft.observe(batch, kv_tokens, seconds / plan.passes)
            return min(seconds, _LATE * wanted)
        drafting = sum(1 for count in plan.num_drafts if count)
        if not drafting:
            return 0.0
        self._lookup_seconds *= 1.1 if seconds > drafting * self._lookup_seconds else 1.0 / 1.1
        return min(seconds, _LATE * drafting * self._lookup_seconds)

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
        self.report.draft_seconds += result.draft_seconds
        share = result.draft_seconds / total
        for state, count in zip(plan.states, plan.num_drafts, strict=True):
            state.draft_seconds += share * count

    def _account(self, result: StepResult, seconds: float) -> float:
        """What this step saved, compared with plain steps at the same load, whose time is returned."""
        batch, kv_tokens = len(result.states), result.kv_tokens
        plain = self.target.seconds(batch, kv_tokens)
        longer = seconds - plain
        if result.chunk_rows:
            longer = seconds - self.target.seconds(batch + result.chunk_rows, kv_tokens)
        self._lost_seconds += longer
        self.report.saved_seconds += plain * sum(result.accepted) / batch - longer
        return plain

    def _record(self, result: StepResult, plain_seconds: float) -> None:
        fold_after, from_model = _steps_between(len(result.states)), result.from_model
        promised = kept = 0.0
        row_seconds = result.target_seconds / result.rows
        columns = zip(result.states, result.asked, result.drafted, result.accepted, strict=True)
        for index, (state, asked, drafted, accepted) in enumerate(columns):
            if not asked:
                continue
            state.saved_seconds += accepted * plain_seconds
            verifying = (1 + asked) * row_seconds
            state.verify_seconds += verifying
            self.report.verify_seconds += verifying
            if state.promised:
                promised += state.promised
                kept += accepted
            source = state.lookup
            if source is not None and index in from_model:
                source.record(asked, 0, 0)  # it had found nothing
                asked = drafted  # the model's part of what was asked for
                source = None
            source = source or state.model
            if source is None:
                continue
            source.record(asked, drafted, accepted)
            if state.queued:
                continue
            idle = not any(state.chosen)
            if idle and accepted:
                state.explored = -1  # the text may have changed: look again soon
            if idle or source.num_pending >= fold_after or source.num_pending > source.num_folds:
                state.queued = True
                self._to_fold.append(state)
        self._promised += promised
        self._kept += kept

    def _fold(self, most: int) -> None:
        """The arithmetic of the records, for a few requests a step."""
        folded: list[DraftState] = []
        while self._to_fold and len(folded) < most:
            state = self._to_fold.popleft()
            state.queued = False
            for source in (state.lookup, state.model):
                if source is not None and source.num_pending:
                    source.fold(self._step)
            folded.append(state)
        for shared in self._shared.values():
            shared.refresh()
        for state in folded:
            state.update_curves(self._reserves_rows)


def _steps_between(batch: int) -> int:
    """Steps from one decision, or one look at a request's records, to the next: thinking costs
    time as well, and what one step can tell of a large batch is little."""
    return max(4, batch // 16)


def _num_passes(plan: DraftPlan, chosen: int) -> int:
    """Draft model passes: as many as the longest drafts that it makes. A lookup alone goes deeper."""
    most = 0
    for index, (state, count) in enumerate(zip(plan.states, plan.num_drafts, strict=True)):
        if count > most and state.model is not None and not state.blocked:
            if state.lookup is not None and state.fixed is None:
                count = min(count, max(chosen, index in plan.explored))
            most = max(most, count)
    return most
