"""One JSON line a request, and a name for each request.

The middleware stands outermost. It takes the caller's X-Request-Id (or makes one up), gives it back
in the answer, puts a `RequestRecord` where everything below finds it, and writes the line when the
last byte of the answer is on its way or the client has gone. No line ever holds a prompt, an answer,
a key or a query string.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import sys
import threading
import time
import uuid
from typing import IO, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import ConfigError
from octavo.server.metrics import ServerMetrics
from octavo.server.request_record import CURRENT_RECORD, RequestRecord

# What a caller's own id may look like; anything else is replaced, so that nobody writes into our log.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}\Z")
_MAX_PATH = 256
# Asked every few seconds by machines: lines only where something is wrong.
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
_MAX_WAITING_LINES = 10_000


class LineWriter:
    """Writes lines in a thread of its own, so that a slow disk or a full pipe never stops the server.

    What does not fit the queue is dropped and counted.
    """

    def __init__(self, stream: IO[str], metrics: ServerMetrics) -> None:
        self._stream = stream
        self._metrics = metrics
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING_LINES)
        self._thread = threading.Thread(target=self._run, name="octavo-access-log", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, target: str, metrics: ServerMetrics) -> LineWriter | None:
        """For the option access_log: "-", "off" or a file, which is added to. Raises ConfigError."""
        if target == "off":
            return None
        if target == "-":
            return cls(sys.stdout, metrics)
        try:
            return cls(open(target, "a", encoding="utf-8"), metrics)
        except OSError as error:
            raise ConfigError(f"access_log: {target} cannot be written: {error.strerror}") from None

    def write(self, line: str) -> None:
        """Queue one line, without its end."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._metrics.dropped_log_lines += 1

    def close(self) -> None:
        """Write what waits, for at most two seconds."""
        try:
            self._lines.put(None, timeout=1.0)
        except queue.Full:
            return
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            try:
                if line is not None:
                    self._stream.write(line + "\n")
                if line is None or self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # the disk is full, or the reader of our pipe is gone
                self._metrics.dropped_log_lines += 1
            if line is None:
                break
        if self._stream is not sys.stdout:
            with contextlib.suppress(OSError):
                self._stream.close()


class AccessLog:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, writer: LineWriter | None, metrics: ServerMetrics) -> None:
        self._app = app
        self._writer = writer
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), scope["method"], scope["path"])
        token = CURRENT_RECORD.set(record)
        is_complete = False

        async def noted_send(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.body":
                if not message.get("more_body", False):
                    is_complete = True
            elif message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        async def noted_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not is_complete:
                record.aborted = True
            return message

        try:
            await self._app(scope, noted_receive, noted_send)
        except BaseException as error:
            record.error = type(error).__name__
            raise
        finally:
            CURRENT_RECORD.reset(token)
            route = scope.get("route")
            record.route = getattr(route, "path", "") or "other"
            record.aborted = record.aborted or not is_complete
            self._metrics.http[record.method, record.route, record.status] += 1
            is_quiet = record.path in _QUIET_PATHS and record.status in (200, 503)
            if self._writer is not None and not is_quiet:
                self._writer.write(access_line(record, scope))


def access_line(record: RequestRecord, scope: Scope) -> str:
    """The line of one request that has ended."""
    client = scope.get("client")
    fields: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": record.request_id,
        "client": client[0] if client else None,
        "method": record.method,
        "path": record.path[:_MAX_PATH],
        "route": record.route,
        "status": record.status,
        "latency": round(time.monotonic() - record.start, 4),
        "aborted": record.aborted,
    }
    if record.num_generations:
        reasons = sorted(set(record.finish_reasons))
        fields |= {
            "ttft": None if record.ttft is None else round(record.ttft, 4),
            "prompt_tokens": record.num_prompt_tokens,
            "cached_tokens": record.num_cached_tokens,
            "output_tokens": record.num_output_tokens,
            "finish_reason": ",".join(reasons) or None,
        }
    if record.error is not None:
        fields["error"] = record.error
    return json.dumps(fields)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            if _REQUEST_ID.match(given):
                return str(given)
            break
    return uuid.uuid4().hex
