"""A client process: `python -m octavo.bench.client`, started by `octavo.bench.clients`.

It loads nothing of an engine, so that nothing but the load competes for its event loop. Its job comes as one
line of JSON on stdin; it answers "ready", waits for the start's moment, and then writes one line of JSON for
each request that ends and a last one with its lags.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from dataclasses import asdict
from typing import Any

from octavo.bench.http_client import HttpEngine, HttpJob
from octavo.bench.load import LoadPlan, run_load
from octavo.bench.record import RequestRecord
from octavo.bench.target import TargetRequest


def plan_to_json(plan: LoadPlan) -> dict[str, Any]:
    """A plan as it crosses to the client."""
    return asdict(plan)


def plan_from_json(plain: dict[str, Any]) -> LoadPlan:
    """The other way round."""
    requests = []
    for each in plain.pop("requests"):
        ids, messages = each.pop("prompt_token_ids"), each.pop("messages")
        requests.append(
            TargetRequest(
                **each,
                prompt_token_ids=None if ids is None else tuple(ids),
                messages=None if messages is None else tuple(messages),
            )
        )
    return LoadPlan(requests=requests, **plain)


def main() -> None:
    """Read the job, run it, tell of it."""
    job = json.loads(sys.stdin.readline())
    plan = plan_from_json(job["plan"])
    asyncio.run(_run(HttpJob(**job["server"]), plan, job["origin"]))


async def _run(server: HttpJob, plan: LoadPlan, origin: float) -> None:
    engine = HttpEngine(server)
    gc.collect()
    gc.freeze()  # the requests stay as they are: no collection need look at them
    try:
        _tell({"ready": True})
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line.strip():
            return  # the parent is gone
        outcome = await run_load(
            engine, plan, origin, start=float(line), on_record=lambda record: _tell(_record(record))
        )
        _tell({"lags": [round(lag, 6) for lag in outcome.heartbeat_lags]})
    finally:
        await engine.close()


def _record(record: RequestRecord) -> dict[str, Any]:
    return {"record": asdict(record)}


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
