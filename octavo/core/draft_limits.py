"""What a plan may not exceed: the token budget, the KV memory, and a draft model that is behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from octavo.core.acceptance import MAX_DRAFTS
from octavo.core.draft_plan import BudgetReport, DraftPlan, StepFacts

CATCH_UP_ROWS = 256  # a step, at most, where nobody says otherwise


def num_passes(plan: DraftPlan, chosen: int) -> int:
    """Draft model passes: as many as the longest drafts that it makes. A lookup alone goes deeper."""
    most = 0
    for index, (state, count) in enumerate(zip(plan.states, plan.num_drafts, strict=True)):
        if count > most and state.model is not None and not state.blocked:
            if state.lookup is not None and state.fixed is None:
                count = min(count, max(chosen, index in plan.explored))
            most = max(most, count)
    return most


def draft_room(facts: StepFacts, max_num_batched_tokens: int) -> int:
    """Draft rows the token budget allows; waiting prompts keep half of what is free."""
    free = max(0, max_num_batched_tokens - len(facts.states))
    return free - min(facts.chunk_rows, free // 2)


def leave_out_blocked(plan: DraftPlan, facts: StepFacts, report: BudgetReport) -> None:
    """No drafts where the draft model cannot make any and there is no lookup; of a fixed number they
    are counted as cut."""
    plan.blocked = facts.blocked
    for index in facts.blocked:
        state, wanted = facts.states[index], plan.num_drafts[index]
        if state.lookup is not None or not wanted:
            continue
        plan.num_drafts[index] = 0
        if state.fixed is not None:
            state.num_cut += wanted
            report.num_cut_drafts += wanted


def catch_up(plan: DraftPlan, facts: StepFacts, room: int, most: int, pays: Callable[[int], bool]) -> None:
    """Have the draft model catch up for requests with drafts, a part a step, and none before it has.

    `most` rows are granted in all. `pays(index)` says whether a request's drafts are worth it; nobody
    asks for those of a fixed number, or explored ones, which were paid already, and what was begun is
    finished. Where there is a lookup as well, it drafts alone.
    """
    left = min(most, facts.catch_up_room, max(0, room - sum(plan.num_drafts)))
    too_far: list[int] = []
    for index, (state, behind) in enumerate(zip(facts.states, facts.owed, strict=True)):
        if not plan.num_drafts[index] or not behind or state.model is None or index in facts.blocked:
            continue
        alone = 0 if state.lookup is None else plan.num_drafts[index]
        decided = state.fixed is not None or state.catching_up or index in plan.explored
        state.catching_up = False
        if not decided and not pays(index):
            plan.num_drafts[index] = alone
            too_far.append(index)
            continue
        granted = min(behind, left)
        left -= granted
        if granted:
            plan.catch_up[index] = granted
        if granted < behind:
            plan.num_drafts[index] = alone
            state.catching_up = granted > 0
    plan.too_far_behind = frozenset(too_far)


def keep_limits(plan: DraftPlan, facts: StepFacts, room: int, report: BudgetReport) -> None:
    """Cut what does not fit, the deepest drafts first; fixed numbers are served before the others.

    What a fixed number loses is counted, in the request and in the report.
    """
    counts, states = plan.num_drafts, facts.states
    allowed, why = room - sum(plan.catch_up.values()), "the token budget"
    if facts.kv_room < allowed:
        allowed, why = facts.kv_room, "the KV memory"
    if sum(counts) <= allowed:
        return
    wanted = list(counts)
    fixed = [index for index, state in enumerate(states) if state.fixed is not None]
    own = [index for index, state in enumerate(states) if state.fixed is None]
    left = _share_out(counts, fixed, max(0, allowed))
    _share_out(counts, own, left)
    for index, count in enumerate(counts):
        if count < wanted[index]:
            plan.cut[index] = (wanted[index], why)
            if states[index].fixed is not None:
                states[index].num_cut += wanted[index] - count
                report.num_cut_drafts += wanted[index] - count
    report.num_cut_steps += any(states[index].fixed is not None for index in plan.cut)


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
