"""Rising load until the engine no longer keeps up: one run a point, of an engine that stays open.

Open loads rise by rate, closed ones by concurrency: doubled until a point does not keep up, then halved in
between a few times. An open load is kept up with if, in the second half of the time in which requests were
sent, nearly as many were answered as came; a queue that grows shows there long before the run has ended. A
closed load can always be kept up with, so it is saturated where more concurrency no longer brings tokens.

Every point is a result file of its own, written when it is done. Started again with `resume`, a sweep takes
the points it finds, if they were measured with the same settings and prompts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from octavo.bench.prompts import PromptSource
from octavo.bench.record import (
    SCHEMA_VERSION,
    RunResult,
    check_writable,
    load,
    rounded,
    save,
    write_whole,
)
from octavo.bench.runner import LiveView, OpenEngine, Prepared, measure, opened, prepare
from octavo.bench.spec import RunSpec
from octavo.bench.target import Target
from octavo.errors import ConfigError

KEPT_UP = 0.8  # answered ÷ come, in the second half of the sending
MIN_GAIN = 0.05  # of a closed load's throughput, for twice the concurrency
MOST_POINTS = 16


@dataclass(frozen=True)
class SweepPlan:
    """Which points: `values` (rates, or concurrencies), or doubled from `start` and refined."""

    values: tuple[float, ...] = ()
    start: float = 1.0
    refine: int = 2

    def check(self, *, closed: bool) -> None:
        """Raise ConfigError for an illegal value."""
        what = "concurrency" if closed else "rate"
        for value in (*self.values, self.start):
            if not 0 < value < float("inf"):
                raise ConfigError(f"a {what} of a sweep must be above 0 and finite, not {value:g}")
            if closed and value != int(value):
                raise ConfigError(f"a concurrency is a whole number, not {value:g}")
        if self.refine < 0:
            raise ConfigError(f"--refine must be at least 0, not {self.refine}")


@dataclass
class Point:
    """One measured load."""

    value: float
    result: RunResult
    keeps_up: bool
    file: str


@dataclass
class SweepResult:
    """All points by rising load."""

    points: list[Point]
    closed: bool

    @property
    def exit_code(self) -> int:
        """1 if a request of any point failed, or a client could not keep up."""
        return int(not self.points or any(point.result.exit_code for point in self.points))

    def to_json(self) -> dict[str, Any]:
        """The sweep's own file: a row a point and where the engine is saturated."""
        kept = [point.value for point in self.points if point.keeps_up]
        lost = [point.value for point in self.points if not point.keeps_up]
        good = [p for p in self.points if p.result.summary.get("goodput") is not None]
        best = max(good, key=lambda p: p.result.summary["goodput"], default=None)
        rows = []
        for point in self.points:
            s = point.result.summary
            rows.append(
                {
                    "concurrency" if self.closed else "rate": point.value,
                    "keeps_up": point.keeps_up,
                    "valid": point.result.valid,
                    **{
                        name: s.get(name)
                        for name in ("failed_requests", "request_throughput", "overall_throughput", "ttft",
                                     "tpot", "e2el", "goodput", "avg_acceptance_rate")
                    },
                    "joules_per_token": point.result.gpu_monitoring.get("joules_per_token"),
                    "file": point.file,
                }
            )  # fmt: skip
        first = self.points[0].result
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "sweep",
            "engine": first.engine,
            "method": first.method,
            "over": "concurrency" if self.closed else "rate",
            "highest_kept_up": max(kept, default=None),
            "lowest_not_kept_up": min(lost, default=None),
            "best_goodput": None if best is None else best.result.summary["goodput"],
            "best_goodput_at": None if best is None else best.value,
            "points": rows,
        }


def sweep(
    spec: RunSpec,
    prompts: PromptSource,
    plan: SweepPlan,
    path: Path,
    *,
    resume: bool = False,
    force: bool = False,
    live: LiveView,
    tell: Callable[[Point], None] | None = None,
    target: Target | None = None,
) -> SweepResult:
    """Measure the points and write their files beside `path`, which gets the sweep's own.

    Raises ConfigError for what is wrong before anything is loaded, a file that exists among it.
    """
    closed = not spec.load.open_loop
    if spec.load.arrival == "trace" or spec.load.all_at_once:
        raise ConfigError(
            "a sweep needs a rate (poisson, constant, gamma) or a concurrency: not a trace, not inf"
        )
    plan.check(closed=closed)
    check_writable(path, force=force or resume)
    first = plan.values[0] if plan.values else plan.start
    prepare(at(spec, first), prompts)  # so that what is wrong is said now
    for value in plan.values if not (resume or force) else ():
        check_writable(point_path(path, value, closed=closed))
    work = _Sweep(spec, prompts, plan, path, resume, force, live, tell)
    result = asyncio.run(work.run(target))
    text = json.dumps(rounded(result.to_json()), ensure_ascii=False, indent=1)
    write_whole(path, text + "\n")
    return result


def at(spec: RunSpec, value: float) -> RunSpec:
    """The spec with that much load."""
    if spec.load.open_loop:
        return replace(spec, load=replace(spec.load, rate=value))
    return replace(spec, load=replace(spec.load, concurrency=int(value)))


def point_path(path: Path, value: float, *, closed: bool) -> Path:
    """Where a point's result lies."""
    return path.with_name(f"{path.stem}.{'concurrency' if closed else 'rate'}-{value:g}{path.suffix}")


def keeps_up(result: RunResult, moments: Sequence[float]) -> bool:
    """Of an open load: were nearly as many answered as came, in the second half of the sending?

    moments: when requests were due, in seconds from the load's beginning.
    """
    if not moments:
        return True
    begin, end = moments[len(moments) // 2], moments[-1]
    start = min(record.scheduled_time for record in result.requests) - moments[0]
    come = sum(begin < moment <= end for moment in moments)
    ended = [
        record.end_time - start for record in result.requests if record.ok and record.end_time is not None
    ]
    answered = sum(begin < moment <= end for moment in ended)
    if come == 0:
        return True
    # What was on its way at the beginning of the half is answered in it: only a growing queue loses.
    return answered >= KEPT_UP * come


@dataclass
class _Sweep:
    spec: RunSpec
    prompts: PromptSource
    plan: SweepPlan
    path: Path
    resume: bool
    force: bool
    live: LiveView
    tell: Callable[[Point], None] | None

    async def run(self, target: Target | None) -> SweepResult:
        points: dict[float, Point] = {}
        async with opened(self.spec, self.live, target) as engine:

            async def measured(value: float) -> Point:
                if value not in points:
                    points[value] = await self._point(engine, value, before=points)
                    if self.tell is not None:
                        self.tell(points[value])
                return points[value]

            if self.plan.values:
                for value in sorted(self.plan.values):
                    await measured(value)
            else:
                await self._search(measured)
        ordered = [points[value] for value in sorted(points)]
        return SweepResult(ordered, self._closed)

    @property
    def _closed(self) -> bool:
        return not self.spec.load.open_loop

    async def _search(self, measured: Callable[[float], Any]) -> None:
        """Double until a point is lost, then halve in between."""
        low, value = 0.0, self.plan.start
        for _ in range(MOST_POINTS):
            point = await measured(value)
            if not point.keeps_up:
                break
            low, value = value, value * 2
        else:
            return
        high = value
        for _ in range(self.plan.refine):
            middle = (low + high) / 2
            if self._closed:
                middle = float(int(middle))
            if middle in (low, high) or middle <= 0:
                return
            point = await measured(middle)
            low, high = (middle, high) if point.keeps_up else (low, middle)

    async def _point(self, engine: OpenEngine, value: float, before: dict[float, Point]) -> Point:
        path = point_path(self.path, value, closed=self._closed)
        prepared = prepare(at(self.spec, value), self.prompts)
        result = self._found(path, prepared)
        if result is None:
            check_writable(path, force=self.force)
            name = f"{'concurrency' if self._closed else 'rate'} {value:g}"
            self.live.stage(f"sweep: {name}")
            result = await measure(engine, prepared, self.live, salt=f"{name} ", warm_up=not before)
            save(result, path, force=self.force)
        if self._closed:
            up = self._gains(result, value, before)
        else:
            assert prepared.plan.moments is not None
            up = keeps_up(result, prepared.plan.moments)
        return Point(value, result, up, path.name)

    def _gains(self, result: RunResult, value: float, before: dict[float, Point]) -> bool:
        smaller = [point for other, point in before.items() if other < value]
        if not smaller:
            return True
        last = max(smaller, key=lambda point: point.value).result.summary["overall_throughput"] or 0.0
        return bool((result.summary["overall_throughput"] or 0.0) > (1 + MIN_GAIN) * last)

    def _found(self, path: Path, prepared: Prepared) -> RunResult | None:
        """A point that was measured before, with the same settings. Raises ConfigError for another's file."""
        if not (self.resume and path.exists()):
            return None
        result = load(path)
        wanted = json.loads(json.dumps(rounded({**prepared.spec.effective(), "prompts": prepared.prompts})))
        differs = [name for name, value in wanted.items() if result.effective_config.get(name) != value]
        if differs:
            raise ConfigError(
                f"{path} was measured with other settings ({', '.join(differs)}): a sweep goes on only "
                f"with its "
                "own. Give another --output, or remove it"
            )
        self.live.stage(f"sweep: {path.name} is there already")
        return result
