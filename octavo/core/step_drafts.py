"""The drafts of a step, between the scheduler and its planner: asked for at the end, reported when read.

Both ends are on the path of every step, and most steps of an engine whose texts cannot be guessed have
no drafts at all. So what is gathered here is about the requests that draft; for a step without any,
neither its plan nor its report looks at each request.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.core.draft_kv import DraftKV
from octavo.core.draft_planner import DraftPlanner, PlannedStep, ReadStep
from octavo.core.launched_step import LaunchedStep
from octavo.core.messages import Finish, ModelOutput, Propose, SchedulerOutput
from octavo.core.request import Request


def propose(
    planner: DraftPlanner,
    draft_kv: DraftKV | None,
    out: SchedulerOutput,
    step: LaunchedStep,
    running: Sequence[Request],
    kv_room: int,
    max_num_batched_tokens: int,
) -> None:
    """Ask for drafts at the end of the step, which the next one verifies.

    `kv_room` is the number of tokens the free blocks hold.
    """
    if not step.chunk_rows and draft_kv is None and planner.rests(step.num_verify):
        step.kv_tokens = sum([r.num_computed_tokens + r.num_inflight_tokens for r in step.requests])
        return
    sampling = [pair for pair in zip(step.requests, step.rows, strict=True) if pair[1].samples]
    requests = [request for request, _ in sampling]
    step.kv_tokens = sum([r.num_computed_tokens + r.num_inflight_tokens for r in requests])
    if not requests:
        return
    # Drafts past the limit could never be emitted.
    rooms = [max(0, r.limit - r.num_tokens - r.num_inflight_samples - 1) for r in requests]
    waiting = sum(
        [r.num_tokens - r.num_computed_tokens - r.num_inflight_tokens for r in running if not r.decoding]
    )
    facts = PlannedStep(requests, rooms, step.kv_tokens, waiting, kv_room, step.chunk_rows)
    if draft_kv is not None:
        facts.owed, facts.blocked = draft_kv.survey(requests, [rows for _, rows in sampling])
        facts.catch_up_room = max_num_batched_tokens - out.num_tokens
    planned = planner.plan(facts)
    counts, step.plan = planned.counts, planned.plan
    if draft_kv is not None:
        out.draft, counts, step.draft_blocks = draft_kv.launch(
            requests, counts, planned.passes, planned.catch_up
        )
    for index, (request, count) in enumerate(zip(requests, counts, strict=True)):
        if request.params.trace:
            request.decision = planner.reason(step.plan, index)
        if count > 0:
            request.num_proposed = count
            step.proposing.append(request)
            out.propose.append(Propose(request.slot, count))


def report(planner: DraftPlanner, step: LaunchedStep, output: ModelOutput, from_model: set[Request]) -> None:
    """Tell the planner what became of the step's drafts and how long it took.

    `from_model`: requests whose drafts in this step a draft model had made.
    """
    if step.plan is None and not step.drafting and not step.chunk_rows:
        planner.observe_rest(step.num_verify, step.kv_tokens, output.target_seconds)
        return
    made = output.num_drafted
    if made is not None:
        # What the drafter made is known before the next step is built: ask for no empty rows.
        for request in step.proposing:
            if not request.num_inflight_steps:
                request.num_proposed = min(request.num_proposed, made.get(request.slot, 0))
    requests: list[Request] = []
    asked: list[int] = []
    drafted: list[int] = []
    accepted: list[int] = []
    for index in step.drafting:
        requests.append(step.requests[index])
        drafted.append(output.num_drafts_valid[index])
        accepted.append(output.num_accepted[index])
        # Drafts behind the end of a request were not refused, they just came too late.
        ended = output.finished[index] is not Finish.NO or not output.tokens[index]
        asked.append(accepted[-1] if ended else step.rows[index].num_rows - 1)
    planner.observe(
        ReadStep(
            step.plan,
            step.num_rows,
            step.chunk_rows,
            step.num_verify,
            step.kv_tokens,
            output.target_seconds,
            output.draft_seconds,
            requests,
            asked,
            drafted,
            accepted,
            frozenset([i for i, request in enumerate(requests) if request in from_model]),
            output.draft_passes,
        )
    )
