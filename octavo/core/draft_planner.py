"""Who tells the scheduler how many drafts to ask for: once a step, for all requests that sample in it.

`EachRequest` asks a function for each request (fixed numbers, tests). `BudgetPlanner` lets the draft
budget decide, and tells it what became of the drafts and how long the steps took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from octavo.core.draft_budget import DraftBudget
from octavo.core.draft_plan import DraftPlan, DraftState, StepFacts, StepResult
from octavo.core.messages import DraftPasses
from octavo.core.request import Request


@dataclass(slots=True)
class PlannedStep:
    """What the scheduler knows of the step it is building."""

    requests: Sequence[Request]  # those that sample in it
    rooms: Sequence[int]  # drafts each could still emit
    kv_tokens: int  # context of all of them
    chunk_rows: int  # prompt rows that wait for the next step
    kv_room: int  # tokens the free blocks hold
    prompt_rows: int = 0  # of this step
    # With a draft model, by index:
    owed: Sequence[int] = ()  # rows it has to catch up before it can draft
    blocked: Mapping[int, str] = field(default_factory=dict)  # requests it cannot draft for, and why
    catch_up_room: int = 0  # rows the step's token budget has left


@dataclass(slots=True)
class PlannedDrafts:
    """What to do at the end of the step."""

    counts: Sequence[int]  # drafts for each request
    plan: object | None = None  # to be remembered with the step
    passes: int = 0  # of the draft model, if there is one
    catch_up: Mapping[int, int] = field(default_factory=dict)  # index -> rows it computes for it


@dataclass(slots=True)
class SpeculationAccount:
    """What speculating cost and brought one request, or all of them."""

    draft_seconds: float
    verify_seconds: float
    num_cut: int  # drafts of a fixed number that a limit did not allow
    net_speedup: float


@dataclass(slots=True)
class ReadStep:
    """What a step that was read brought. Sequences are parallel to `requests`, those with drafts."""

    plan: object | None  # what `plan` returned beside the numbers when this step was built
    num_rows: int
    chunk_rows: int
    num_verify: int  # requests with verify rows, with and without drafts
    kv_tokens: int
    target_seconds: float
    draft_seconds: float
    requests: Sequence[Request]
    asked: Sequence[int]  # drafts the rows were there for
    drafted: Sequence[int]
    accepted: Sequence[int]
    from_model: frozenset[int] = frozenset()  # drafts of a draft model, where there is a lookup as well
    passes: DraftPasses | None = None  # what the draft model ran at the end of the step


class DraftPlanner(Protocol):
    """The scheduler's view of whoever decides about drafts."""

    def rests(self, num_requests: int) -> bool:
        """True if this step gets no drafts whatever there is to say of it, so that `plan` need not be
        asked: provided that so many requests sample in it, and none for the first time."""
        ...

    def plan(self, step: PlannedStep) -> PlannedDrafts:
        """Drafts to make at the end of the step for each of its requests."""
        ...

    def observe(self, step: ReadStep) -> None:
        """A step was read, in order."""
        ...

    def observe_rest(self, num_requests: int, kv_tokens: int, target_seconds: float) -> None:
        """The same of a step with one row a request that was not planned, and verified no drafts."""
        ...

    def reason(self, plan: object | None, index: int) -> tuple[int, str]:
        """For a trace: the number of drafts planned for request `index` of a plan, and why."""
        ...

    def account(self, request: Request | None = None) -> SpeculationAccount | None:
        """Of one request, or of all; None where nobody keeps it."""
        ...


class EachRequest:
    """A number of drafts for each request by itself."""

    def __init__(self, num_drafts: Callable[[Request], int]) -> None:
        self._num_drafts = num_drafts

    def rests(self, num_requests: int) -> bool:
        """See DraftPlanner."""
        return False

    def plan(self, step: PlannedStep) -> PlannedDrafts:
        """See DraftPlanner."""
        counts = [min(self._num_drafts(r), room) for r, room in zip(step.requests, step.rooms, strict=True)]
        catch_up: dict[int, int] = {}
        left = step.catch_up_room
        for index, owed in enumerate(step.owed):
            granted = min(owed, left) if counts[index] and index not in step.blocked else 0
            if granted:
                catch_up[index] = granted
                left -= granted
        return PlannedDrafts(counts, counts, max(counts, default=0), catch_up)

    def observe(self, step: ReadStep) -> None:
        """Learns nothing."""

    def observe_rest(self, num_requests: int, kv_tokens: int, target_seconds: float) -> None:
        """Learns nothing."""

    def reason(self, plan: object | None, index: int) -> tuple[int, str]:
        """See DraftPlanner."""
        assert isinstance(plan, list)
        return plan[index], f"fixed K={plan[index]}"

    def account(self, request: Request | None = None) -> SpeculationAccount | None:
        """See DraftPlanner."""
        return None


class BudgetPlanner:
    """The draft budget over the scheduler's requests.

    `lookup` and `model` are the names under which the acceptance of a drafter without passes, and of a
    draft model, is learned; there may be one or both. `fixed` is the engine's own number of drafts,
    None for auto. A request's num_speculative_tokens wins.
    """

    def __init__(
        self,
        budget: DraftBudget,
        lookup: str | None = None,
        *,
        model: str | None = None,
        fixed: int | None = None,
    ) -> None:
        self.budget = budget
        self._lookup = lookup
        self._model = model
        self._fixed = fixed

    def rests(self, num_requests: int) -> bool:
        """See DraftPlanner."""
        return self.budget.rests(num_requests)

    def plan(self, step: PlannedStep) -> PlannedDrafts:
        """See DraftPlanner."""
        states = [r.draft_state or self._add(r) for r in step.requests]
        plan = self.budget.plan(
            StepFacts(
                states,
                step.rooms,
                step.kv_tokens,
                step.chunk_rows,
                step.kv_room,
                step.owed,
                step.blocked,
                step.catch_up_room,
                step.prompt_rows,
            )
        )
        return PlannedDrafts(plan.num_drafts, plan, plan.passes, plan.catch_up)

    def observe(self, step: ReadStep) -> None:
        """See DraftPlanner."""
        plan = step.plan
        assert plan is None or isinstance(plan, DraftPlan)
        self.budget.observe(
            StepResult(
                plan,
                step.num_rows,
                step.kv_tokens,
                step.chunk_rows,
                step.num_verify,
                step.target_seconds,
                step.draft_seconds,
                [r.draft_state or self._add(r) for r in step.requests],
                step.asked,
                step.drafted,
                step.accepted,
                step.from_model,
                step.passes,
            )
        )

    def observe_rest(self, num_requests: int, kv_tokens: int, target_seconds: float) -> None:
        """See DraftPlanner."""
        self.budget.observe_rest(num_requests, kv_tokens, target_seconds)

    def reason(self, plan: object | None, index: int) -> tuple[int, str]:
        """See DraftPlanner."""
        assert isinstance(plan, DraftPlan)
        return plan.num_drafts[index], plan.reason(index)

    def account(self, request: Request | None = None) -> SpeculationAccount | None:
        """See DraftPlanner."""
        if request is None:
            all_ = self.budget.report
            return SpeculationAccount(
                all_.draft_seconds, all_.verify_seconds, all_.num_cut_drafts, all_.net_speedup
            )
        one = request.draft_state
        if one is None:
            return None
        speedup = self.budget.net_speedup(one)
        return SpeculationAccount(one.draft_seconds, one.verify_seconds, one.num_cut, speedup)

    def _add(self, request: Request) -> DraftState:
        fixed = request.num_speculative_tokens if request.num_speculative_tokens is not None else self._fixed
        # A predicted output and a text's own repetitions are different drafters.
        lookup = f"{self._lookup}/prediction" if self._lookup and request.prediction_ids else self._lookup
        request.draft_state = self.budget.add(
            request.request_id, lookup=lookup, model=self._model, fixed=fixed
        )
        return request.draft_state
