"""The engine in a child process, as the front end sees it.

When either side ends, the other does: the child by the end of the socket (and on Linux by the kernel's
word), the front end because every open request, and `wait_dead`, hear of it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec

from octavo import errors
from octavo.engine import wire
from octavo.engine.engine_stats import EngineStats
from octavo.errors import EngineDeadError, OctavoError, RequestError
from octavo.server.base_client import BaseEngineClient, Limits, OpenRequest
from octavo.server.engine_child import HEARTBEAT_SECONDS, EngineChild
from octavo.server.engine_client import EngineClientInfo, LoadProgress
from octavo.server.metrics import ServerMetrics

logger = logging.getLogger("octavo")

END_SECONDS = 10.0  # for a child that was told to end
STATS_SECONDS = 30.0


class ProcessEngineClient(BaseEngineClient):
    """An EngineClient for an `EngineChild`; made in the running event loop, which it belongs to."""

    def __init__(
        self,
        child: EngineChild,
        limits: Limits,
        metrics: ServerMetrics,
        *,
        served_model_names: tuple[str, ...] = (),
        engine_timeout: float = 0.0,
    ) -> None:
        super().__init__(limits, metrics)
        self._child = child
        self._names = served_model_names
        self._engine_timeout = engine_timeout
        self._link: _Link | None = None
        self._serials = itertools.count(1)
        self._asked: dict[int, asyncio.Future[wire.Stats]] = {}
        self._failure: BaseException | None = None  # what the child said before it ended
        self._heard = time.monotonic()  # when the child was last heard
        self._step_seconds = 0.0  # what it said of its step then
        self._tasks: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        """Begin to listen. The child may have failed by now; `wait_ready` tells."""
        self._child.sock.setblocking(False)
        link = _Link(self._take, self._on_socket_end)
        await self._loop.create_unix_connection(lambda: link, sock=self._child.sock)
        self._link = link
        if self._engine_timeout:
            self._spawn(self._watch())

    # ------------------------------------------------------------------ towards the engine

    def _submit(self, request: OpenRequest) -> None:
        message = wire.Admit(
            request.key,
            request.prompt_ids,
            wire.params_to_wire(request.params),
            request.kind,
            request.continue_prompt,
            request.arrival_time,
        )
        try:
            self._send(message)
        except UnicodeEncodeError:
            raise RequestError(
                "the request holds half of a Unicode surrogate pair, which is no text"
            ) from None

    def _cancel(self, key: int) -> None:
        self._send(wire.Abort([key]))

    async def stats(self, *, check_integrity: bool = False) -> EngineStats:
        """See EngineClient."""
        if self._is_ended or self._info is None:
            raise self._dead_error()
        serial = next(self._serials)
        answer: asyncio.Future[wire.Stats] = self._loop.create_future()
        self._asked[serial] = answer
        try:
            self._send(wire.GetStats(serial, check_integrity))
            found = await asyncio.wait_for(answer, STATS_SECONDS)
        except asyncio.TimeoutError:
            raise EngineDeadError(f"the engine has not answered for {STATS_SECONDS:g} s") from None
        finally:
            del self._asked[serial]
        if found.fault is not None:
            raise AssertionError(found.fault)
        return found.stats

    def _send(self, message: wire.Message) -> None:
        if self._link is not None:
            self._link.write(wire.frame(message))

    # ------------------------------------------------------------------ from the engine

    def _take(self, message: wire.FromEngine) -> None:
        self._heard = time.monotonic()
        if isinstance(message, wire.Outputs):
            opened = self._open
            for output in message.outputs:
                request = opened.get(output.key)
                if request is not None:
                    request.stream.put(
                        wire.output_from_wire(output, request.request_id, request.prompt, request.prompt_ids)
                    )
        elif isinstance(message, wire.Heartbeat):
            self._step_seconds = message.step_seconds
        elif isinstance(message, wire.Refused):
            self._refuse(message.key, _error(message.kind, message.message, message.param))
        elif isinstance(message, wire.Stats):
            answer = self._asked.get(message.serial)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, wire.Loading):
            self._progress = LoadProgress(message.stage, message.fraction)
        elif isinstance(message, wire.Found):
            self._note_found(message.tokenizer_path)
        elif isinstance(message, wire.Ready):
            facts = msgspec.structs.asdict(message)
            names = self._names or (message.model,)
            self._note_ready(EngineClientInfo(served_model_names=names, **facts))
        else:
            self._failure = _error(message.kind, message.message, None)

    def _on_socket_end(self, error: BaseException | None) -> None:
        """The socket is closed: by the child's end, by ours, or because what came was no message."""
        if error is not None and self._failure is None and not isinstance(error, OSError):
            self._failure = EngineDeadError(f"what it sends cannot be read: {error}")
        if not self._is_ended:
            self._spawn(self._bury())

    async def _bury(self) -> None:
        """The child ends, or has to; find out why."""
        await self._wait_for_exit(2.0)
        self._child.kill()
        cause = self._failure or EngineDeadError(self._child.describe_end())
        self._fail_asked()
        self._note_end(cause)

    async def _watch(self) -> None:
        """End a child that is alive but does nothing: a step without end, or no heartbeat at all."""
        while not self._is_ended:
            slept = time.monotonic()
            await asyncio.sleep(HEARTBEAT_SECONDS)
            now = time.monotonic()
            if now - slept > 3 * HEARTBEAT_SECONDS:
                self._heard = now  # we ourselves were stopped: what we have not heard proves nothing
            silence = now - self._heard
            if silence + self._step_seconds > self._engine_timeout:
                self._failure = EngineDeadError(
                    f"it has been silent, or in one step, for more than {self._engine_timeout:g} s"
                )
                logger.critical("the engine hangs: %s; it is ended", self._failure)
                await self._bury()

    # ------------------------------------------------------------------ the end

    async def _end(self) -> None:
        self._fail_asked()
        self._send(wire.Shutdown())
        await self._wait_for_exit(END_SECONDS)
        if self._child.process.poll() is None:
            logger.warning("the engine did not end within %g s and is killed", END_SECONDS)
        if self._link is not None:
            self._link.close()
        self._child.kill()
        for task in self._tasks:
            task.cancel()

    async def _wait_for_exit(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        pause = 0.005
        while self._child.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(pause)
            pause = min(0.1, pause * 2)

    def _fail_asked(self) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(self._dead_error())

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Link(asyncio.Protocol):
    """Our end of the socket: messages in, bytes out."""

    def __init__(
        self, take: Callable[[wire.FromEngine], None], on_end: Callable[[BaseException | None], None]
    ) -> None:
        self._take = take
        self._on_end = on_end
        self._frames = wire.FrameReader()
        self._transport: asyncio.Transport | None = None
        self._fault: BaseException | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._take(wire.read_from_engine(body))
        except (ValueError, msgspec.DecodeError) as error:
            self._fault = error
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_end(self._fault or exc)

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _error(kind: str, message: str, param: str | None) -> OctavoError:
    """The error the engine's process told of, as one of ours."""
    if kind == "RequestError":
        return RequestError(message, param)
    found = getattr(errors, kind, None)
    if found in (None, errors.NotInThisVersionError) or not issubclass(found, OctavoError):
        if kind == "NotInThisVersionError":
            return errors.ConfigError(message)
        return EngineDeadError(f"{kind}: {message}")
    made: OctavoError = found(message)
    return made
