"""`LLM`: the offline facade. It has an engine; it is not one.

llm = LLM(model="smollm2")
for output in llm.generate(["Hello", "Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)
llm.shutdown()
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from octavo.config import EngineArgs
from octavo.engine.engine import failed_output
from octavo.engine.inputs import PromptInput, prompt_list
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

    # ------------------------------------------------------------------ life

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
        if isinstance(given, (str, Mapping)) or not all(isinstance(p, SamplingParams) for p in given):
            raise RequestError(
                "sampling_params must be a SamplingParams or a list of them", "sampling_params"
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
        kind: OutputKind = "cumulative" if stream else "final"
        order: dict[str, int] = {}
        done: list[RequestOutput | None] = [None] * len(prompts)
        engine = self._engine_parts().engine
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            request_id = str(next(self._ids))
            try:
                if isinstance(prompt, RequestError):
                    raise prompt
                engine.add_request(request_id, prompt, one, kind, add_special_tokens=add_special_tokens)
                order[request_id] = index
            except RequestError as error:
                if single:
                    raise
                shown: PromptInput = "" if isinstance(prompt, RequestError) else prompt
                done[index] = failed_output(request_id, shown, error)
        outputs = self._drive(order, done, use_tqdm and not stream)
        if stream:
            return outputs
        for _ in outputs:
            pass
        return [output for output in done if output is not None]

    def _drive(
        self, order: dict[str, int], done: list[RequestOutput | None], use_tqdm: bool
    ) -> Iterator[RequestOutput]:
        """Step until all requests of this call have ended; what is abandoned is aborted."""
        engine = self._engine_parts().engine
        bar = _progress_bar(len(done)) if use_tqdm and done else None
        unfinished = set(order)
        num_tokens = 0
        try:
            yield from [output for output in done if output is not None]
            if bar is not None:
                bar.update(len(done) - len(unfinished))
            while unfinished:
                for output in engine.step():
                    if output.request_id not in unfinished:
                        continue
                    if output.finished:
                        unfinished.discard(output.request_id)
                        done[order[output.request_id]] = output
                        if bar is not None:
                            num_tokens += sum(len(o.token_ids) for o in output.outputs)
                            bar.update(1)
                            bar.set_postfix_str(f"{num_tokens / bar.format_dict['elapsed']:.0f} tok/s")
                    yield output
        finally:
            for request_id in unfinished:
                engine.abort(request_id)
            # The last steps may hold what has just ended: read them, so that nothing stays behind.
            while engine.num_unfinished == 0 and engine.has_work():
                engine.step()
            if bar is not None:
                bar.close()


def _progress_bar(total: int) -> tqdm[Any]:
    from tqdm import tqdm

    return tqdm(total=total, desc="generate", unit="req", dynamic_ncols=True)
