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
import time
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, get_args

from octavo.config import EngineArgs
from octavo.engine.engine_stats import EngineStats
from octavo.engine.engine_thread import Abort, Admit, EngineThread, Mailbox, TakeStats
from octavo.engine.inputs import PromptInput
from octavo.engine.request_state import OutputKind
from octavo.engine.setup import EngineParts, build_engine
from octavo.errors import NotInThisVersionError, RequestError
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

# Reading a request up to this length takes well under a millisecond, less than a change of threads
# is worth; what is longer, or has a grammar, is read beside the event loop.
INLINE_CHARACTERS = 1000
INLINE_TOKEN_IDS = 10_000
CHARACTERS_AROUND_A_MESSAGE = 50


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
        self._engine_thread = EngineThread(parts)
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
        mailbox = Mailbox(asyncio.get_running_loop(), kind)
        self._engine_thread.send(Admit(mailbox, request_id, prepared, arrival_time))
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
                self._engine_thread.send(Abort(mailbox))

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
        self._engine_thread.send(TakeStats(answer, check_integrity))
        return await answer

    @property
    def is_alive(self) -> bool:
        """False once the engine has stopped, whatever the reason."""
        return self._engine_thread.dead is None

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)  # may wait for the end of a step

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
