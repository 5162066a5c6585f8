"""The thread that steps `AsyncLLM`'s engine, and what crosses between it and the callers' event loops."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from octavo.engine.engine_stats import EngineStats
from octavo.engine.request_state import OutputKind
from octavo.engine.setup import EngineParts
from octavo.errors import EngineDeadError, OctavoError
from octavo.outputs import RequestOutput, join_deltas

if TYPE_CHECKING:
    from octavo.engine.engine import Engine
    from octavo.engine.request_reader import PreparedRequest

logger = logging.getLogger(__name__)

STEPS_BETWEEN_LOOP_CHECKS = 32


class Mailbox:
    """Where a request's outputs go: at most one waits, whatever the engine sends meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop, kind: OutputKind) -> None:
        self.loop = loop
        self.request_id: str | None = None  # set, and read, by the engine's thread only
        self.kind: OutputKind = kind
        self._lock = threading.Lock()
        self._output: RequestOutput | None = None
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def send(self, item: RequestOutput | Exception) -> bool:
        """From the engine's thread. False if the loop was closed: nobody listens any more."""
        with self._lock:
            was_empty = self._output is None and self._error is None
            if isinstance(item, Exception):
                self._error = item
            elif self._output is not None and self.kind == "delta":
                self._output = join_deltas(self._output, item)
            else:
                self._output = item
        if self.loop.is_closed():
            return False
        if was_empty:
            try:
                self.loop.call_soon_threadsafe(self._filled.set)
            except RuntimeError:  # closed just now
                return False
        return True

    async def take(self) -> RequestOutput:
        """Wait for an output, or raise the error that came after the last one."""
        while True:
            await self._filled.wait()
            with self._lock:
                output, self._output = self._output, None
                error = self._error
                if output is None or error is None:
                    self._filled.clear()
                if output is not None:
                    return output
                if error is not None:
                    self._error = None  # its traceback holds the caller: keep no way back
                    raise error


@dataclass(slots=True)
class Admit:
    """Serve a request; with no id of the caller's, make one up."""

    mailbox: Mailbox
    request_id: str | None
    prepared: PreparedRequest
    arrival_time: float


@dataclass(slots=True)
class Abort:
    mailbox: Mailbox


@dataclass(slots=True)
class TakeStats:
    """Hand the engine's statistics, or what check_integrity found, to a future of some event loop."""

    answer: asyncio.Future[EngineStats]
    check_integrity: bool

    def tell(self, found: EngineStats | Exception) -> None:
        """From any thread."""

        def put() -> None:
            if self.answer.done():
                return
            if isinstance(found, Exception):
                self.answer.set_exception(found)
            else:
                self.answer.set_result(found)

        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
            self.answer.get_loop().call_soon_threadsafe(put)


Command: TypeAlias = "Admit | Abort | TakeStats"


class EngineThread:
    """The thread, and all that it shares. It knows nothing of the `AsyncLLM`, which can thus be collected."""

    def __init__(self, parts: EngineParts) -> None:
        self.dead: BaseException | None = None
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()  # None: stop
        self.mailboxes: dict[str, Mailbox] = {}
        self._parts = parts
        self._ids = itertools.count()
        self._lock = threading.Lock()  # guards `dead` against commands that come too late
        self._closing = threading.Lock()
        self._is_closed = False
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ from other threads

    def engine(self) -> Engine:
        """The engine, for what is safe to do beside its thread. Raises EngineDeadError."""
        with self._lock:
            if self.dead is None:
                return self._parts.engine
            raise self._dead_error()

    def send(self, command: Command) -> None:
        """Queue a command. Raises EngineDeadError where one would wait for an answer."""
        with self._lock:
            if self.dead is None:
                self.commands.put(command)
            elif not isinstance(command, Abort):
                raise self._dead_error()

    def shutdown(self) -> None:
        self.commands.put(None)
        self._thread.join()
        self._close()

    def abandon(self) -> None:
        """Nobody is left who could call `shutdown`.

        The garbage collector calls this, in any thread and at any moment: so it takes no lock that
        the thread it interrupts may hold, and does not wait.
        """
        self._is_abandoned = True
        self.commands.put(None)
        if self.dead is not None:  # the thread may have ended before it could see the mark
            self._close()

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        cause: BaseException = EngineDeadError("the engine was shut down")
        try:
            self._serve(self._parts.engine)
        except BaseException as error:  # every open request must hear of it
            cause = error
        with self._lock:
            self.dead = cause
        waiting = list(self.mailboxes.values())
        self.mailboxes.clear()
        while not self.commands.empty():  # those that came in before the lock
            command = self.commands.get()
            if isinstance(command, Admit):
                waiting.append(command.mailbox)
            elif isinstance(command, TakeStats):
                command.tell(self._dead_error())
        for mailbox in waiting:
            mailbox.send(self._dead_error())
        if self._is_abandoned:
            self._close()

    def _serve(self, engine: Engine) -> None:
        for step in itertools.count():
            # Idle: wait for a command. Busy: take what is there and go on.
            while not self.commands.empty() or not engine.has_work():
                command = self.commands.get()
                if command is None:
                    return
                self._obey(engine, command)
            for output in engine.step():
                self._deliver(engine, output)
            if step % STEPS_BETWEEN_LOOP_CHECKS == 0:  # a request that sends nothing yet finds out here
                for mailbox in [box for box in self.mailboxes.values() if box.loop.is_closed()]:
                    self._abort(engine, mailbox)

    def _obey(self, engine: Engine, command: Command) -> None:
        """Whatever goes wrong with a command is its caller's alone."""
        if isinstance(command, TakeStats):
            try:
                if command.check_integrity:
                    engine.scheduler.check_integrity()
                command.tell(engine.stats())
            except Exception as error:
                command.tell(error)
            return
        try:
            if isinstance(command, Admit):
                self._admit(engine, command)
            else:
                self._abort(engine, command.mailbox)
        except OctavoError as error:
            command.mailbox.send(error)
        except Exception as error:
            logger.exception("a request failed on its way in or out; the others go on")
            command.mailbox.send(error)

    def _admit(self, engine: Engine, command: Admit) -> None:
        name = command.request_id
        if name is None:
            name = next(free for free in map("auto-{}".format, self._ids) if free not in self.mailboxes)
        mailbox = command.mailbox
        engine.admit(name, command.prepared, mailbox.kind, arrival_time=command.arrival_time)
        mailbox.request_id = name
        self.mailboxes[name] = mailbox

    def _abort(self, engine: Engine, mailbox: Mailbox) -> None:
        name = mailbox.request_id
        if name is not None and self.mailboxes.get(name) is mailbox:
            del self.mailboxes[name]
            engine.abort(name)

    def _deliver(self, engine: Engine, output: RequestOutput) -> None:
        mailbox = self.mailboxes.get(output.request_id)
        if mailbox is None:
            return
        if output.finished:
            del self.mailboxes[output.request_id]
        if not mailbox.send(output) and not output.finished:
            self._abort(engine, mailbox)

    def _close(self) -> None:
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                self._parts.close()

    def _dead_error(self) -> EngineDeadError:
        error = EngineDeadError(f"the engine has stopped: {self.dead}")
        error.__cause__ = self.dead
        return error
