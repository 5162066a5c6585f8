"""A server with known delays, and with every way to fail; a process of its own.

    python -m tests.bench.stub_server [MODEL …]    prints its port, then serves until stdin ends

The model that is asked for says what happens. "steady": a chunk with the role at once, the first three tokens
after 200 ms, three more every 60 ms, and half way a stall of 300 ms; then the reason, the usage and [DONE].
It writes down when it received each request and when it sent each chunk with content, on the monotonic clock
that all processes of a machine share; GET /log gives that, by the request's text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TTFT, PER_CHUNK, TOKENS, STALL = 0.2, 0.06, 3, 0.3
MODES = (
    "steady", "reasoning", "no_usage", "http_500", "cut_off", "closed", "hang", "error_event", "not_streamed",
    "not_json", "slow_start", "dies",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent.parent

Log = dict[str, dict[str, Any]]


class Stub:
    """One server's state."""

    def __init__(self, models: Sequence[str]) -> None:
        self.models = models
        self.log: Log = {}
        self.deaths = 0  # requests of the mode "dies" so far

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, as many requests as it brings."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                received = time.monotonic()
                length = next(
                    (
                        int(line.split(":")[1])
                        for line in head.lower().split("\r\n")
                        if line.startswith("content-length")
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                if not await self.answer(head.split()[1], body, received, writer):
                    break
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def answer(self, path: str, body: bytes, received: float, writer: asyncio.StreamWriter) -> bool:
        """False if the connection is to end."""
        if path == "/v1/models":
            await _whole(writer, 200, {"data": [{"id": model} for model in self.models]})
            return True
        if path == "/log":
            await _whole(writer, 200, self.log)
            return True
        if not path.startswith("/v1/"):
            await _whole(writer, 404, {"error": {"message": f"there is no {path}"}})
            return True
        request = json.loads(body)
        mode = request["model"]
        if mode == "http_500":
            await _whole(
                writer, 500, {"error": {"message": "the stub is out of order", "type": "server_error"}}
            )
            return True
        if mode == "dies":  # the third request takes the server with it
            self.deaths += 1
            if self.deaths == 3:
                os._exit(1)
        if mode == "not_streamed":
            await _whole(writer, 200, {"choices": [{"message": {"content": "all at once"}}]})
            return True
        entry = self.log[_text_of(request)] = {"received": received, "sent": [], "body": request}
        return await self._stream(mode, request, entry, writer)

    async def _stream(
        self, mode: str, request: dict[str, Any], entry: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        count, received = request["max_tokens"], entry["received"]
        _event(writer, _chunk({"role": "assistant", "content": ""}))
        await writer.drain()
        due, made = received + (1.0 if mode == "slow_start" else TTFT), 0
        while made < count:
            tokens = min(TOKENS, count - made)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            words = "".join(f"w{made + i} " for i in range(tokens))
            if made and mode in ("cut_off", "closed", "hang", "error_event", "not_json"):
                return await _fail(mode, writer)
            name = "reasoning_content" if mode == "reasoning" else "content"
            entry["sent"].append([time.monotonic(), tokens])
            _event(writer, _chunk({name: words}))
            await writer.drain()
            stalls = made < count // 2 <= made + tokens
            made += tokens
            due += PER_CHUNK + (STALL if stalls else 0.0)
        _event(writer, _chunk({}, reason="length"))
        if mode != "no_usage":
            usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
            _event(writer, {"id": "x", "choices": [], "usage": usage})
        _event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


async def _fail(mode: str, writer: asyncio.StreamWriter) -> bool:
    if mode == "hang":
        await asyncio.sleep(3600)
    elif mode == "error_event":
        _event(writer, {"error": {"message": "the engine died", "type": "server_error"}})
        writer.write(b"0\r\n\r\n")
    elif mode == "not_json":
        writer.write(b"f\r\ndata: {broken\n\n\r\n0\r\n\r\n")
    elif mode == "closed":
        writer.write(b"0\r\n\r\n")  # a proper end of the body, in the middle of the answer
    else:
        writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    return False


def _text_of(request: dict[str, Any]) -> str:
    prompt = request["messages"][-1]["content"] if "messages" in request else request["prompt"]
    return str(prompt)


def _chunk(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None}


def _event(writer: asyncio.StreamWriter, data: dict[str, Any] | str) -> None:
    text = data if isinstance(data, str) else json.dumps(data)
    payload = f"data: {text}\n\n".encode()
    writer.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")


async def _whole(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    payload = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    writer.write(head.encode() + payload)
    await writer.drain()


async def _main() -> None:
    server = await asyncio.start_server(Stub(sys.argv[1:] or MODES).serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await asyncio.to_thread(sys.stdin.read)


@contextlib.contextmanager
def running(*models: str) -> Iterator[str]:
    """The URL of a stub in a process of its own. It names all models, or these."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.stub_server", *models],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def log_of(url: str) -> Log:
    """What the stub wrote down."""
    with urllib.request.urlopen(f"{url}/log") as response:
        found: Log = json.load(response)
    return found


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
