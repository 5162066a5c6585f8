"""Streaming clients of the server benchmark, all in one process on the last core.

    python benchmarks/server_clients.py --port PORT < requests.json

They speak HTTP by hand, since a client library would cost more than the front end it is to measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT_IDS = [5, 6, 7, 8]
_STAMP = re.compile(rb'"text": ?" (\d{10,})')


def run_clients(
    port: int, streams: int = 0, tokens: int = 0, requests: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """All streams at once, from a process on the second core; what they saw."""
    if requests is None:
        requests = [{"prompt": PROMPT_IDS, "max_tokens": tokens}] * streams
    command = [sys.executable, __file__, "--port", str(port)]
    done = subprocess.run(
        command, input=json.dumps(requests).encode(), capture_output=True, check=True, cwd=ROOT
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def clients() -> None:
    """Ask all that stands on stdin at once; print what came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    requests = json.load(sys.stdin)
    import gc

    import uvloop

    gc.disable()  # its pauses would be counted as the server's

    print(json.dumps(uvloop.run(_ask_all(options.port, requests))))


async def _ask_all(port: int, requests: list[dict[str, Any]]) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    readers = []
    for _ in requests:
        _, reader = await loop.create_connection(_Reader, "127.0.0.1", port)
        readers.append(reader)
    cpu = time.process_time()
    began = time.monotonic()
    for reader, request in zip(readers, requests, strict=True):
        reader.ask({"temperature": 0, "ignore_eos": True, "stream": True, **request})
    await asyncio.gather(*(reader.ended for reader in readers))
    seconds = time.monotonic() - began
    delays = sorted(delay for reader in readers for delay in reader.delays)
    later = sorted(
        delay
        for reader in readers
        for at, delay in zip(reader.times, reader.delays, strict=True)
        if at > began + 1.0
    )
    tokens = sum(request["max_tokens"] for request in requests)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "chunks": sum(reader.num_chunks for reader in readers),
        "client_cpu": time.process_time() - cpu,
        "delays": {
            "p50": 1e3 * delays[len(delays) // 2],
            "p99": 1e3 * delays[int(len(delays) * 0.99)],
            "max": 1e3 * delays[-1],
            "later_p99": 1e3 * later[int(len(later) * 0.99)] if later else float("nan"),
        }
        if delays
        else {},
    }


class _Reader(asyncio.Protocol):
    """One streaming request: its chunks counted, its stamps read."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_chunks = 0
        self.times: list[float] = []  # when each token came, seconds
        self.delays: list[float] = []  # how long it was on its way
        self._rest = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, body: dict[str, Any]) -> None:
        content = json.dumps({"model": "fake", **body}).encode()
        self._transport.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(content) + content
        )

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.num_chunks += data.count(b"data: {")
        for stamp in _STAMP.findall(data):
            self.times.append(now / 1e9)
            self.delays.append((now - int(stamp[:20])) / 1e9)
        if self.num_chunks == 0 and b" 200 " not in data[:20]:
            self.ended.set_exception(RuntimeError(data.decode(errors="replace")))
            self._transport.close()
        if b"[DONE]" in self._rest + data:
            self._transport.close()
            if not self.ended.done():
                self.ended.set_result(None)
        self._rest = data[-8:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server closed the connection"))


if __name__ == "__main__":
    clients()
