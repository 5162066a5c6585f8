"""Who tells the scheduler how many drafts to ask for: once a step, for all requests that sample in it.

`EachRequest` asks a function for each request (fixed numbers, tests). `BudgetPlanner` lets the draft
budget decide, and tells it what became of the drafts and how long the steps took.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from octavo.core.draft_budget import DraftBudget
from octavo.core.draft_plan import DraftPlan, DraftState, StepFacts, StepResult
from octavo.core.request import Request


@dataclass(slots=True)
class PlannedStep:
    """What the scheduler knows of the step it is building."""

    requests: Sequence[Request]  # those that sample in it
    rooms: Sequence[int]  # drafts each could still emit
    kv_tokens: int  # context of all of them
    chunk_rows: int  # prompt rows that wait for the next step
    kv_room: int  # tokens the free blocks hold


@dataclass(slots=True)
class ReadStep:
    """What a step that was read brought. Sequences are parallel to `requests`, those with verify rows."""

    plan: object | None  # what `plan` returned beside the numbers when this step was built
    num_rows: int
    chunk_rows: int
    kv_tokens: int
    target_seconds: float
    draft_seconds: float
    requests: Sequence[Request]
    asked: Sequence[int]  # drafts the rows were there for
    drafted: Sequence[int]
    accepted: Sequence[int]


class DraftPlanner(Protocol):
    """The scheduler's view of whoever decides about drafts."""

    def plan(self, step: PlannedStep) -> tuple[Sequence[int], object | None]:
        """Drafts to make at the end of the step for each of its requests, and what to remember."""
        ...

    def observe(self, step: ReadStep) -> None:
        """A step was read, in order."""
        ...

    def reason(self, plan: object | None, index: int) -> tuple[int, str]:
        """For a trace: the number of drafts planned for request `index` of a plan, and why."""
        ...


class EachRequest:
    """A number of drafts for each request by itself."""

    def __init__(self, num_drafts: Callable[[Request], int]) -> None:
        self._num_drafts = num_drafts

    def plan(self, step: PlannedStep) -> tuple[Sequence[int], object | None]:
        """See DraftPlanner."""
        counts = [min(self._num_drafts(r), room) for r, room in zip(step.requests, step.rooms, strict=True)]
        return counts, counts

    def observe(self, step: ReadStep) -> None:
        """Learns nothing."""

    def reason(self, plan: object | None, index: int) -> tuple[int, str]:
        """See DraftPlanner."""
        assert isinstance(plan, list)
        return plan[index], f"fixed K={plan[index]}"


class BudgetPlanner:
    """The draft budget over the scheduler's requests.

    `drafter` is the name under which acceptance is learned; `fixed` the engine's own number of drafts,
    None for auto. A request's num_speculative_tokens wins.
    """

    def __init__(self, budget: DraftBudget, drafter: str, fixed: int | None = None) -> None:
        self.budget = budget
        self._drafter = drafter
        self._fixed = fixed

    def plan(self, step: PlannedStep) -> tuple[Sequence[int], object | None]:
        """See DraftPlanner."""
        states = [r.draft_state or self._add(r) for r in step.requests]
        plan = self.budget.plan(StepFacts(states, step.rooms, step.kv_tokens, step.chunk_rows, step.kv_room))
        return plan.num_drafts, plan

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
                step.target_seconds,
                step.draft_seconds,
                [r.draft_state or self._add(r) for r in step.requests],
                step.asked,
                step.drafted,
                step.accepted,
            )
        )

    def reason(self, plan: object | None, index: int) -> tuple[int, str]:
        """See DraftPlanner."""
        assert isinstance(plan, DraftPlan)
        return plan.num_drafts[index], plan.reason(index)

    def _add(self, request: Request) -> DraftState:
        fixed = request.num_speculative_tokens if request.num_speculative_tokens is not None else self._fixed
        # A predicted output and a text's own repetitions are different drafters.
        name = f"{self._drafter}/prediction" if request.prediction_ids else self._drafter
        request.draft_state = self.budget.add(request.request_id, lookup=name, fixed=fixed)
        return request.draft_state
