"""Sends requests at their moments and writes down what happened to each.

Open loads send each request at its scheduled moment, whatever became of those before; latencies count from
that moment, so time spent waiting in any queue, the client's own included, is never left out. Closed loads
keep a fixed number open. How late this client was is measured twice over: for each request sent, and by a
heartbeat that sees when the event loop was busy with something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from octavo.bench.record import RequestRecord
from octavo.bench.target import Answer, TargetError, TargetRequest

HEARTBEAT = 0.01


class Generates(Protocol):
    """The part of a Target that a load needs."""

    async def generate(self, request: TargetRequest, answer: Answer) -> None:
        """See `Target.generate`."""
        ...


@dataclass(frozen=True)
class LoadPlan:
    """What one client is to send.

    Open: `requests[i]` at `moments[i]` seconds. Closed (`moments` None): `concurrency` at a time, each
    request once, or again and again until `duration` seconds have passed.
    """

    requests: Sequence[TargetRequest]
    moments: Sequence[float] | None = None
    concurrency: int = 1
    duration: float | None = None
    timeout: float = 600.0

    @property
    def open_loop(self) -> bool:
        """True if requests have moments of their own."""
        return self.moments is not None

    def part(self, number: int, of: int) -> LoadPlan:
        """What client `number` of several sends: every of-th request."""
        picked = slice(number, None, of)
        moments = None if self.moments is None else self.moments[picked]
        share = self.concurrency // of + (number < self.concurrency % of)
        return LoadPlan(self.requests[picked], moments, share, self.duration, self.timeout)


@dataclass
class LoadOutcome:
    """Records in the order in which they ended, and how late the client was (seconds)."""

    records: list[RequestRecord] = field(default_factory=list)
    heartbeat_lags: list[float] = field(default_factory=list)


async def run_load(
    target: Generates,
    plan: LoadPlan,
    origin: float,
    *,
    start: float | None = None,
    on_sent: Callable[[], None] | None = None,
    on_record: Callable[[RequestRecord], None] | None = None,
) -> LoadOutcome:
    """Run a plan. `origin` and `start` are moments of the monotonic clock: records count from `origin`, the
    plan begins at `start` (default: at the origin). A request that fails becomes a record with its error."""
    outcome = LoadOutcome()
    begin = origin if start is None else start

    async def one(request: TargetRequest, scheduled: float) -> None:
        if on_sent is not None:
            on_sent()
        record = await answer_one(target, request, scheduled, origin, plan)
        outcome.records.append(record)
        if on_record is not None:
            on_record(record)

    watch = asyncio.ensure_future(_heartbeat(outcome.heartbeat_lags))
    try:
        await _sleep_until(begin)
        if plan.moments is not None:
            await _run_open(plan.requests, plan.moments, begin, one)
        else:
            await _run_closed(plan, begin, one)
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
    return outcome


One = Callable[[TargetRequest, float], Coroutine[Any, Any, None]]


async def _run_open(
    requests: Sequence[TargetRequest], moments: Sequence[float], begin: float, one: One
) -> None:
    tasks: list[asyncio.Task[None]] = []
    try:
        for request, moment in zip(requests, moments, strict=True):
            scheduled = begin + moment
            await _sleep_until(scheduled)
            tasks.append(asyncio.ensure_future(one(request, scheduled)))
        for task in tasks:
            await task
    except BaseException:
        await _cancel(tasks)
        raise


async def _run_closed(plan: LoadPlan, begin: float, one: One) -> None:
    source = _endless(plan.requests) if plan.duration else iter(plan.requests)

    async def worker() -> None:
        for request in source:
            if plan.duration and time.monotonic() - begin >= plan.duration:
                return
            await one(request, time.monotonic())

    tasks = [asyncio.ensure_future(worker()) for _ in range(plan.concurrency)]
    try:
        for task in tasks:
            await task
    except BaseException:
        await _cancel(tasks)
        raise


def _endless(requests: Sequence[TargetRequest]) -> Iterator[TargetRequest]:
    """The requests again and again; nothing if there are none."""
    while requests:
        yield from requests


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _sleep_until(moment: float) -> None:
    """Not a moment earlier; the event loop's timers have a millisecond's grain."""
    while (left := moment - time.monotonic()) > 0:
        await asyncio.sleep(left)


async def _heartbeat(lags: list[float]) -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(HEARTBEAT)
        lags.append(max(0.0, time.monotonic() - before - HEARTBEAT))


# ---------------------------------------------------------------------- one request


async def answer_one(
    target: Generates, request: TargetRequest, scheduled: float, origin: float, plan: LoadPlan
) -> RequestRecord:
    """Send one request and wait for its end, which is always a record."""
    record = RequestRecord(request.index, request.prompt_id, scheduled_time=scheduled - origin)
    if request.prompt_token_ids is not None:
        record.prompt_tokens = len(request.prompt_token_ids)
    answer = Answer()
    sent = time.monotonic()

    async def ask() -> None:
        nonlocal sent
        sent = time.monotonic()  # here, for wait_for may begin it in a later turn of the event loop
        await target.generate(request, answer)

    try:
        await asyncio.wait_for(ask(), plan.timeout)
        if answer.generated_tokens == 0 or not (answer.arrivals or answer.generated_tokens):
            raise TargetError("empty", "the answer holds no token")
    except asyncio.TimeoutError:
        record.error = f"timeout: no end within {plan.timeout:g} s"
    except TargetError as error:
        record.error = f"{error.kind}: {error}"
    except Exception as error:  # whatever an engine raises is this request's failure, not the run's
        record.error = f"{type(error).__name__}: {error}"
    record.sent_time = sent - origin
    record.end_time = time.monotonic() - origin
    note_answer(record, answer, origin)
    # A closed load sends when it can: nobody waited before that.
    record.derive(open_loop=plan.open_loop)
    if answer.first_step_time is not None:
        record.queue_time = max(0.0, answer.first_step_time - (scheduled if plan.open_loop else sent))
    return record


def note_answer(record: RequestRecord, answer: Answer, origin: float) -> None:
    """Carry over what came; moments become seconds since the origin."""
    record.arrivals = [(moment - origin, tokens) for moment, tokens in answer.arrivals]
    if record.arrivals:
        record.first_token_time = record.arrivals[0][0]
    if record.ok and record.arrivals:
        record.end_time = record.arrivals[-1][0]  # what follows the last token is not generation
    known = answer.generated_tokens
    record.generated_tokens = sum(tokens for _, tokens in record.arrivals) if known is None else known
    if answer.prompt_tokens is not None:
        record.prompt_tokens = answer.prompt_tokens
    record.output_token_ids, record.output_text = answer.token_ids, answer.text
    for name in (
        "tokens_estimated", "finish_reason", "drafted", "accepted", "num_verifications",
        "drafted_by_position",
        "accepted_by_position", "reached_by_position", "cached_tokens", "num_preemptions",
    ):  # fmt: skip
        setattr(record, name, getattr(answer, name))
