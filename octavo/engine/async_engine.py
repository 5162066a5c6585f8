"""`AsyncLLM`: one engine for many asyncio tasks.

The engine runs in a thread of its own and does nothing there but steps: a prompt is checked,
tokenized and its grammar compiled on the caller's side, and only the prepared request is queued.
Outputs go back through a mailbox that holds at most one of them a request, so a caller that is
slower than the engine finds everything since its last look in one output. A caller that goes away
(its task is cancelled, it stops iterating, or its event loop is closed) aborts its request: the
engine forgets it within two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from octavo.config import EngineArgs
from octavo.engine.engine_stats import EngineStats
from octavo.engine.inputs import PromptInput
from octavo.engine.request_state import OutputKind
from octavo.engine.setup import EngineParts, build_engine
from octavo.errors import EngineDeadError, NotInThisVersionError, OctavoError, RequestError
from octavo.outputs import RequestOutput, join_deltas
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.engine.engine import Engine, PreparedRequest

logger = logging.getLogger(__name__)

# Reading a request up to this length takes well under a millisecond, less than a change of threads
# is worth; what is longer, or has a grammar, is read beside the event loop.
INLINE_CHARACTERS = 1000
INLINE_TOKEN_IDS = 10_000
CHARACTERS_AROUND_A_MESSAGE = 50
STEPS_BETWEEN_LOOP_CHECKS = 32


class AsyncLLM:
    """A model, loaded and ready, for asyncio. Keyword arguments as for `LLM`.

    `shutdown` frees the model; one that is dropped without it is freed once nothing refers to it any
    more and its thread has ended the step it is in.
    """

    def __init__(self, model: str = "smollm2", **engine_args: Any) -> None:
        args = EngineArgs.from_kwargs(model=model, **engine_args)
        self._start(build_engine(args))

    @classmethod
    def from_parts(cls, parts: EngineParts) -> AsyncLLM:
        """Around an engine that was built already (tests, the server)."""
        self = cls.__new__(cls)
        self._start(parts)
        return self

    def _start(self, parts: EngineParts) -> None:
        self._parts = parts
        self.model_path = str(parts.model_path)
        self._engine_thread = _EngineThread(parts)
        # At the interpreter's exit the daemon thread just ends: no model is torn down below it.
        weakref.finalize(self, self._engine_thread.abandon).atexit = False

    # ------------------------------------------------------------------ callers

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        kind: OutputKind = "cumulative",
        lora_request: str | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """Yield outputs of one prompt as they come; `kind` says what each holds.

        "cumulative": everything so far. "delta": what is new since the output before. "final": one
        output, at the end. Closing the iterator, or cancelling the task that awaits it, aborts the
        request. Raises RequestError for a request that cannot be served, EngineDeadError if the engine
        died.
        """
        arrival_time = time.monotonic()
        if lora_request is not None:
            raise NotInThisVersionError("LoRA (lora_request)")
        params = self._params(sampling_params)
        if request_id is not None and not isinstance(request_id, str):
            raise RequestError(f"request_id must be a text, not {type(request_id).__name__}", "request_id")
        if kind not in get_args(OutputKind):
            raise RequestError(f"kind must be one of {', '.join(get_args(OutputKind))}, not {kind!r}", "kind")
        engine = self._engine_thread.engine()
        if _reads_quickly(prompt, params):
            prepared = engine.read_request(prompt, params, add_special_tokens=add_special_tokens)
        else:
            prepared = await asyncio.to_thread(
                engine.read_request, prompt, params, add_special_tokens=add_special_tokens
            )
        del engine  # so that a shutdown frees it while this caller still waits
        mailbox = _Mailbox(asyncio.get_running_loop(), kind)
        self._engine_thread.send(_Admit(mailbox, request_id, prepared, arrival_time))
        finished = False
        try:
            while not finished:
                try:
                    output = await mailbox.take()
                except Exception:
                    finished = True
                    raise
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._engine_thread.send(_Abort(mailbox))

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        request_id: str | None = None,
        kind: OutputKind = "cumulative",
        **template_options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, through the chat template; max_tokens defaults to the rest of the context."""
        self._engine_thread.engine()  # raises if there is none any more
        params = self._params(sampling_params)
        template = self._parts.chat_template(None)
        if _renders_quickly(messages, tools) and not template.is_busy:
            prompt = template.render(messages, tools=tools, **template_options)
        else:
            # A long conversation, or a template that another one's rendering holds up, must not stop
            # the other tasks.
            prompt = await asyncio.to_thread(template.render, messages, tools=tools, **template_options)
        if "max_tokens" not in params.set_fields:
            params = params.replace(max_tokens=None)
        outputs = self.generate(prompt, params, request_id=request_id, kind=kind, add_special_tokens=False)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]

    def _params(self, given: SamplingParams | None) -> SamplingParams:
        if given is None:
            return SamplingParams().with_defaults(self._parts.generation_defaults)
        if not isinstance(given, SamplingParams):
            raise RequestError(
                f"sampling_params must be a SamplingParams, not {type(given).__name__}", "sampling_params"
            )
        return given

    async def stats(self, *, check_integrity: bool = False) -> EngineStats:
        """What the engine holds and has done, taken between two steps. Raises EngineDeadError.

        `check_integrity` also asserts that every slot and block is accounted for, for tests.
        """
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._engine_thread.send(_TakeStats(answer, check_integrity))
        return await answer

    @property
    def is_alive(self) -> bool:
        """False once the engine has stopped, whatever the reason."""
        return self._engine_thread.dead is None

    def shutdown(self) -> None:
        """Stop the engine and free its memory; open requests get an EngineDeadError. May be called twice."""
        self._engine_thread.shutdown()


def _reads_quickly(prompt: PromptInput, params: SamplingParams) -> bool:
    """True if tokenizing and checking takes no time that another task would notice."""
    if params.structured_outputs is not None:
        return False
    for item in [params.prediction, *(prompt.values() if isinstance(prompt, Mapping) else [prompt])]:
        limit = INLINE_CHARACTERS if isinstance(item, str) else INLINE_TOKEN_IDS
        if hasattr(item, "__len__") and not _is_scalar_array(item) and len(item) > limit:
            return False
    return True


def _renders_quickly(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> bool:
    """True for a short conversation of plain texts. Whatever else it may be is looked at in a thread."""
    if tools or not isinstance(messages, (list, tuple)):
        return False
    size = 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str):
            return False
        # What a template writes around a message counts as well.
        size += len(content) + CHARACTERS_AROUND_A_MESSAGE
    return size <= INLINE_CHARACTERS


def _is_scalar_array(item: Any) -> bool:
    return getattr(item, "ndim", 1) == 0  # these have a __len__ that raises


# ---------------------------------------------------------------------- between the threads


class _Mailbox:
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
class _Admit:
    """Serve a request; with no id of the caller's, make one up."""

    mailbox: _Mailbox
    request_id: str | None
    prepared: PreparedRequest
    arrival_time: float


@dataclass(slots=True)
class _Abort:
    mailbox: _Mailbox


@dataclass(slots=True)
class _TakeStats:
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


_Command: TypeAlias = "_Admit | _Abort | _TakeStats"


class _EngineThread:
    """The thread, and all that it shares. It knows nothing of the `AsyncLLM`, which can thus be collected."""

    def __init__(self, parts: EngineParts) -> None:
        self.dead: BaseException | None = None
        self.commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()  # None: stop
        self.mailboxes: dict[str, _Mailbox] = {}
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

    def send(self, command: _Command) -> None:
        """Queue a command. Raises EngineDeadError where one would wait for an answer."""
        with self._lock:
            if self.dead is None:
                self.commands.put(command)
            elif not isinstance(command, _Abort):
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
            if isinstance(command, _Admit):
                waiting.append(command.mailbox)
            elif isinstance(command, _TakeStats):
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

    def _obey(self, engine: Engine, command: _Command) -> None:
        """Whatever goes wrong with a command is its caller's alone."""
        if isinstance(command, _TakeStats):
            try:
                if command.check_integrity:
                    engine.scheduler.check_integrity()
                command.tell(engine.stats())
            except Exception as error:
                command.tell(error)
            return
        try:
            if isinstance(command, _Admit):
                self._admit(engine, command)
            else:
                self._abort(engine, command.mailbox)
        except OctavoError as error:
            command.mailbox.send(error)
        except Exception as error:
            logger.exception("a request failed on its way in or out; the others go on")
            command.mailbox.send(error)

    def _admit(self, engine: Engine, command: _Admit) -> None:
        name = command.request_id
        if name is None:
            name = next(free for free in map("auto-{}".format, self._ids) if free not in self.mailboxes)
        mailbox = command.mailbox
        engine.admit(name, command.prepared, mailbox.kind, arrival_time=command.arrival_time)
        mailbox.request_id = name
        self.mailboxes[name] = mailbox

    def _abort(self, engine: Engine, mailbox: _Mailbox) -> None:
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
