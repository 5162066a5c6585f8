"""One measured piece: a fresh process that opens an engine, does one job and says what it took.

A runner (`python -m benchmarks.engines.run_…`) reads its job as JSON from stdin and writes one JSON
object to stdout. The runners of other engines run in those engines' own environments, so this file
needs nothing but the standard library.

    {"work": "stream", "engine": {…}, "requests": […], "warmup": […]}

    stream    one request, token by token: time to the first token, decode rate, step times
    complete  all requests at once: output tokens a second
    foreign   stream, once alone and once beside a process that keeps one core busy
    first     write the first token to stdout as soon as it is there, and nothing else

What libraries print to stdout goes to stderr.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Metrics = dict[str, float]
Arrived = Callable[[int], None]


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens to make, greedily and past any end token."""

    prompt: list[int]
    new_tokens: int


class Engine(Protocol):
    """What a runner wraps its engine in."""

    version: str

    def stream(self, request: Request, arrived: Arrived) -> None:
        """Serve one request; tell the number of new tokens whenever some arrive."""
        ...

    def complete(self, requests: Sequence[Request]) -> int:
        """Serve all requests and return how many tokens were made."""
        ...

    def close(self) -> None: ...


def run(open_engine: Callable[[dict[str, Any]], Engine]) -> None:
    """The main function of a runner."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # from here on stdout is ours alone, also in processes that the engine starts
    job = json.load(sys.stdin)
    engine = open_engine(job["engine"])
    try:
        requests, warmup = ([Request(**each) for each in job[name]] for name in ("requests", "warmup"))
        if job["work"] == "first":
            engine.stream(requests[0], lambda count: print(count, end="", file=answer, flush=True))
            return
        watch, metrics = measure(engine, job["work"], requests, warmup)
        metrics["peak_mb"] = peak_memory() / 1e6
        result = {"version": engine.version, "metrics": metrics, "foreign_cores": watch.cores}
    finally:
        engine.close()
    answer.write(json.dumps(result))
    answer.close()


def measure(
    engine: Engine, work: str, requests: Sequence[Request], warmup: Sequence[Request]
) -> tuple[ForeignCores, Metrics]:
    """Warm up, then do the work once; the watch covers the timed part only."""
    if work == "complete":
        engine.complete(warmup)
        with ForeignCores() as watch:
            start = time.perf_counter()
            made = engine.complete(requests)
            seconds = time.perf_counter() - start
        check_count(made, sum(request.new_tokens for request in requests))
        return watch, {"output_tok_s": made / seconds, "seconds": seconds}
    for request in warmup:
        timed_stream(engine, request)
    with ForeignCores() as watch:
        metrics = timed_stream(engine, requests[0])
        if work == "foreign":
            with BusyProcess():
                beside = timed_stream(engine, requests[0])
            metrics |= {f"beside_{name}": beside[name] for name in ("step_p50_ms", "step_mean_ms")}
            for name in ("p50", "mean"):
                metrics[f"ratio_{name}"] = beside[f"step_{name}_ms"] / metrics[f"step_{name}_ms"]
    return watch, metrics


def timed_stream(engine: Engine, request: Request) -> Metrics:
    """Time to first token, tokens a second after it, and the steps between tokens."""
    times: list[float] = []
    start = time.perf_counter()
    engine.stream(request, lambda count: times.extend([time.perf_counter()] * count))
    check_count(len(times), request.new_tokens)
    metrics = {"ttft_ms": (times[0] - start) * 1e3, "output_tok_s": len(times) / (times[-1] - start)}
    steps = [after - before for before, after in itertools.pairwise(times)]
    if steps:
        metrics["decode_tok_s"] = len(steps) / sum(steps)
        metrics["step_p50_ms"] = statistics.median(steps) * 1e3
        metrics["step_mean_ms"] = statistics.fmean(steps) * 1e3
    return metrics


def check_count(made: int, asked: int) -> None:
    """A rate of tokens that were not made is no rate."""
    if made != asked:
        raise RuntimeError(f"{asked} tokens were asked for and {made} came")


class BusyProcess:
    """Another process with one busy thread, on whatever core it gets."""

    def __enter__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        time.sleep(0.3)  # until it is past its own start

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class ForeignCores:
    """How many cores were busy with anything but this process and its descendants.

    `cores` is None where there is no /proc. Time that a hypervisor gave to other machines counts.
    """

    cores: float | None = None

    def __enter__(self) -> ForeignCores:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        now = self._now()
        if self._start is not None and now is not None:
            wall, busy, own = (after - before for before, after in zip(self._start, now, strict=True))
            self.cores = round(max(0.0, busy - own) / max(wall, 1e-3), 3)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """(clock, time all cores were busy, time this process and its descendants ran) in seconds."""
        try:
            with open("/proc/stat") as stream:
                user, nice, system, _, _, irq, softirq, steal = map(int, stream.readline().split()[1:9])
        except (OSError, ValueError):
            return None
        busy = user + nice + system + irq + softirq + steal
        own = 0
        for process in family():
            try:
                # After the name, which may hold blanks: utime, stime, and those of reaped children.
                fields = (process / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended just now
            own += sum(map(int, fields[11:15]))
        ticks = os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy / ticks, own / ticks


def family() -> list[Path]:
    """/proc folders of this process and its living descendants."""
    found = [Path("/proc/self")]
    for process in found:
        for children in process.glob("task/*/children"):
            try:
                found += [Path("/proc") / pid for pid in children.read_text().split()]
            except OSError:
                continue
    return found


def peak_memory() -> int:
    """Bytes at the peak (VmHWM), summed over this process and its living descendants."""
    total = 0
    for process in family():
        try:
            lines = (process / "status").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
    return total
