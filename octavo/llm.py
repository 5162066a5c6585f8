"""`LLM`: the offline facade. It has an engine; it is not one.

llm = LLM(model="smollm2")
for output in llm.generate(["Hello", "Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)
llm.shutdown()
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

from octavo import other_names
from octavo.config import EngineArgs
from octavo.engine.engine import Engine, failed_output
from octavo.engine.inputs import PromptInput, prompt_list
from octavo.engine.request_reader import PreparedRequest
from octavo.engine.request_state import OutputKind
from octavo.engine.setup import EngineParts, build_engine
from octavo.errors import EngineDeadError, NotInThisVersionError, RequestError
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tqdm import tqdm

Message = Mapping[str, Any]


class LLM:
    """A model, loaded and ready. Keyword arguments are the fields of `octavo.config.EngineArgs`.

    Raises ConfigError, ModelError or InsufficientMemoryError before anything large is allocated.
    Not thread-safe; use `octavo.AsyncLLM` to serve several callers.
    """

    def __init__(self, model: str = "smollm2", **engine_args: Any) -> None:
        args = EngineArgs.from_kwargs(model=model, **engine_args)
        self._parts: EngineParts | None = build_engine(args)
        self.model_path = str(self._parts.model_path)
        self._ids = itertools.count()
        self._sinks: dict[str, deque[RequestOutput]] = {}  # request id -> who waits for its outputs

    # ------------------------------------------------------------------ generate

    @overload
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        stream: Literal[False] = False,
        lora_request: str | None = None,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        stream: Literal[True],
        lora_request: str | None = None,
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        stream: bool = False,
        lora_request: str | None = None,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Complete one prompt or many; outputs come in the order of the prompts.

        prompts: a text, a list of token ids, `{"prompt": …}`, `{"prompt_token_ids": …}`, or a list
        of these. sampling_params: one for all, one a prompt, or None for the model's own defaults.
        stream=True yields a RequestOutput with everything so far whenever a prompt gets tokens.

        A single prompt that cannot be served raises RequestError. Among several, it becomes an
        output whose `error` says why, and the others are finished.
        """
        if lora_request is not None:
            raise NotInThisVersionError("LoRA (lora_request)")
        items, single = prompt_list(prompts)
        params = self._params_list(sampling_params, len(items))
        return self._run(items, params, single, stream, use_tqdm, add_special_tokens=True)

    def check_chat(self) -> None:
        """Raises the RequestError that every `chat` would end in, if there is one: no tokenizer, no chat
        template, or one that is not Jinja."""
        self._engine_parts().chat_template(None).check()

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer one conversation or many, through the model's chat template.

        messages: a list of {"role", "content"}, or a list of such lists. max_tokens, if it was not
        set, is the rest of the context. Returns and raises what `generate` does.
        """
        conversations: list[Any]
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
            raise RequestError(
                'messages must be a list of {"role": …, "content": …}, or a list of such lists, '
                f"not {type(messages).__name__}",
                "messages",
            )
        single = not messages or isinstance(messages[0], Mapping)
        conversations = [messages] if single else list(messages)
        params = self._params_list(sampling_params, len(conversations))
        params = [p if "max_tokens" in p.set_fields else p.replace(max_tokens=None) for p in params]
        template = self._engine_parts().chat_template(chat_template)
        prompts: list[PromptInput | RequestError] = []
        for conversation in conversations:
            try:
                prompts.append(
                    template.render(
                        conversation,
                        tools=tools,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=continue_final_message,
                        **(chat_template_kwargs or {}),
                    )
                )
            except RequestError as error:
                if single:
                    raise
                prompts.append(error)
        return self._run(prompts, params, single, stream, use_tqdm, add_special_tokens=False)

    def embed(self, texts: Any, **options: Any) -> Any:
        """Embeddings are not in this version."""
        raise NotInThisVersionError("embed")

    def score(self, *texts: Any, **options: Any) -> Any:
        """Scores are not in this version."""
        raise NotInThisVersionError("score")

    def rerank(self, *texts: Any, **options: Any) -> Any:
        """Reranking is not in this version."""
        raise NotInThisVersionError("rerank")

    if not TYPE_CHECKING:  # a type checker is to go on seeing what is there and what is not

        def __getattr__(self, name: str) -> NoReturn:
            """Called for what is not there: also says what to do where another engine's LLM has it."""
            advice = other_names.METHODS_ADVICE.get(name)
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message if advice is None else f"{message}: {advice}")

    # ------------------------------------------------------------------ life

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """What the model's generation_config.json says of sampling, under its own names.

        `SamplingParams(…).with_defaults(llm.generation_defaults)` fills in what was left open.
        """
        return self._engine_parts().generation_defaults

    def shutdown(self) -> None:
        """Stop the engine and free its memory. May be called twice."""
        if self._parts is not None:
            parts, self._parts = self._parts, None
            parts.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ------------------------------------------------------------------ inside

    def _engine_parts(self) -> EngineParts:
        if self._parts is None:
            raise EngineDeadError("this LLM was shut down; make a new one")
        return self._parts

    def _params_list(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            return [SamplingParams().with_defaults(self._engine_parts().generation_defaults)] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        found: Any = given
        is_list = isinstance(found, Sequence) and not isinstance(found, str)
        if not is_list or not all(isinstance(p, SamplingParams) for p in found):
            raise RequestError(
                "sampling_params must be a SamplingParams or a list of them, such as "
                f"SamplingParams(temperature=0, max_tokens=64); not {type(found).__name__}",
                "sampling_params",
            )
        if len(given) != count:
            raise RequestError(
                f"{len(given)} sampling_params for {count} prompts; give one, or one a prompt",
                "sampling_params",
            )
        return list(given)

    def _run(
        self,
        prompts: Sequence[PromptInput | RequestError],
        params: list[SamplingParams],
        single: bool,
        stream: bool,
        use_tqdm: bool,
        *,
        add_special_tokens: bool,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        engine = self._engine_parts().engine

        def read() -> Iterator[PreparedRequest | RequestOutput]:
            for prompt, one in zip(prompts, params, strict=True):
                try:
                    if isinstance(prompt, RequestError):
                        raise prompt
                    if stream and one.best_of is not None:
                        raise RequestError(
                            "best_of cannot stream: which answers are best is known at the end"
                        )
                    yield engine.read_request(prompt, one, add_special_tokens=add_special_tokens)
                except RequestError as error:
                    if single:
                        raise
                    shown: PromptInput = "" if isinstance(prompt, RequestError) else prompt
                    yield failed_output(str(next(self._ids)), shown, error)

        if stream:
            return self._drive(list(read()), "cumulative", None)
        # Who has a greater priority may stand last: then all are read before the first step.
        is_ordered = len({one.priority for one in params}) <= 1
        done: list[RequestOutput | None] = [None] * len(prompts)
        bar = _progress_bar(len(prompts)) if use_tqdm and prompts else None
        for _ in self._drive(read() if is_ordered else list(read()), "final", bar, done):
            pass
        return [output for output in done if output is not None]

    def _drive(
        self,
        work: Iterable[PreparedRequest | RequestOutput],
        kind: OutputKind,
        bar: tqdm[Any] | None,
        done: list[RequestOutput | None] | None = None,
    ) -> Iterator[RequestOutput]:
        """Admit the requests, step until all have ended, yield what comes; what is abandoned is aborted.

        Where nothing is asked for before the end, the steps begin as soon as the prompts read so far fill
        one: a thousand texts to be tokenized do not keep the device waiting.

        Several of these may be open at once and step the engine in turn: every output goes to the one
        that its request belongs to.
        """
        engine = self._engine_parts().engine
        mine: deque[RequestOutput] = deque()
        order: dict[str, int] = {}
        num_tokens = 0
        started, unseen = time.monotonic(), 0  # unseen: prompt rows admitted since the last step
        try:
            for index, item in enumerate(work):
                if isinstance(item, RequestOutput):
                    order[item.request_id] = index
                    mine.append(item)
                    continue
                request_id = str(next(self._ids))
                engine.admit(request_id, item, kind, arrival_time=started)
                order[request_id] = index
                self._sinks[request_id] = mine
                if done is not None:
                    unseen += engine.rows_to_come(request_id)
                    if unseen >= engine.scheduler.config.max_num_batched_tokens:
                        unseen = 0
                        self._step(engine)
            while order:
                if not mine:
                    self._step(engine)
                    continue
                output = mine.popleft()
                if output.finished:
                    index = order.pop(output.request_id)
                    self._sinks.pop(output.request_id, None)
                    if done is not None:
                        done[index] = output
                    if bar is not None:
                        num_tokens += sum(len(o.token_ids) for o in output.outputs)
                        bar.update(1)
                        bar.set_postfix_str(f"{num_tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
                yield output
        finally:
            for request_id in order:
                self._sinks.pop(request_id, None)
                engine.abort(request_id)
            # The last steps may hold what has just ended: read them, so that nothing stays behind.
            while engine.num_unfinished == 0 and engine.has_work():
                engine.step()
            if bar is not None:
                bar.close()

    def _step(self, engine: Engine) -> None:
        """One step; its outputs go to whoever waits for them. Ctrl-C waits for its end."""
        with _interrupt_later():
            outputs = engine.step()
        if not outputs and not engine.has_work():
            raise EngineDeadError(
                "the engine has nothing to do, and a request has not ended; please report it"
            )
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is not None:
                sink.append(output)


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """A Ctrl-C inside raises KeyboardInterrupt at the end, so that no step is torn in the middle.

    Only in the main thread, and only where Python's own handler is in place.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def _progress_bar(total: int) -> tqdm[Any]:
    from tqdm import tqdm

    return tqdm(total=total, desc="generate", unit="req", dynamic_ncols=True)
