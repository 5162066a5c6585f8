"""One run: check, load, warm up, measure, close.

    check            the spec, the output, the prompts' files: everything that can be refused, is
    open             the target loads; its limits were measured before, while the device was empty
    warm-up          a few requests that nobody counts
    measure          the load, as often as --repeat says; the monitor samples beside it
    close            memory and processes are given back, whatever happened

Engines in this process are driven from this process's event loop. What is reached over HTTP is driven by
client processes (`octavo.bench.clients`), which share the machine's monotonic clock with this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Protocol

from octavo.bench import metrics
from octavo.bench.arrivals import schedule
from octavo.bench.load import LoadOutcome, LoadPlan, run_load
from octavo.bench.prompts import Prompt, PromptSet, PromptSource, load_prompts
from octavo.bench.record import RequestRecord, RunResult
from octavo.bench.rendering import Renderer
from octavo.bench.spec import RunSpec
from octavo.bench.target import Target, TargetRequest
from octavo.errors import ConfigError, OctavoError

SAMPLE_SECONDS = 0.5
IDLE_SECONDS = 1.0


class LiveView(Protocol):
    """Whoever watches a run: the terminal. All methods are called on the event loop's thread."""

    def stage(self, text: str) -> None:
        """What is being done now."""
        ...

    def begin(self, total: int | None, label: str) -> None:
        """The measured part begins; `total` requests, or None where time decides."""
        ...

    def ended(self, record: RequestRecord) -> None:
        """One request has ended, well or badly."""
        ...

    def readings(self, readings: dict[str, float]) -> None:
        """Now and then: watts and the like, and the engine's gauges."""
        ...

    def end(self) -> None:
        """The measured part is over."""
        ...


class Silent:
    """A view that shows nothing."""

    def stage(self, text: str) -> None: ...
    def begin(self, total: int | None, label: str) -> None: ...
    def ended(self, record: RequestRecord) -> None: ...
    def readings(self, readings: dict[str, float]) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Prepared:
    """A run that was checked: nothing heavy is loaded yet."""

    spec: RunSpec
    plan: LoadPlan
    renderer: Renderer
    warnings: tuple[str, ...]
    prompts: dict[str, Any]  # what the result says of them


def run(
    spec: RunSpec,
    prompts: Sequence[Prompt] | PromptSource,
    *,
    live: LiveView | None = None,
    target: Target | None = None,
) -> RunResult:
    """Measure one engine with one method.

    `target` replaces the one that the spec names (tests). Single requests that fail are records of the
    result; OctavoError is raised for what stops the whole run: a wrong spec, no prompts, a model that cannot
    be loaded.
    """
    prepared = prepare(spec, prompts)

    async def alone() -> RunResult:
        async with opened(spec, live or Silent(), target) as engine:
            return await measure(engine, prepared, live or Silent())

    return asyncio.run(alone())


def prepare(spec: RunSpec, prompts: Sequence[Prompt] | PromptSource) -> Prepared:
    """Everything that can go wrong without loading a model goes wrong here."""
    warnings = spec.check()
    if isinstance(prompts, PromptSource):
        prompts.check()
    arrivals = schedule(spec.load, spec.sampling.seed) if spec.load.open_loop else None
    renderer = Renderer.of(spec)
    if isinstance(prompts, PromptSource):
        wanted = len(arrivals) if arrivals is not None else spec.load.num_prompts or None
        prompts = load_prompts(prompts, count=wanted, seed=spec.sampling.seed, tokenizer=renderer.tokenizer)
    elif arrivals is None and spec.load.num_prompts not in (0, len(prompts)):
        prompts = [prompts[i % len(prompts)] for i in range(spec.load.num_prompts)] if prompts else prompts
    if not prompts:
        raise ConfigError("there are no prompts: give --prompts (PROMPTS), such as bundled or a file")
    described: dict[str, Any] = {"count": len(prompts)}
    if isinstance(prompts, PromptSet):
        warnings += prompts.warnings
        described = prompts.record()
    requests, more = renderer.requests(spec, prompts, arrivals)
    duration = spec.load.duration if arrivals is None and not spec.load.num_prompts else None
    moments = None if arrivals is None else [arrival.moment for arrival in arrivals]
    plan = LoadPlan(requests, moments, spec.load.concurrency, duration, spec.request_timeout)
    return Prepared(spec, plan, renderer, (*warnings, *more), described)


@dataclass(frozen=True)
class OpenEngine:
    """A target that is open, and what was found out on the way."""

    target: Target
    ceiling: Any  # octavo.bench.utilisation.Ceiling, None where the engine is elsewhere
    load_seconds: float


@asynccontextmanager
async def opened(spec: RunSpec, live: LiveView, given: Target | None = None) -> AsyncIterator[OpenEngine]:
    """Open the spec's target (or the given one). It is closed whatever happens, a failed opening included."""
    from octavo.bench.targets import make_target
    from octavo.bench.utilisation import Ceiling

    target = given if given is not None else make_target(spec)
    ceiling = None
    if given is None and not spec.over_http:
        live.stage("measuring what this machine could do at best")
        ceiling = await asyncio.to_thread(Ceiling.measure, spec.engine_options)
    live.stage(f"opening {spec.label}: {spec.url or spec.serving_model}")
    began = time.monotonic()
    try:
        await target.open()
        took = time.monotonic() - began
        live.stage(f"{spec.label} is ready after {took:.1f} s")
        yield OpenEngine(target, ceiling, took)
    finally:
        await target.close()


async def measure(
    engine: OpenEngine, prepared: Prepared, live: LiveView, *, salt: str | None = None, warm_up: bool = True
) -> RunResult:
    """The measured part, of an engine that is open. `salt` parts the prefix cache from that of other runs of
    the same engine."""
    from octavo.bench.gpu_monitor import Monitor
    from octavo.bench.utilisation import utilisation

    spec, target = prepared.spec, engine.target
    result = RunResult(spec.engine, spec.method, spec.effective(), environment())
    result.effective_config |= target.description()
    result.effective_config["load_seconds"] = engine.load_seconds
    result.effective_config["prompts"] = prepared.prompts
    gpus = target.gpu_ids()
    monitor = Monitor(gpus or None, interval=spec.monitor_interval, enabled=spec.monitor, pids=_pids(target))
    if spec.monitor:
        live.stage("measuring the idle machine")
        await asyncio.to_thread(monitor.measure_idle, IDLE_SECONDS)
    if warm_up:
        await _warm_up(target, prepared, live)
    before = await _counters(target)
    origin = time.monotonic()
    monitor.start(origin)
    samples: list[dict[str, float]] = []
    lags: list[float] = []
    summaries, duration = [], 0.0
    sampling = asyncio.ensure_future(_sample(target, monitor, live, samples))
    try:
        live.begin(_total(prepared), spec.label)
        for repeat in range(spec.repeat):
            start, outcome = await _drive(target, prepared, repeat, origin, live, salt)
            for record in outcome.records:
                record.repeat = repeat
            took = _duration(outcome.records, start - origin)
            summaries.append(_summary(spec, outcome.records, took, outcome.heartbeat_lags))
            result.requests += sorted(outcome.records, key=lambda record: record.index)
            lags += outcome.heartbeat_lags
            duration += took
    finally:
        live.end()
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
        monitor.stop()
    after = await _counters(target)
    result.warnings = [*prepared.warnings, *target.warnings()]
    result.summary = _summary(spec, result.requests, duration, lags)
    source = "its /metrics page" if spec.over_http else "the engine"
    result.engine_metrics = metrics.engine_metrics(before, after, samples, source if after else "none")
    metrics.fill_acceptance(result.summary, result.engine_metrics)
    result.summary["utilisation"] = utilisation(
        None if engine.ceiling is None else await asyncio.to_thread(engine.ceiling.again),
        prepared.renderer.model_path,
        spec,
        result.engine_metrics,
        duration,
    )
    result.summary["repeats"] = metrics.repeats(summaries)
    result.gpu_monitoring = monitor.result(result.summary["total_tokens"])
    if not result.summary["client"]["valid"]:
        result.warnings.append(f"INVALID: {result.summary['client']['reason']}")
    return result


def _pids(target: Target) -> list[int]:
    """The engine's processes; this one as well where the engine is in it."""
    return target.pids() or [os.getpid()]


async def _warm_up(target: Target, prepared: Prepared, live: LiveView) -> None:
    """Requests that nobody counts, one after the other and then together; the first failure ends the run:
    an engine that cannot answer one request need not be asked a thousand times."""
    count = prepared.spec.warmup_requests
    requests = warm_up_requests(prepared.plan.requests, count)
    if not requests:
        return
    live.stage(f"warming up with {len(requests)} requests")
    plan = LoadPlan(requests, None, concurrency=1, timeout=prepared.plan.timeout)
    outcome = await run_load(target, plan, time.monotonic())
    failed = [record for record in outcome.records if not record.ok]
    if failed and len(failed) == len(outcome.records) and not prepared.spec.over_http:
        raise OctavoError(f"the engine answered no request of the warm-up: {failed[0].error}")


def warm_up_requests(requests: Sequence[TargetRequest], count: int) -> list[TargetRequest]:
    """The first requests, changed at their beginning and with a salt: the measured ones are not found in a
    prefix cache because of them."""
    made = []
    for number, request in enumerate(requests[:count]):
        ids, messages, text = request.prompt_token_ids, request.messages, request.text
        if ids:
            ids = (ids[-1], *ids[:-1])
        if messages:
            first = {**messages[0], "content": f"Warm-up {number}. {messages[0]['content']}"}
            messages = (first, *messages[1:])
        made.append(
            replace(
                request,
                index=number,
                prompt_token_ids=ids,
                messages=messages,
                text=None if text is None else f"Warm-up {number}. {text}",
                cache_salt="warm-up",
            )
        )
    return made


async def _drive(
    target: Target, prepared: Prepared, repeat: int, origin: float, live: LiveView, salt: str | None = None
) -> tuple[float, LoadOutcome]:
    """One repetition of the load: (when it began, what came of it).

    Each has a salt of its own, so that it finds nothing of the one before in a prefix cache.
    """
    spec, plan = prepared.spec, prepared.plan
    if spec.repeat > 1 or salt is not None:
        name = f"{salt or ''}{repeat}"
        salted = [replace(request, cache_salt=name) for request in plan.requests]
        plan = replace(plan, requests=salted)
    if not spec.over_http:
        start = time.monotonic()
        return start, await run_load(target, plan, origin, start=start, on_record=live.ended)
    from octavo.bench.clients import drive_clients
    from octavo.bench.targets.url import UrlTarget

    assert isinstance(target, UrlTarget)
    begun: list[float] = []
    outcome = await drive_clients(
        target.job(), plan, spec.clients, origin, on_record=live.ended, on_start=begun.append
    )
    for record in outcome.records:
        count_tokens(record, prepared.renderer)
    return begun[0], outcome


def count_tokens(record: RequestRecord, renderer: Renderer) -> None:
    """Tokens of an answer whose server sent no usage: its text is tokenized again, and marked as estimated.

    Without a tokenizer the request is a failure: chunks are not tokens.
    """
    if not record.ok or not record.tokens_estimated:
        return
    if renderer.tokenizer is None:
        record.error = (
            "uncounted: the server sent no usage, so its tokens cannot be counted; name the model's "
            "tokenizer "
            "with --tokenizer"
        )
        return
    total = len(renderer.tokenizer.encode(record.output_text or "", add_special_tokens=False))
    record.generated_tokens = total
    # Shared out evenly: how long each piece was is not known here.
    count = len(record.arrivals)
    record.arrivals = [
        (moment, total * (i + 1) // count - total * i // count)
        for i, (moment, _) in enumerate(record.arrivals)
    ]
    record.derive_tpot()


async def _counters(target: Target) -> dict[str, float]:
    """The engine's counters; an engine that died (its requests' records say so) has none."""
    try:
        return await target.counters()
    except OctavoError:
        return {}


async def _sample(target: Target, monitor: Any, live: LiveView, samples: list[dict[str, float]]) -> None:
    while True:
        await asyncio.sleep(SAMPLE_SECONDS)
        counters = await _counters(target)
        if counters:
            samples.append(counters)
        live.readings({**counters, **monitor.latest()})


def _total(prepared: Prepared) -> int | None:
    if prepared.plan.duration is not None:
        return None
    return len(prepared.plan.requests) * prepared.spec.repeat


def _duration(records: Sequence[RequestRecord], start: float) -> float:
    """From the moment the load began to the end of the last request."""
    return max((record.end_time for record in records if record.end_time is not None), default=start) - start


def _summary(
    spec: RunSpec, records: Sequence[RequestRecord], duration: float, lags: Sequence[float]
) -> dict[str, Any]:
    return metrics.summarize(
        records,
        duration,
        slo=spec.slo,
        lags=lags,
        open_loop=spec.load.open_loop,
        num_clients=spec.clients if spec.over_http else 1,
    )


def environment() -> dict[str, Any]:
    """The machine, the versions, and when."""
    from octavo import platform

    found = dict(platform.describe())
    found["started_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return found
