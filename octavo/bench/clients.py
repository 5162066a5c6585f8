"""Client processes: several senders of one load, started together, read together, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import octavo
from octavo.bench.client import plan_to_json
from octavo.bench.http_client import HttpJob
from octavo.bench.load import LoadOutcome, LoadPlan
from octavo.bench.record import RequestRecord
from octavo.errors import OctavoError

LONGEST_LINE = 1 << 28
HEAD_START = 0.1  # seconds between "go" and the load's beginning, so that every client has read it


async def drive_clients(
    server: HttpJob,
    plan: LoadPlan,
    count: int,
    origin: float,
    *,
    on_record: Callable[[RequestRecord], None] | None = None,
    on_start: Callable[[float], None] | None = None,
) -> LoadOutcome:
    """Run a plan from `count` processes. Raises OctavoError if one of them dies."""
    whole = max(len(plan.requests), 1)
    if not plan.open_loop:
        whole = min(whole, plan.concurrency)
    count = min(count, whole)
    outcome = LoadOutcome()
    clients: list[_Client] = []
    try:
        for number in range(count):
            clients.append(await _Client.start(server, plan.part(number, count), origin))
        for client in clients:
            await client.wait_ready()
        start = time.monotonic() + HEAD_START
        if on_start is not None:
            on_start(start)
        for client in clients:
            client.go(start)
        await asyncio.gather(*(client.collect(outcome, on_record) for client in clients))
    finally:
        for client in clients:
            await client.end()
    return outcome


class _Client:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, server: HttpJob, plan: LoadPlan, origin: float) -> _Client:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "octavo.bench.client",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
            env=child_environment(),
        )
        job = {"server": server.to_json(), "plan": plan_to_json(plan), "origin": origin}
        assert process.stdin is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        # The client may die before it has read it: its own words say why.
        with contextlib.suppress(ConnectionError):
            await process.stdin.drain()
        return cls(process)

    async def wait_ready(self) -> None:
        await self._message()

    def go(self, start: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{start!r}\n".encode())

    async def collect(self, outcome: LoadOutcome, on_record: Callable[[RequestRecord], None] | None) -> None:
        while True:
            message = await self._message()
            if "lags" in message:
                outcome.heartbeat_lags += message["lags"]
                return
            record = RequestRecord(**message["record"])
            record.arrivals = [(moment, tokens) for moment, tokens in record.arrivals]
            outcome.records.append(record)
            if on_record is not None:
                on_record(record)

    async def _message(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = await self._process.stdout.readline()
        if line:
            message: dict[str, Any] = json.loads(line)
            return message
        words = (await self._process.stderr.read()).decode(errors="replace").strip()
        code = await self._process.wait()
        raise OctavoError(
            f"a client process ended with code {code} before its work was done: "
            + (words[-1500:] or "it said nothing")
        )

    async def end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except asyncio.TimeoutError:
                self._process.kill()
                await self._process.wait()


def child_environment() -> dict[str, str]:
    """Ours, with this very package first on the path, however it was found."""
    root = str(Path(octavo.__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
