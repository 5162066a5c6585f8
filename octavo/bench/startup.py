"""How long until an engine answers: from the start of a fresh process to the first token.

    python -m octavo.bench.startup        reads a spec as JSON from stdin, and tells its moments

The moments are of the machine's monotonic clock, which the parent read before it started the process: the
interpreter's own start is part of what is measured.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from octavo.bench import metrics
from octavo.bench.clients import child_environment
from octavo.bench.record import RequestRecord, RunResult
from octavo.bench.rendering import Renderer
from octavo.bench.runner import LiveView, environment
from octavo.bench.spec import BatchSpec, LoadSpec, PlacementSpec, RunSpec, SamplingSpec
from octavo.bench.target import Answer, TargetRequest
from octavo.errors import OctavoError

STAGES = ("imported", "ready", "first_token")
_PROMPT = "The first token comes"


def measure_startup(spec: RunSpec, live: LiveView) -> RunResult:
    """Start `spec.repeat` fresh processes, one after the other. The first one may find less in the disk's
    cache than the others: each is in the result. Raises ConfigError for a wrong spec."""
    warnings = spec.check()
    if spec.engine == "url":
        raise OctavoError("a URL runs already: there is no start to be measured")
    renderer = Renderer.of(spec)
    assert renderer.tokenizer is not None
    ids = renderer.tokenizer.encode(_PROMPT)
    result = RunResult(spec.engine, spec.method, spec.effective(), environment(), warnings)
    origin = time.monotonic()
    stages: list[dict[str, float]] = []
    live.begin(spec.repeat, spec.label)
    try:
        for number in range(spec.repeat):
            record = RequestRecord(number, "startup", repeat=number, prompt_tokens=len(ids))
            began = time.monotonic()
            record.scheduled_time = record.sent_time = began - origin
            moments = _start(spec, ids, record)
            if moments is not None:
                stages.append({name: moments[name] - began for name in STAGES})
                record.first_token_time = record.end_time = moments["first_token"] - origin
                record.arrivals, record.generated_tokens = [(record.end_time, 1)], 1
                record.derive(open_loop=True)
            result.requests.append(record)
            live.ended(record)
    finally:
        live.end()
    duration = time.monotonic() - origin
    result.summary = metrics.summarize(result.requests, duration, slo=spec.slo)
    result.summary["repeats"] = metrics.repeats([])
    result.summary["startup"] = {
        name: metrics.distribution([each[name] for each in stages]) for name in STAGES
    }
    result.summary["startup"]["each"] = stages
    result.engine_metrics = metrics.engine_metrics({}, {}, [], "none")
    return result


def _start(spec: RunSpec, ids: Sequence[int], record: RequestRecord) -> dict[str, float] | None:
    """One process; its moments, or None with the record's error."""
    job = {"spec": spec_to_json(spec), "ids": list(ids)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "octavo.bench.startup"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=child_environment(),
            timeout=spec.request_timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        record.error = f"timeout: no first token within {spec.request_timeout:g} s"
        return None
    last = done.stdout.strip().splitlines()[-1:] or [""]
    try:
        told = json.loads(last[0])
        moments = {name: float(told[name]) for name in STAGES}
    except (ValueError, KeyError, TypeError):
        words = done.stderr.strip()[-1500:] or "it said nothing"
        record.error = f"start: the process ended with code {done.returncode}: {words}"
        return None
    return moments


def spec_to_json(spec: RunSpec) -> dict[str, Any]:
    """A spec as it crosses to another process."""
    return asdict(replace(spec, engine_options=dict(spec.engine_options), api_key=None))


def spec_from_json(plain: dict[str, Any]) -> RunSpec:
    """The other way round."""
    parts = {"sampling": SamplingSpec, "load": LoadSpec, "batch": BatchSpec, "placement": PlacementSpec}
    built = {name: kind(**plain.pop(name)) for name, kind in parts.items()}
    return RunSpec(**{**plain, "notices": tuple(plain["notices"])}, **built)


def main() -> None:
    """The child's life."""
    job = json.load(sys.stdin)
    spec = spec_from_json(job["spec"])
    moments = asyncio.run(_first_token(spec, job["ids"]))
    print(json.dumps(moments), flush=True)


async def _first_token(spec: RunSpec, ids: Sequence[int]) -> dict[str, float]:
    from octavo.bench.targets import make_target

    imported = time.monotonic()
    target = make_target(spec)
    try:
        await target.open()
        ready = time.monotonic()
        answer = Answer()
        await target.generate(TargetRequest(0, "startup", 1, tuple(ids)), answer)
        return {"imported": imported, "ready": ready, "first_token": answer.arrivals[0][0]}
    finally:
        await target.close()


if __name__ == "__main__":
    main()
