"""Fixtures of the speculation tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from octavo.core.draft_planner import BudgetPlanner, ReadStep
from octavo.core.messages import DraftPasses

SIZES = (1, 2, 4, 8, 16, 32, 64)


def step_seconds(rows: int) -> float:
    """What a step takes on the steady machine."""
    return 4e-3 + 1e-4 * rows


def pass_seconds(rows: int) -> float:
    """What a pass of the draft model takes there."""
    return 4e-4 + 1e-5 * rows


@pytest.fixture
def steady_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine and all it computes are real, the clock the budget sees is not: a busy machine's would
    decide whether drafts pay."""

    def drafting(passes: DraftPasses | None) -> tuple[float, DraftPasses | None]:
        if passes is None:
            return 1e-5, None  # a lookup
        seconds = [pass_seconds(rows) for rows in passes.rows]
        first = seconds[0] if passes.first_seconds else 0.0
        return sum(seconds), replace(passes, first_seconds=first)

    observe = BudgetPlanner.observe

    def observe_steadily(planner: BudgetPlanner, step: ReadStep) -> None:
        seconds, passes = drafting(step.passes)
        steady = replace(
            step, target_seconds=step_seconds(step.num_rows), draft_seconds=seconds, passes=passes
        )
        observe(planner, steady)

    def observe_rest(planner: BudgetPlanner, num_requests: int, kv_tokens: int, _: float) -> None:
        planner.budget.observe_rest(num_requests, kv_tokens, step_seconds(num_requests))

    def steps_measured(*_: object) -> tuple[list[tuple[int, float]], float]:
        return [(rows, step_seconds(rows)) for rows in SIZES], 1e-9

    def passes_measured(runner: object, plan: object) -> tuple[list[tuple[int, float]], float] | None:
        if measure_passes(runner, plan) is None:
            return None
        return [(rows, pass_seconds(rows)) for rows in SIZES], 1e-9

    import octavo.worker.build as build

    measure_passes: Callable[..., object] = build.measure_draft_costs
    monkeypatch.setattr(build, "measure_step_costs", steps_measured)
    monkeypatch.setattr(build, "measure_draft_costs", passes_measured)
    monkeypatch.setattr(BudgetPlanner, "observe", observe_steadily)
    monkeypatch.setattr(BudgetPlanner, "observe_rest", observe_rest)
