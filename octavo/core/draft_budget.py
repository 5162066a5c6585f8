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
* *Curiosity, on an allowance.* 0.5% of the device's time may be given away. A request that has
  stopped drafting gets one draft now and then, to see whether its text has changed.
* *Honesty.* From the same allowance, short windows of plain steps at the same load show what a
  plain step really takes. They correct the cost model, and the net speed-up is reported by it.
* *Limits.* Drafts never take more than the token budget, the free KV blocks and the request's own
  limit leave, and leave half of the free rows to waiting prompts. What a fixed number
  (`num_speculative_tokens`) loses by that is counted.

Draft models and lookups are the same here: a lookup's drafts just need no pass. A draft model that
has fallen behind must first catch up; a request starts (again) only if what its drafts save over
the tokens to come is worth that.

Plain Python, no tensors: `plan` when a step is built, `observe` when its output was read.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from octavo.core.acceptance import MAX_DRAFTS, RequestAcceptance, SharedAcceptance
from octavo.core.cost_model import CostModel
from octavo.core.draft_choice import NOTHING, Curve, choose, expected

MIN_GAIN = 1.03
ALLOWANCE = 0.005  # of device time
_WINDOW_STEPS = 4
_WINDOW_DISTANCE = 100  # steps from one window to the next, at least
_EXPLORE_TOGETHER = 8  # requests that share a step, and a draft pass, of exploration
_EXPLORE_DISTANCE = 4  # steps between two explorations of one request, at least
_CATCH_UP_HORIZON = 128  # tokens over which a draft model's catch-up must pay off
_CATCH_UP_ROWS = 256  # a step, at most
_UNLIMITED = 1 << 60


class DraftState:
    """What the budget knows of one request. Made by `DraftBudget.add`, kept by the request.

    `fixed` is the number of drafts somebody asked for, or None for the budget's own choice.
    """

    __slots__ = ("_explored", "_speed_start", "chosen", "fixed", "free", "lookup", "model", "num_cut",
                 "passed", "queued", "request_id", "saved_seconds")  # fmt: skip

    def __init__(
        self,
        request_id: str,
        lookup: RequestAcceptance | None,
        model: RequestAcceptance | None,
        fixed: int | None,
    ) -> None:
        assert fixed is None or 0 <= fixed <= MAX_DRAFTS, "checked by the configuration"
        self.request_id = request_id
        self.lookup = lookup
        self.model = model
        self.fixed = fixed
        self.free = NOTHING
        self.passed = NOTHING
        # Drafts a step: in steps without a prompt's chunk, and with one.
        self.chosen = [0, 0] if fixed is None else [fixed, fixed]
        self.num_cut = 0  # drafts asked for by `fixed` that some limit did not allow
        self.queued = False  # has records to be folded
        self.saved_seconds = 0.0  # by its accepted drafts; what the steps took longer is not in here
        self._explored = 0  # the step of the last exploration
        self._speed_start: tuple[float, float] | None = None

    def update_curves(self, reserves_rows: bool) -> None:
        """Recompute the chances after records were folded or the prior changed."""
        lookup, model = self.lookup, self.model
        if lookup is not None:
            match = lookup.match
            found = lookup.chances()
            if reserves_rows or model is not None:
                self.free = Curve([match * chance for chance in found])
            else:
                self.free = Curve(found, rows=match)
            self.passed = self.free
        if model is None:
            return
        chances = model.chances()
        if lookup is not None:  # the lookup's draft where it matches, the model's otherwise
            length = max(len(found), len(chances))
            found += [0.0] * (length - len(found))
            chances += [0.0] * (length - len(chances))
            chances = [match * a + (1.0 - match) * b for a, b in zip(found, chances, strict=True)]
        self.passed = Curve(chances)


@dataclass(slots=True)
class StepFacts:
    """What the scheduler knows when it plans the drafts made at the end of a step.

    They are verified in the next step; `kv_tokens`, `chunk_rows` and `kv_room` are about that one,
    as well as can be told. The sequences are parallel to `states`: the requests that sample.
    """

    states: Sequence[DraftState]
    rooms: Sequence[int]  # drafts that the request's own limit allows
    kv_tokens: int  # context of all these requests
    chunk_rows: int = 0  # prompt rows that wait for the next step
    kv_room: int = _UNLIMITED  # draft rows the free blocks hold without a preemption
    owed: Sequence[int] = ()  # tokens the draft model is behind; empty: none


@dataclass(slots=True)
class DraftPlan:
    """How many drafts to make at the end of the step, and why; parallel to StepFacts.states."""

    states: Sequence[DraftState] = ()
    num_drafts: list[int] = field(default_factory=list)
    passes: int = 0  # draft model passes, if there is one
    catch_up: dict[int, int] = field(default_factory=dict)  # index -> rows the draft model computes
    gain: float = 1.0  # expected speed-up against plain decoding
    counterfactual: bool = False
    explored: tuple[int, ...] = ()
    cut: dict[int, tuple[int, str]] = field(default_factory=dict)  # index -> (drafts wanted, why cut)
    too_far_behind: frozenset[int] = frozenset()

    def reason(self, index: int) -> str:
        """One short line for a trace."""
        count = self.num_drafts[index]
        if index in self.cut:
            wanted, why = self.cut[index]
            return f"cut by {why}: K={count} of {wanted}"
        if index in self.catch_up and not count:
            return f"plain: the draft model catches up {self.catch_up[index]} tokens"
        if index in self.too_far_behind:
            return "plain: catching up would cost the draft model more than it brings"
        if self.states[index].fixed is not None:
            return f"fixed K={count}"
        if self.counterfactual:
            return "plain: counterfactual"
        if index in self.explored:
            return "explore"
        if count:
            return f"gain {self.gain:.2f}x at K={count}"
        if self.gain > 1.0:
            return "plain: this request's drafts are not worth their rows"
        return "plain: no drafts are worth their time"


@dataclass(slots=True)
class StepResult:
    """What a step that was read tells the budget. Sequences are parallel to `states`.

    `states` are the requests with verify rows. `asked` are the drafts planned for this step and
    not cut by the scheduler, `drafted` those really made, `accepted` those accepted. For a request
    that ended in this step, asked = accepted: the drafts behind its end were not refused.
    """

    plan: DraftPlan | None  # of the drafts made at the end of this very step
    rows: int
    kv_tokens: int
    chunk_rows: int
    target_seconds: float
    draft_seconds: float
    states: Sequence[DraftState]
    asked: Sequence[int]
    drafted: Sequence[int]
    accepted: Sequence[int]
    # Index into `states` of drafts the model made for a request that has a lookup as well.
    from_model: frozenset[int] = frozenset()


class DraftPolicy(Protocol):
    """The seam of the scheduler: one `plan` a step that samples, one `observe` a step that was read."""

    def add(
        self,
        request_id: str,
        *,
        lookup: str | None = None,
        model: str | None = None,
        fixed: int | None = None,
    ) -> DraftState: ...

    def plan(self, facts: StepFacts) -> DraftPlan: ...

    def observe(self, result: StepResult) -> None: ...


@dataclass(slots=True)
class BudgetReport:
    """Since the start. Seconds are device time."""

    seconds: float = 0.0
    saved_seconds: float = 0.0  # against plain decoding; negative if speculation lost
    allowance_spent: float = 0.0  # expected seconds given to exploration and plain windows
    num_steps: int = 0
    num_speculating_steps: int = 0
    num_explored: int = 0
    num_windows: int = 0
    num_cut_drafts: int = 0  # of fixed numbers
    num_cut_steps: int = 0
    num_changes: int = 0  # of the choice for the whole batch
    # Observed plain step ÷ what the model had expected, middle of the windows: how far to trust it.
    window_error: float = 0.0

    @property
    def net_speedup(self) -> float:
        """Time of plain decoding for the same tokens ÷ time taken."""
        return 1.0 + self.saved_seconds / self.seconds if self.seconds else 1.0


@dataclass(slots=True)
class _Policy:
    """The choice in force, one for steps without a prompt's chunk and one for steps with one."""

    passes: int = 0
    gain: float = 1.0
    price: float = 1.0  # of one more draft row, in tokens
    plain_seconds: float = 0.0
    could_pay: bool = True  # if every draft were accepted
    saved_seconds: float = 0.0  # a step
    extra_tokens: float = 0.0  # a step
    batch: int = 0
    chunk_rows: int = 0
    steps_left: int = 0

    def is_due(self, batch: int, chunk_rows: int) -> bool:
        self.steps_left -= 1
        if self.steps_left < 0:
            return True
        if abs(batch - self.batch) * 4 > self.batch:
            return True
        return chunk_rows > 2 * self.chunk_rows or 2 * chunk_rows < self.chunk_rows


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
    ) -> None:
        self.target = target
        self.draft = draft
        self.report = BudgetReport()
        self._max_rows = max_num_batched_tokens
        self._reserves_rows = reserves_rows
        self._shared: dict[str, SharedAcceptance] = {}
        self._policies = (_Policy(), _Policy())
        self._step = 0
        self._to_fold: deque[DraftState] = deque()
        self._lookup_seconds = 2e-6  # a request
        self._allowance = 0.0  # seconds
        self._next_exploration = 0
        self._window_left = 0
        self._window_unread = 0
        self._next_window = _WINDOW_DISTANCE
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
        state = DraftState(request_id, self._acceptance(lookup), self._acceptance(model), fixed)
        state._speed_start = (self.report.seconds, self._lost_seconds)
        state._explored = self._step
        state.update_curves(self._reserves_rows)
        if fixed is None:
            for index, policy in enumerate(self._policies):
                state.chosen[index] = _count_worth(state, policy)
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
        assert state._speed_start is not None
        seconds = self.report.seconds - state._speed_start[0]
        lost = self._lost_seconds - state._speed_start[1]
        return 1.0 + (state.saved_seconds - lost) / seconds if seconds > 0.0 else 1.0

    # ------------------------------------------------------------------ plan

    def plan(self, facts: StepFacts) -> DraftPlan:
        """The drafts to make at the end of this step, for each request that samples in it."""
        self._step += 1
        states = facts.states
        if not states:
            return DraftPlan()
        mixed = facts.chunk_rows > 0
        policy = self._policies[mixed]
        if policy.is_due(len(states), facts.chunk_rows):
            self._decide(policy, mixed, facts)
        plan = DraftPlan(states)
        plan.gain = policy.gain
        if self._window_left or (not mixed and self._start_window(policy)):
            self._window_left -= 1
            self._window_unread += 1
            plan.counterfactual = True
            plan.num_drafts = [state.fixed or 0 for state in states]
        else:
            plan.num_drafts = [state.chosen[mixed] for state in states]
            saving = policy.gain > 1.0 and self._step >= self._next_window  # for a window
            if policy.could_pay and not saving and self._step >= self._next_exploration:
                self._explore(plan, facts)
        plan.num_drafts = list(map(min, plan.num_drafts, facts.rooms))
        if facts.owed and any(facts.owed):
            self._catch_up(plan, policy, facts)
        self._keep_limits(plan, facts)
        if self.draft is not None:
            plan.passes = self._passes(plan, policy)
        return plan

    def _passes(self, plan: DraftPlan, policy: _Policy) -> int:
        most = 0
        for index, (state, count) in enumerate(zip(plan.states, plan.num_drafts, strict=True)):
            if count <= most or state.model is None:
                continue
            if state.lookup is not None and state.fixed is None:  # the lookup alone goes deeper
                count = min(count, max(policy.passes, index in plan.explored))
            most = max(most, count)
        return most

    def _decide(self, policy: _Policy, mixed: bool, facts: StepFacts) -> None:
        """Find the best choice, and take it up if it is enough better than the one in force."""
        states, kv_tokens, chunk_rows = facts.states, facts.kv_tokens, facts.chunk_rows
        batch = len(states)
        policy.batch, policy.chunk_rows = batch, chunk_rows
        policy.steps_left = _steps_between(batch) - 1
        target = self.target
        plain_seconds = target.seconds(batch, kv_tokens)
        chunk_seconds = 0.0
        if chunk_rows:
            chunk_seconds = target.seconds(chunk_rows + batch, kv_tokens) - plain_seconds

        def seconds(rows: float) -> float:
            return target.seconds(chunk_rows + rows, kv_tokens) - chunk_seconds

        autos = [state for state in states if state.fixed is None]
        tokens, rows, fixed_passes = float(batch), float(batch), 0
        for state in states if len(autos) < batch else ():
            if state.fixed:
                more_tokens, more_rows = expected(state, state.fixed, state.fixed if state.model else 0)
                tokens, rows = tokens + more_tokens, rows + more_rows
                fixed_passes = max(fixed_passes, state.fixed if state.model else 0)
        pass_seconds = self._pass_seconds(states, kv_tokens)
        overhead = self._lookup_seconds * batch
        most = max(0, min(self._room(facts) - int(rows - batch), facts.kv_room))

        now_tokens, now_rows = tokens, rows
        for state in autos:
            if count := state.chosen[mixed]:
                more_tokens, more_rows = expected(state, count, policy.passes)
                now_tokens, now_rows = now_tokens + more_tokens, now_rows + more_rows
        plain_rate = tokens / seconds(rows)
        now_rate = plain_rate
        if now_rows > rows:
            now_rate = now_tokens / (seconds(now_rows) + overhead + policy.passes * pass_seconds)
        changed = False
        if now_rate < plain_rate:
            for state in autos:
                state.chosen[mixed] = 0
            policy.passes = 0
            changed = True
            now_rate, now_tokens, now_rows = plain_rate, tokens, rows

        edges = [edge - chunk_rows for edge in target.edges] if chunk_rows else target.edges
        extra = pass_seconds if self.draft is not None else 0.0
        best = choose(autos, tokens, int(rows), most, seconds, overhead, extra, edges, policy.passes)
        counts = best.drafts(autos)
        best_tokens, best_rows = tokens, rows
        for state, count in zip(autos, counts, strict=True):
            if count:
                more_tokens, more_rows = expected(state, count, best.passes)
                best_tokens, best_rows = best_tokens + more_tokens, best_rows + more_rows
        best_rate = plain_rate
        if best_rows > rows:
            best_rate = best_tokens / (seconds(best_rows) + overhead + best.passes * pass_seconds)
        step = max(1.0, batch / 8)
        dearer = best_rate * (seconds(best_rows + step) - seconds(best_rows)) / step
        if best_rate > MIN_GAIN * now_rate:
            for state, count in zip(autos, counts, strict=True):
                state.chosen[mixed] = count
            policy.passes = best.passes
            changed = True
            now_rate, now_tokens = best_rate, best_tokens
        elif batch > 1:
            cheaper = best_rate * (seconds(best_rows) - seconds(max(rows, best_rows - step))) / step
            for state, count in zip(autos, counts, strict=True):
                old = state.chosen[mixed]
                if count == old or (count > policy.passes and state.lookup is None):
                    continue
                new_tokens, new_rows = expected(state, count, policy.passes)
                old_tokens, old_rows = expected(state, old, policy.passes)
                price = cheaper if count > old else dearer
                profit = new_tokens - old_tokens - price * (new_rows - old_rows)
                if profit > (MIN_GAIN - 1.0) * (1.0 + old_tokens):
                    state.chosen[mixed] = count
        self.report.num_changes += changed
        policy.could_pay = any(
            batch * (1 + n) / (seconds(batch * (1 + n)) + overhead + n * extra) > MIN_GAIN * plain_rate
            for n in (1, 2, 4, 8, MAX_DRAFTS)
        )
        policy.price = dearer
        policy.gain = now_rate / plain_rate
        policy.plain_seconds = plain_seconds
        policy.extra_tokens = now_tokens - tokens
        policy.saved_seconds = now_tokens / plain_rate - now_tokens / now_rate

    def _pass_seconds(self, states: Sequence[DraftState], kv_tokens: int) -> float:
        if self.draft is None:
            return 0.0
        count = sum(1 for state in states if state.model is not None)
        return self.draft.seconds(count, kv_tokens * count / len(states)) if count else 0.0

    def _room(self, facts: StepFacts) -> int:
        """Draft rows the token budget allows; waiting prompts keep half of what is free."""
        free = max(0, self._max_rows - len(facts.states))
        return free - min(facts.chunk_rows, free // 2)

    def _start_window(self, policy: _Policy) -> bool:
        if self._step < self._next_window or policy.gain <= 1.0:
            return False
        cost = _WINDOW_STEPS * policy.plain_seconds * (1.0 - 1.0 / policy.gain)
        if cost > self._allowance:
            return False
        self._spend(cost)
        self._next_window = self._step + _WINDOW_DISTANCE
        self._window_left = _WINDOW_STEPS
        self.report.num_windows += 1
        return True

    def _spend(self, seconds: float) -> None:
        self._allowance -= seconds
        self.report.allowance_spent += seconds

    def _explore(self, plan: DraftPlan, facts: StepFacts) -> None:
        """One draft for requests that have stopped drafting, if the allowance pays for it."""
        states, owed = facts.states, facts.owed
        before = self._step - _EXPLORE_DISTANCE
        idle = [
            (states[index]._explored, index)
            for index, count in enumerate(plan.num_drafts)
            if not count and states[index].fixed is None and states[index]._explored <= before
        ]
        if not idle:
            return
        chosen = [index for _, index in heapq.nsmallest(_EXPLORE_TOGETHER, idle)]
        rows = facts.chunk_rows + len(states) + sum(plan.num_drafts)
        target = self.target
        cost = target.seconds(rows + len(chosen), facts.kv_tokens) - target.seconds(rows, facts.kv_tokens)
        cost += self._lookup_seconds * len(chosen)
        if self.draft is not None and any(states[index].model is not None for index in chosen):
            if not any(plan.num_drafts):
                cost += self._pass_seconds(states, facts.kv_tokens)
            if owed and (behind := sum(owed[index] for index in chosen)):
                cost += self.draft.seconds(behind)
        if cost > self._allowance:
            # Not before the allowance can have grown that far.
            per_step = ALLOWANCE * target.seconds(rows, facts.kv_tokens)
            self._next_exploration = self._step + 1 + int((cost - self._allowance) / per_step / 2)
            return
        self._spend(max(0.0, cost))
        self.report.num_explored += len(chosen)
        for index in chosen:
            plan.num_drafts[index] = 1
            states[index]._explored = self._step
        plan.explored = tuple(chosen)

    def _catch_up(self, plan: DraftPlan, policy: _Policy, facts: StepFacts) -> None:
        """Have the draft model catch up where it pays; no drafts before it has."""
        assert self.draft is not None, "only a draft model can be behind"
        left = min(_CATCH_UP_ROWS, max(0, self._room(facts) - sum(plan.num_drafts)))
        too_far: list[int] = []
        for index, (state, behind) in enumerate(zip(facts.states, facts.owed, strict=True)):
            count = plan.num_drafts[index]
            if not count or not behind or state.model is None:
                continue
            if state.fixed is None and index not in plan.explored:
                gain, _ = expected(state, count, policy.passes)
                share = gain / policy.extra_tokens if policy.extra_tokens > 0.0 else 0.0
                steps = min(facts.rooms[index], _CATCH_UP_HORIZON) / (1.0 + gain)
                if share * policy.saved_seconds * steps < MIN_GAIN * self.draft.seconds(behind):
                    plan.num_drafts[index] = 0
                    too_far.append(index)
                    continue
            granted = min(behind, left)
            left -= granted
            if granted:
                plan.catch_up[index] = granted
            if granted < behind:
                plan.num_drafts[index] = 0
        plan.too_far_behind = frozenset(too_far)

    def _keep_limits(self, plan: DraftPlan, facts: StepFacts) -> None:
        """Cut what the token budget or the KV memory does not hold: fixed numbers go first."""
        counts = plan.num_drafts
        allowed, why = self._room(facts) - sum(plan.catch_up.values()), "the token budget"
        if facts.kv_room < allowed:
            allowed, why = facts.kv_room, "the KV memory"
        if sum(counts) <= allowed:
            return
        wanted = list(counts)
        states = facts.states
        fixed = [index for index, state in enumerate(states) if state.fixed is not None]
        own = [index for index, state in enumerate(states) if state.fixed is None]
        left = _share_out(counts, fixed, max(0, allowed))
        _share_out(counts, own, left)
        for index, count in enumerate(counts):
            if count < wanted[index]:
                plan.cut[index] = (wanted[index], why)
                if states[index].fixed is not None:
                    states[index].num_cut += wanted[index] - count
                    self.report.num_cut_drafts += wanted[index] - count
        self.report.num_cut_steps += any(states[index].fixed is not None for index in plan.cut)

    # ------------------------------------------------------------------ observe

    def observe(self, result: StepResult) -> None:
        """Learn from a step that was read: what it took, and what became of its drafts."""
        report = self.report
        report.num_steps += 1
        speculated = any(result.asked)
        seconds = self._observe_times(result, speculated)
        report.seconds += seconds
        self._allowance += ALLOWANCE * seconds
        if not result.states:
            return
        if speculated or (result.plan is not None and any(result.plan.num_drafts)):
            self._account(result, seconds)
        if speculated:
            report.num_speculating_steps += 1
            self._record(result)
        if self._to_fold:
            self._fold(max(8, len(result.states) // 16))

    def _observe_times(self, result: StepResult, speculated: bool) -> float:
        """Correct the cost models. Returns the step's seconds, with surprises bounded."""
        rows, kv_tokens, target, plan = result.rows, result.kv_tokens, self.target, result.plan
        wanted = target.seconds(rows, kv_tokens)
        if result.target_seconds <= 0.0:
            return wanted
        in_window = bool(self._window_unread and not speculated and not result.chunk_rows and result.states)
        if in_window:
            self._window_unread -= 1
            error = abs(target.surprise(rows, kv_tokens, result.target_seconds))
            self.report.window_error += 0.1 * (error - self.report.window_error)
        seconds = min(result.target_seconds, 1.3 * wanted)
        target.observe(rows, kv_tokens, result.target_seconds, deliberate=in_window)
        if plan is None or result.draft_seconds <= 0.0:
            return seconds
        drafting = sum(1 for count in plan.num_drafts if count)
        if plan.passes and self.draft is not None:
            expected_seconds = result.draft_seconds
            if not plan.catch_up:
                batch = sum(1 for state in plan.states if state.model is not None)
                kv = int(kv_tokens * batch / max(1, len(plan.states)))
                expected_seconds = plan.passes * self.draft.seconds(batch, kv)
                self.draft.observe(batch, kv, result.draft_seconds / plan.passes)
            return seconds + min(result.draft_seconds, 1.3 * expected_seconds)
        if drafting:
            each = result.draft_seconds / drafting
            self._lookup_seconds *= 1.1 if each > self._lookup_seconds else 1.0 / 1.1
            return seconds + min(result.draft_seconds, 1.3 * drafting * self._lookup_seconds)
        return seconds

    def _account(self, result: StepResult, seconds: float) -> None:
        """What this step saved, compared with plain steps at the same load."""
        batch, kv_tokens = len(result.states), result.kv_tokens
        plain = self.target.seconds(batch, kv_tokens)
        longer = seconds - plain
        if result.chunk_rows:
            longer = seconds - self.target.seconds(batch + result.chunk_rows, kv_tokens)
        self._lost_seconds += longer
        self.report.saved_seconds += plain * sum(result.accepted) / batch - longer
        for state, accepted in zip(result.states, result.accepted, strict=True):
            if accepted:
                state.saved_seconds += accepted * plain

    def _record(self, result: StepResult) -> None:
        to_fold, from_model = self._to_fold, result.from_model
        fold_after = _steps_between(len(result.states))
        columns = zip(result.states, result.asked, result.drafted, result.accepted, strict=True)
        for index, (state, asked, drafted, accepted) in enumerate(columns):
            if not asked:
                continue
            source = state.lookup
            if source is not None and index in from_model:
                source.record(asked, 0, 0)  # it had found nothing
                source = None
            if source is None:
                source = state.model
                if source is None:
                    continue
                if state.lookup is not None:
                    asked = min(asked, drafted)  # the model's part of what was asked for
            source.record(asked, drafted, accepted)
            idle = not (state.chosen[0] or state.chosen[1])
            if idle and accepted:
                state._explored = -1  # the text may have changed: look again soon
            if not state.queued and (idle or source.num_pending >= min(fold_after, 1 + source.num_folds)):
                state.queued = True
                to_fold.append(state)

    def _fold(self, most: int) -> None:
        """The arithmetic of the records, for a few requests a step."""
        to_fold = self._to_fold
        folded: list[DraftState] = []
        while to_fold and len(folded) < most:
            state = to_fold.popleft()
            state.queued = False
            for source in (state.lookup, state.model):
                if source is not None and source.num_pending:
                    source.fold(self._step)
            folded.append(state)
        if not folded:
            return
        for shared in self._shared.values():
            shared.refresh()
        for state in folded:
            state.update_curves(self._reserves_rows)


def _steps_between(batch: int) -> int:
    """Steps from one decision, or one look at a request's records, to the next: thinking costs
    time as well, and what one step can tell of a large batch is little."""
    return max(4, batch // 16)


def _count_worth(state: DraftState, policy: _Policy) -> int:
    """The drafts that pay at the price in force; none if they do not bring 3% together."""
    best = count = 0
    profit = MIN_GAIN - 1.0
    most = MAX_DRAFTS if state.lookup is not None else policy.passes
    for count in range(1, most + 1):
        tokens, rows = expected(state, count, policy.passes)
        if tokens - policy.price * rows > profit:
            best, profit = count, tokens - policy.price * rows
    return best


def _share_out(counts: list[int], indices: Sequence[int], allowed: int) -> int:
    """Cut the deepest drafts until the sum is allowed. Returns what is left of it."""
    total = sum(counts[index] for index in indices)
    if total <= allowed:
        return allowed - total
    left = allowed
    given = dict.fromkeys(indices, 0)
    for depth in range(1, MAX_DRAFTS + 1):
        for index in indices:
            if left and counts[index] >= depth:
                given[index] = depth
                left -= 1
    for index in indices:
        counts[index] = given[index]
    return 0
