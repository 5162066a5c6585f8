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

* *Steadiness.* Drafting starts only if it promises 3% more than plain decoding, and another number of
  drafts is chosen for 1.5%; but as soon as speculation promises less than plain decoding it stops. One
  request alone may change its number when that pays for itself by 3%, at the current price of a row.
* *Sobriety.* What drafts promised when they were chosen is compared with what they brought. Where
  promises are not kept, because texts change faster than one can follow, they are discounted.
* *Curiosity, on an allowance* (`draft_trials`). 0.5% of the device's time may be given away. A
  request that has stopped drafting gets one draft now and then, to see whether its text has changed,
  and while these are right, twice as many each time.
* *Boldness.* What a step with many rows takes is only known where such steps are made. So from the same
  allowance a few steps are made with more drafts than seem to pay, where they would if a quarter of what
  their rows seem to cost were a mistake; what was right stays.
* *Rest.* Where nobody drafts and nothing new was seen, steps go without a plan, and of those one in
  four is looked at: thinking costs time as well.
* *Honesty.* From the same allowance, short windows of plain steps at the same load show what a
  plain step really takes. They correct the cost model, and the net speed-up is reported by it. They grow
  rare where drafting brings much and they show nothing new.
* *Limits* (`draft_limits`). Drafts never take more than the token budget, the free KV blocks and
  the request's own limit leave, and leave half of the free rows to waiting prompts. What a fixed
  number (`num_speculative_tokens`) loses by that is counted.

Draft models and lookups are the same here: a lookup's drafts just need no pass. A draft model that
has fallen behind must first catch up; a request starts (again) only if what its drafts save over
the tokens to come is worth that, at the price of all catching up together. What was begun is finished, where
most draft nobody is left behind for little, and while prompts fill the steps nobody begins: who joins with
them changes the load.

Plain Python, no tensors: `plan` when a step is built, `observe` when its output was read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from octavo.core.acceptance import MAX_DRAFTS, RequestAcceptance, SharedAcceptance
from octavo.core.cost_model import CostModel
from octavo.core.draft_choice import Economy, choose, expected
from octavo.core.draft_in_force import (
    MIN_BETTER,
    MIN_GAIN,
    Bolder,
    ChoiceInForce,
    bolder,
    brings,
    changed_alone,
    could_pay,
    count_worth,
    load_changed,
    promise,
)
from octavo.core.draft_ledger import Ledger
from octavo.core.draft_limits import (
    CATCH_UP_ROWS,
    catch_up,
    draft_room,
    keep_limits,
    leave_out_blocked,
    num_passes,
)
from octavo.core.draft_plan import (
    BudgetReport,
    DraftPlan,
    DraftPolicy,
    DraftState,
    StepFacts,
    StepResult,
    refresh_curves,
)
from octavo.core.draft_records import Records
from octavo.core.draft_trials import BOLD_STEPS, Trials

__all__ = ["BudgetReport", "DraftBudget", "DraftPlan", "DraftPolicy", "DraftState", "StepFacts", "StepResult"]

_CATCH_UP_HORIZON = 128  # tokens over which a draft model's catch-up must pay off
_PROOF = 4  # steps after a change in which it is looked at again
_NEW_STEPS = 64  # after the start, in which what was measured there is checked in every step
_TO_JOIN = 0.75  # of what catching up costs, that it must save where most requests draft already
_CROWDED = 0.75  # of a step's rows are those of prompts
_RESTS_A_LOOK = 4  # steps at rest, of which the last is observed
_REST = 12  # steps without a plan, at most, where nobody drafts and nothing new was seen


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
        self._records = Records(self._shared, reserves_rows)
        self._choices = (ChoiceInForce(), ChoiceInForce())
        self._trials = Trials(self.report)
        self._step = 0
        self._ledger = Ledger(target, draft, self.report)
        self._news = 0  # grows with everything that could change a decision
        self._rest_until = 0  # the step that is planned again
        self._rest_batch = 0
        self._num_rested = 0  # steps that the ledger has not seen
        self._turn = 0  # whose chances were computed anew last

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
        self._ledger.open(state)
        self._news += 1
        self._rest_until = 0
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
        return self._ledger.net_speedup(state)

    # ------------------------------------------------------------------ plan

    def rests(self, num_requests: int) -> bool:
        """True if a step of so many requests, none of them new, gets no drafts and needs no plan."""
        if self._step + 1 >= self._rest_until or load_changed(num_requests, self._rest_batch):
            return False
        self._step += 1
        return True

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
        if self._step < max(self._records.hopeful_until, _NEW_STEPS):
            self._news += 1
        if choice.is_due(len(states), facts.chunk_rows, self._news):
            self._decide(choice, mixed, facts)
        plan = DraftPlan(states, gain=choice.gain, on_trial=choice.on_trial)
        if self._trials.in_window(self._step, choice.gain, choice.plain_seconds, may_start=not mixed):
            plan.counterfactual = True
            plan.num_drafts = [state.fixed or 0 for state in states]
        else:
            plan.num_drafts = [state.chosen[mixed] for state in states]
            explores = choice.could_pay and not self._is_crowded(facts)
            if explores and not self._trials.saves_for_window(self._step, choice.gain):
                self._explore(plan, facts)
        if min(facts.rooms) < MAX_DRAFTS:
            plan.num_drafts = list(map(min, plan.num_drafts, facts.rooms))
        if facts.blocked:
            leave_out_blocked(plan, facts, self.report)
        room = draft_room(facts, self._max_rows)
        if facts.owed and any(facts.owed):
            row_price = self._catch_up_price(plan, facts)
            catch_up(
                plan, facts, room, self._catch_up_rows,
                lambda index: self._catching_up_pays(index, plan, choice, facts, row_price),
            )  # fmt: skip
            if plan.too_far_behind and not choice.on_trial:
                self._leave_out_few(plan, choice, facts)
        keep_limits(plan, facts, room, self.report)
        if self.draft is not None:
            plan.passes = num_passes(plan, choice.passes)
        self._consider_rest(plan, choice, mixed)
        return plan

    def _consider_rest(self, plan: DraftPlan, choice: ChoiceInForce, mixed: bool) -> None:
        """Nobody drafts: as long as nothing new is seen, the next plan will be for an exploration."""
        self._rest_until = 0
        if mixed or plan.counterfactual or self._records.waiting or any(plan.num_drafts):
            return
        if any(state.chosen[0] for state in plan.states):
            return  # a limit left none, and may leave some in the next step
        self._rest_batch = len(plan.states)
        attentive = self._step < max(self._records.hopeful_until, _NEW_STEPS)
        self._rest_until = self._step + (_steps_between(len(plan.states)) if attentive else _REST)
        if choice.could_pay:
            self._rest_until = min(self._rest_until, self._trials.next_exploration)

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
        choice.news = self._news
        autos = [state for state in facts.states if state.fixed is None]
        self._turn = refresh_curves(autos, self._reserves_rows, self._turn)
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
        had_drafts = any(now)
        wanted = 1.0 if choice.on_trial else MIN_BETTER if had_drafts else MIN_GAIN
        starts = rate > wanted * now_rate
        if starts:
            choice.passes = best.passes
            now, now_tokens, now_rate = counts, tokens, rate
        elif stops:
            choice.passes = 0
        elif batch > 1:
            now = changed_alone(autos, now, counts, choice.passes, economy, rate, rows)
        if choice.on_trial and not starts and not stops:
            self._trials.boldness_paid(self._step, batch)
        choice.on_trial = False
        if starts or stops:
            self.report.num_changes += 1
            if stops or not had_drafts:
                choice.steps_left = min(choice.steps_left, _PROOF)  # a mistake is seen at once
            promise(autos, now, choice.passes)
        elif not mixed and len(autos) == batch and self._trials.may_be_bold(self._step, batch):
            bold = bolder(autos, now, now_rate, choice.passes, economy)
            if bold is not None and self._trials.be_bold(self._step, batch, self._cost_of_trial(bold, facts)):
                now, now_tokens, rows, now_rate = bold.counts, bold.tokens, bold.rows, bold.rate
                choice.on_trial, choice.passes, choice.steps_left = True, bold.passes, BOLD_STEPS
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

    def _cost_of_trial(self, bold: Bolder, facts: StepFacts) -> float:
        cost = BOLD_STEPS * bold.lost
        if self.draft is not None and (behind := sum(facts.owed)):
            cost += self.draft.seconds(behind)
        return cost

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
            drafting_seconds=self._ledger.lookup_seconds * batch,
            trust=self._records.trust,
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

        def cost_of(drafts: Mapping[int, int]) -> float:
            if not drafts:
                return without
            cost = target.seconds(rows + sum(drafts.values()), kv_tokens) - without
            cost += self._ledger.lookup_seconds * len(drafts)
            if self.draft is not None and any(states[index].model is not None for index in drafts):
                passes = max(drafts.values()) - max(plan.num_drafts, default=0)
                cost += max(0, passes) * self._pass_seconds(states, kv_tokens)
                if facts.owed and (behind := sum(facts.owed[index] for index in drafts)):
                    cost += self.draft.seconds(behind)
            return cost

        self._trials.explore(self._step, plan, facts, cost_of)

    def _is_crowded(self, facts: StepFacts) -> bool:
        """Prompts fill the step: who joins with them changes the load, and with it what drafts are worth."""
        return bool(facts.owed) and facts.prompt_rows > _CROWDED * self._max_rows

    def _catch_up_price(self, plan: DraftPlan, facts: StepFacts) -> float:
        """The seconds that a row of catching up must save.

        What it adds to the first pass, where all that would draft catch up in it together, and a little more;
        less where most requests draft already, and the others would be left behind.
        """
        assert self.draft is not None, "only a draft model can be behind"
        owed = [behind for behind, count in zip(facts.owed, plan.num_drafts, strict=True) if count]
        rows, those_of_drafting = max(1, min(sum(owed), self._catch_up_rows)), 2 * len(owed)
        added = self.draft.seconds(those_of_drafting + rows) - self.draft.seconds(those_of_drafting)
        most_draft = 2 * owed.count(0) > len(facts.states)
        return (_TO_JOIN if most_draft else MIN_GAIN) * added / rows

    def _catching_up_pays(
        self, index: int, plan: DraftPlan, choice: ChoiceInForce, facts: StepFacts, row_price: float
    ) -> bool:
        """Does what the request's drafts save, over the tokens it may still have, pay for it?"""
        if choice.on_trial:
            return True  # from the allowance
        if self._is_crowded(facts):
            return False
        gain, _ = expected(facts.states[index], plan.num_drafts[index], choice.passes)
        share = gain / choice.extra_tokens if choice.extra_tokens > 0.0 else 0.0
        steps = min(facts.rooms[index], _CATCH_UP_HORIZON) / (1.0 + gain)
        return share * choice.saved_seconds * steps > row_price * facts.owed[index]

    def _leave_out_few(self, plan: DraftPlan, choice: ChoiceInForce, facts: StepFacts) -> None:
        """The choice counted on requests that do not catch up. Passes for the few others may not pay."""
        assert self.draft is not None, "only a draft model can be behind"
        states, batch = facts.states, len(facts.states)
        few = [
            index
            for index, count in enumerate(plan.num_drafts)
            if count and states[index].lookup is None and states[index].fixed is None
        ]
        if not few or plan.explored:  # an exploration makes its pass anyway, and pays for it
            return
        counts = [plan.num_drafts[index] for index in few]
        tokens, rows = brings([states[index] for index in few], counts, choice.passes)
        before = facts.chunk_rows + batch
        seconds = self.target.seconds(before + rows, facts.kv_tokens) - self.target.seconds(
            before, facts.kv_tokens
        )
        seconds += max(counts) * self.draft.seconds(len(few), facts.kv_tokens * len(few) / batch)
        if self._records.trust * tokens / batch < seconds / self.target.seconds(batch, facts.kv_tokens):
            for index in few:
                plan.num_drafts[index] = 0
            for index, state in enumerate(states):  # and nobody begins to catch up
                if state.lookup is None and state.fixed is None:
                    plan.catch_up.pop(index, None)
                    state.catching_up = False

    # ------------------------------------------------------------------ observe

    def observe(self, result: StepResult) -> None:
        """Learn from a step that was read: what it took, and what became of its drafts."""
        self._ledger.book(result, self._trials)
        self._records.pass_steps(1)
        if any(result.asked):
            self._records.take(result, self._step, _steps_between(result.num_verify))
        if self._records.fold(self._step):
            self._news += 1
            self._rest_until = 0

    def observe_rest(self, num_requests: int, kv_tokens: int, target_seconds: float) -> None:
        """A plain step at rest was read. One of a few is looked at, and stands for all of them."""
        self._num_rested += 1
        if self._num_rested >= _RESTS_A_LOOK or self.report.num_steps < _NEW_STEPS:
            self._ledger.book_rest(num_requests, kv_tokens, target_seconds, self._num_rested, self._trials)
            self._records.pass_steps(self._num_rested)
            self._num_rested = 0


def _steps_between(batch: int) -> int:
    """Steps from one decision, or one look at a request's records, to the next: thinking costs
    time as well, and what one step can tell of a large batch is little."""
    return max(4, batch // 16)
