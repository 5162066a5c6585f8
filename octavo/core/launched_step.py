"""A step between its launch and the reading of its output, as the scheduler remembers it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from octavo.core.draft_kv import DraftBlocks
from octavo.core.messages import Rows
from octavo.core.request import Request


@dataclass(slots=True)
class LaunchedStep:
    """`requests` and `rows` are parallel, in the order of SchedulerOutput.rows."""

    step_id: int
    requests: list[Request] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    num_rows: int = 0
    chunk_rows: int = 0  # of these, known tokens
    num_verify: int = 0  # requests with verify rows
    drafting: list[int] = field(default_factory=list)  # indices of those that verify drafts
    kv_tokens: int = 0  # context of the requests that sample
    proposing: list[Request] = field(default_factory=list)  # those that get drafts at the end
    plan: object | None = None  # the draft planner's, of these drafts
    draft_blocks: list[DraftBlocks] = field(default_factory=list)  # that the draft model reads and writes


def assert_inflight(requests: Iterable[Request], launched: Iterable[LaunchedStep]) -> None:
    """Assert that what the requests have in flight is what was launched. For tests."""
    counts: dict[Request, list[int]] = {}
    for step in launched:
        for request, rows in zip(step.requests, step.rows, strict=True):
            count = counts.setdefault(request, [0, 0, 0])
            count[0] += 1
            count[1] += rows.num_rows
            count[2] += rows.samples
    for request in requests:
        expected = counts.get(request, [0, 0, 0])
        actual = [request.num_inflight_steps, request.num_inflight_tokens, request.num_inflight_samples]
        assert actual == expected, f"{request}: in flight {actual}, launched {expected}"
