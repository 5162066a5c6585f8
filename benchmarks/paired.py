"""Two engines that take turns, a fraction of a second each, so that both meet the same machine.

A shared or virtual machine changes its speed by several percent from one second to the next. Runs one
after the other measure that as much as the engines. Here the work of a pair is begun in both engines,
and they step in slices until both are done; each has its own clock, which runs while it steps.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines.job import ForeignCores
from octavo import LLM, SamplingParams
from octavo.core.draft_planner import BudgetPlanner
from octavo.engine.setup import make_planner

SLICE_SECONDS = 0.25


@dataclass
class Run:
    """One piece of work, done once."""

    tokens: int = 0
    seconds: float = 0.0
    full_tokens: int = 0  # up to the moment in which the last request had entered
    full_seconds: float = 0.0
    brain_seconds: float = 0.0  # schedule, update
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    verified: int = 0  # requests' verifying steps
    preemptions: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second over all of it."""
        return self.tokens / self.seconds

    @property
    def full_rate(self) -> float:
        """Tokens a second while there was always another request to take a free place."""
        return self.full_tokens / self.full_seconds if self.full_seconds else self.rate


@dataclass
class Bench:
    """An engine that steps under a clock."""

    llm: LLM
    _run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        parts: Any = self.llm._engine_parts()
        self._parts = parts
        self._ids = itertools.count()
        self._preempted = 0
        scheduler = parts.engine.scheduler
        schedule, update = scheduler.schedule, scheduler.update

        def timed_schedule() -> Any:
            started = time.perf_counter()
            out = schedule()
            self._run.brain_seconds += time.perf_counter() - started
            return out

        def timed_update(output: Any) -> Any:
            started = time.perf_counter()
            updates = update(output)
            run = self._run
            run.brain_seconds += time.perf_counter() - started
            for found in updates:
                run.tokens += len(found.new_token_ids)
                if found.is_verify and found.new_token_ids:
                    run.verified += 1
                    run.drafted += found.num_drafts
                    run.accepted += found.num_accepted
            return updates

        scheduler.schedule, scheduler.update = timed_schedule, timed_update

    @property
    def planner(self) -> Any:
        """The scheduler's."""
        return self._parts.engine.scheduler.planner

    @property
    def parts(self) -> Any:
        """Of the engine."""
        return self._parts

    def forget(self) -> None:
        """A draft budget as after the start, over costs that are measured anew."""
        config, scheduler = self._parts.config, self._parts.engine.scheduler
        if isinstance(scheduler.planner, BudgetPlanner):
            runner = self._parts.engine.executor.runner
            scheduler.planner = make_planner(config, config.speculative, runner, self._parts.plan)

    def begin(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Run:
        """Queue the work; `advance` does it."""
        self._run = Run()
        engine = self._parts.engine
        self._preempted = engine.scheduler.stats.num_preemptions
        for prompt, wanted in zip(prompts, params, strict=True):
            engine.add_request(f"bench-{next(self._ids)}", prompt, wanted, add_special_tokens=False)
        return self._run

    def advance(self, seconds: float) -> bool:
        """Step for about so long. False when all is done."""
        engine, run = self._parts.engine, self._run
        scheduler = engine.scheduler
        started = now = time.perf_counter()
        before = run.seconds
        while engine.has_work() and now - started < seconds:
            waited = scheduler.num_waiting > 0
            engine.step()
            now = time.perf_counter()
            run.steps += 1
            run.seconds = before + now - started
            if waited and not scheduler.num_waiting:
                run.full_seconds, run.full_tokens = run.seconds, run.tokens
        run.preemptions = scheduler.stats.num_preemptions - self._preempted
        return bool(engine.has_work())

    def run(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Run:
        """All of it at once."""
        run = self.begin(prompts, params)
        while self.advance(SLICE_SECONDS):
            pass
        return run


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Bench]:
    """A running engine, shut down at the end."""
    options = {"max_model_len": 1024, "max_num_seqs": 64, "kv_cache_memory": "768MB", **options}
    with LLM(str(model), **options) as llm:
        yield Bench(llm)


@dataclass
class Pairs:
    """Pairs of runs of the same work in two ways: `mine` and `other`."""

    mine: list[Run] = field(default_factory=list)
    other: list[Run] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)

    def add(self, mine: tuple[Bench, Callable[[], Run]], other: tuple[Bench, Callable[[], Run]]) -> None:
        """Begin both, and let them take turns until both are done; who goes first alternates."""
        both = [mine, other] if len(self.mine) % 2 == 0 else [other, mine]
        with ForeignCores() as watch:
            begun = [(bench, begin()) for bench, begin in both]
            left = [bench for bench, _ in begun]
            while left:
                left = [bench for bench in left if bench.advance(SLICE_SECONDS)]
        runs = dict(zip([id(bench) for bench, _ in both], [run for _, run in begun], strict=True))
        self.mine.append(runs[id(mine[0])])
        self.other.append(runs[id(other[0])])
        if watch.cores is not None:
            self.foreign.append(watch.cores)

    @property
    def ratio(self) -> float:
        """The median of mine ÷ other."""
        return statistics.median(a.rate / b.rate for a, b in zip(self.mine, self.other, strict=True))

    def record(self) -> dict[str, Any]:
        """The pairs in figures."""
        pairs = list(zip(self.mine, self.other, strict=True))
        ratios = sorted(a.rate / b.rate for a, b in pairs)
        return {
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3),
            "while_full": round(statistics.median(a.full_rate / b.full_rate for a, b in pairs), 3),
            "pairs": len(pairs),
            "tokens_s": round(statistics.median(run.rate for run in self.mine), 1),
            "other_tokens_s": round(statistics.median(run.rate for run in self.other), 1),
            "brain_share": round(statistics.median(a.brain_seconds / a.seconds for a, _ in pairs), 4),
            "brain_us_a_step": round(1e6 * statistics.median(a.brain_seconds / a.steps for a, _ in pairs)),
            "other_brain_us_a_step": round(
                1e6 * statistics.median(b.brain_seconds / b.steps for _, b in pairs)
            ),
            "mean_drafts": round(statistics.median(a.drafted / max(1, a.verified) for a, _ in pairs), 2),
            "accepted_share": round(statistics.median(a.accepted / max(1, a.drafted) for a, _ in pairs), 2),
            "foreign_cores": round(statistics.median(self.foreign), 3) if self.foreign else None,
        }
