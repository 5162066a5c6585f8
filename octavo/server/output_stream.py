"""Between an engine and whoever reads one request's outputs."""

from __future__ import annotations

import asyncio

from octavo.outputs import RequestOutput, join_deltas


class OutputStream:
    """Holds at most one output of a request: deltas that come while nobody reads are joined.

    Everything happens in one event loop. An error comes after the output that was there before it.
    """

    __slots__ = ("_error", "_loop", "_output", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        """The next output, or the only one of a request that does not stream."""
        self._output = output if self._output is None else join_deltas(self._output, output)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """No output follows. Only the first error counts."""
        if self._error is None:
            self._error = error
            self._wake()

    async def take(self) -> RequestOutput:
        """Wait for what is new, or raise what ended the stream. One task at a time."""
        while True:
            output, self._output = self._output, None
            if output is not None:
                return output
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
