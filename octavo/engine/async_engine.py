"""`AsyncLLM`: one engine for many asyncio tasks.

The engine runs in a thread of its own. Callers hand it commands through a queue and get outputs
through `loop.call_soon_threadsafe`. A caller that goes away (its task is cancelled, or it stops
iterating) aborts its request: the engine forgets it within two steps.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.config import EngineArgs
from octavo.engine.inputs import PromptInput
from octavo.engine.request_state import OutputKind
from octavo.engine.setup import EngineParts, build_engine
from octavo.errors import EngineDeadError, NotInThisVersionError, OctavoError
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

Command = Callable[[], None]


@dataclass(slots=True)
class _Listener:
    """Where a request's outputs go."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[RequestOutput | BaseException]

    def send(self, item: RequestOutput | BaseException) -> None:
        try:
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)
        except RuntimeError:  # the loop was closed: nobody listens any more
            return


class AsyncLLM:
    """A model, loaded and ready, for asyncio. Keyword arguments as for `LLM`."""

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
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        self._ids = itertools.count()
        self._dead: BaseException | None = None
        self._lock = threading.Lock()  # guards _dead against commands that come too late
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._thread.start()

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

        Closing the iterator, or cancelling the task that awaits it, aborts the request.
        Raises RequestError for a request that cannot be served, EngineDeadError if the engine died.
        """
        if lora_request is not None:
            raise NotInThisVersionError("LoRA (lora_request)")
        params = sampling_params
        if params is None:
            params = SamplingParams().with_defaults(self._parts.generation_defaults)
        name = f"{next(self._ids)}" if request_id is None else request_id
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue())
        self._send(lambda: self._add(name, prompt, params, kind, add_special_tokens, listener), listener)
        finished = False
        try:
            while not finished:
                item = await listener.outputs.get()
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._send(lambda: self._abort(name, listener), None)

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
        prompt = self._parts.chat_template(None).render(messages, tools=tools, **template_options)
        params = sampling_params
        if params is None:
            params = SamplingParams().with_defaults(self._parts.generation_defaults)
        if "max_tokens" not in params.set_fields:
            params = params.replace(max_tokens=None)
        outputs = self.generate(prompt, params, request_id=request_id, kind=kind, add_special_tokens=False)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]

    @property
    def is_alive(self) -> bool:
        """False once the engine has stopped, whatever the reason."""
        return self._dead is None

    def shutdown(self) -> None:
        """Stop the engine and free its memory; open requests get an EngineDeadError."""
        self._commands.put(None)
        self._thread.join()
        self._parts.close()

    # ------------------------------------------------------------------ the engine's thread

    def _send(self, command: Command, listener: _Listener | None) -> None:
        with self._lock:
            if self._dead is None:
                self._commands.put(command)
                return
        if listener is not None:
            raise EngineDeadError(f"the engine has stopped: {self._dead}") from self._dead

    def _add(
        self,
        request_id: str,
        prompt: PromptInput,
        params: SamplingParams,
        kind: OutputKind,
        add_special_tokens: bool,
        listener: _Listener,
    ) -> None:
        try:
            self._parts.engine.add_request(
                request_id, prompt, params, kind, add_special_tokens=add_special_tokens
            )
        except OctavoError as error:
            listener.send(error)
            return
        self._listeners[request_id] = listener

    def _abort(self, request_id: str, listener: _Listener) -> None:
        if self._listeners.get(request_id) is listener:
            del self._listeners[request_id]
            self._parts.engine.abort(request_id)

    def _run(self) -> None:
        engine = self._parts.engine
        cause: BaseException = EngineDeadError("the engine was shut down")
        try:
            while True:
                # Idle: wait for a command. Busy: take what is there and go on.
                while not self._commands.empty() or not engine.has_work():
                    command = self._commands.get()
                    if command is None:
                        return
                    command()
                for output in engine.step():
                    self._deliver(output)
        except BaseException as error:  # every open request must hear of it
            cause = error
        finally:
            with self._lock:
                self._dead = cause
            while not self._commands.empty():  # adds that came in before the lock
                command = self._commands.get()
                if command is not None:
                    command()
            for listener in self._listeners.values():
                listener.send(EngineDeadError(f"the engine has stopped: {cause}"))
            self._listeners.clear()

    def _deliver(self, output: RequestOutput) -> None:
        listener = self._listeners.get(output.request_id)
        if listener is None:
            return
        if output.finished:
            del self._listeners[output.request_id]
        listener.send(output)
