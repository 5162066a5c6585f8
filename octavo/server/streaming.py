"""From an engine's outputs to the bytes of an answer, and what happens when the client goes away.

A client that disconnects cancels the work for it, which closes the engine's iterator, which aborts the
request in the engine; so it is for streams and for single answers. An error before the first output
is answered with its own status. After that the status is gone: a stream then ends with an error object
and without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.errors import EngineDeadError, OctavoError
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.server.errors import AnswerFailedError, http_error

T = TypeVar("T")

FIRST_OUTPUT_SECONDS = 10.0  # a stream that has nothing to tell for so long begins all the same
WAITING_SECONDS = 15.0  # and says so this often, for proxies that end silent connections
WAITING = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def chunk_frame(answer_id: str, kind: str, created: int, model: str, includes_usage: bool) -> tuple[str, str]:
    """What stands in every chunk of a stream before and behind its choices."""
    head = {"id": answer_id, "object": kind, "created": created, "model": model, "system_fingerprint": None}
    begin = "data: " + json.dumps(head, separators=(",", ":"))[:-1] + ',"choices":['
    return begin, ',"usage":null}\n\n' if includes_usage else "}\n\n"


class ClientGone(Exception):
    """The client disconnected: nobody reads the answer."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; it is cancelled if the client disconnects. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancel(task, watch)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class OutputReader:
    """The outputs of one request, or of several in whatever order they come: (number, output)."""

    def __init__(self, outputs: Sequence[AsyncGenerator[RequestOutput, None]]) -> None:
        # A request alone is read without a generator in between: every chunk would pay for it.
        self._single = outputs[0] if len(outputs) == 1 else None
        self._several = _merged(outputs) if len(outputs) > 1 else None
        self._first: asyncio.Future[Any] | None = None

    async def begin(self, seconds: float) -> None:
        """Wait for the first output, but not for longer. Raises what the engine raises instead of one."""
        self._first = asyncio.ensure_future(anext(self._source))
        await asyncio.wait({self._first}, timeout=seconds)
        if self._first.done() and self._first.exception() is not None:
            await self.close()
            self._first.result()

    async def stream(self) -> AsyncIterator[tuple[int, RequestOutput] | None]:
        """All outputs. None comes now and then while nothing has come yet, after `begin`."""
        if self._first is not None:
            while not self._first.done():
                yield None
                await asyncio.wait({self._first}, timeout=WAITING_SECONDS)
            first = self._first.result()
            yield first if self._single is None else (0, first)
        if self._single is not None:
            async for output in self._single:
                yield 0, output
        elif self._several is not None:
            async for item in self._several:
                yield item

    async def close(self) -> None:
        """Abort what has not ended. Must be called."""
        if self._first is not None:
            await _cancel(self._first)
        await self._source.aclose()

    @property
    def _source(self) -> AsyncGenerator[Any, None]:
        source = self._single if self._single is not None else self._several
        assert source is not None, "a reader of no request"
        return source


async def _merged(
    outputs: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """One queue of one place: a reader that is behind is waited for, and deltas join behind it."""
    queue: asyncio.Queue[tuple[int, RequestOutput] | BaseException] = asyncio.Queue(1)

    async def pump(number: int, source: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async for output in source:
                await queue.put((number, output))
        except Exception as error:
            await queue.put(error)
        finally:
            await source.aclose()

    tasks = [asyncio.ensure_future(pump(number, source)) for number, source in enumerate(outputs)]
    try:
        remaining = len(tasks)
        while remaining:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            remaining -= item[1].finished
    finally:
        await _cancel(*tasks)


def check_answer(answer: CompletionOutput) -> None:
    """Raise if an answer ended in an error, or was ended by the server."""
    if answer.finish_reason == "error":
        raise AnswerFailedError(answer.error or "the engine could not finish this answer")
    if answer.finish_reason == "abort":
        raise EngineDeadError("the request was aborted by the server")


class EventStream(Response):
    """A stream of server-sent events. `chunks` are whole events, ready to be sent; `reader` is closed at the
    end, whatever that is."""

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], reader: OutputReader, headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**STREAM_HEADERS, **headers}, media_type=self.media_type)
        del self.headers["content-length"]
        self._chunks = chunks
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client is gone."""
        pump = asyncio.ensure_future(self._send_all(send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            await _cancel(pump, watch)
            await self._reader.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        failed: Exception | None = None
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            failed = error
            await send({"type": "http.response.body", "body": self._error_event(error), "more_body": True})
        finally:
            await self._chunks.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if failed is not None and not isinstance(failed, OctavoError):
            raise failed  # a mistake of ours: whoever runs the application logs it

    def _error_event(self, error: Exception) -> bytes:
        return b"data: " + json.dumps({"error": http_error(error).object()}).encode() + b"\n\n"


def json_response(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer. Never NaN or infinity, which no JSON reader takes."""
    data = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    return Response(data, 200, dict(headers or {}), media_type="application/json")
