"""Answers of /v1/completions: prompts continued, several in one request, with echo and log-probabilities.

Choices are numbered prompt by prompt: with n answers a prompt, answer k of prompt i is choice i·n + k.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import RequestError
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.chat import new_id, warning_headers
from octavo.server.chat_plan import INLINE_CHARACTERS, truncated
from octavo.server.logprobs import CompletionLogprobs, TokenNames, joined, prompt_logprobs
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.generation import make_params
from octavo.server.state import ServedModel, ServerState, need_tokenizer
from octavo.server.streaming import (
    DONE,
    FIRST_OUTPUT_SECONDS,
    WAITING,
    EventStream,
    OutputReader,
    check_answer,
    chunk_frame,
    json_response,
    unless_gone,
)
from octavo.server.usage import UsageCounter


@dataclass(frozen=True)
class PromptPlan:
    """One prompt, ready for the engine."""

    text: str | None  # None where token ids were given and nobody asked for their text
    token_ids: list[int]


@dataclass(frozen=True)
class CompletionPlan:
    """A completion request, ready for the engine."""

    request: CompletionRequest
    model: ServedModel
    prompts: list[PromptPlan]
    params: SamplingParams
    hidden: frozenset[int]  # special tokens that texts do not show
    warnings: tuple[str, ...]


async def serve_completion(state: ServerState, http: Request, request: CompletionRequest) -> Response:
    """Answer one completion request. Raises OctavoError, and ClientGone."""
    arrival_time = time.monotonic()
    plan = await plan_completion(state, request)
    answer = CompletionAnswer(plan)
    outputs = [
        state.client.generate(
            prompt.token_ids,
            plan.params,
            request_id=answer.id,
            arrival_time=arrival_time,
            kind="delta" if request.streams else "final",
            prompt=prompt.text,
        )
        for prompt in plan.prompts
    ]
    reader = OutputReader(outputs)
    headers = warning_headers(plan.warnings)
    if request.streams:
        await unless_gone(http, reader.begin(FIRST_OUTPUT_SECONDS))
        return EventStream(answer.stream(reader), reader, headers)
    return json_response(await unless_gone(http, answer.whole(reader)), headers)


async def plan_completion(state: ServerState, request: CompletionRequest) -> CompletionPlan:
    """Check and tokenize, beside the event loop where it may take its time. Raises OctavoError."""
    prompt = request.prompt
    if isinstance(prompt, str) and len(prompt) <= INLINE_CHARACTERS:
        return make_plan(state, request)
    return await asyncio.to_thread(make_plan, state, request)


def make_plan(state: ServerState, request: CompletionRequest) -> CompletionPlan:
    """`plan_completion` in the calling thread."""
    settings = state.settings
    model = state.model(request.model)
    warnings = request.check(settings)
    given = request.sampling_kwargs()
    form = request.structured(settings)
    if form is not None:
        given["structured_outputs"] = form
    given |= request.prediction_kwargs(model.info.speculative_method, warnings)
    params = make_params(given, model.info.generation_defaults)
    hidden: frozenset[int] = frozenset()
    if params.skip_special_tokens and model.tokenizer is not None:
        hidden = model.tokenizer.special_ids
    return CompletionPlan(request, model, _prompts(model, request, params), params, hidden, tuple(warnings))


def _prompts(model: ServedModel, request: CompletionRequest, params: SamplingParams) -> list[PromptPlan]:
    prompts: list[PromptPlan] = []
    for number, given in enumerate(request.prompts):
        where = "prompt" if len(request.prompts) == 1 else f"prompt[{number}]"
        text: str | None = None
        if isinstance(given, str):
            tokenizer = need_tokenizer(model, "a text prompt")
            text = given
            token_ids = tokenizer.encode(given, add_special_tokens=request.add_special_tokens is not False)
        else:
            token_ids = given
        whole = len(token_ids)
        token_ids = truncated(token_ids, request.truncate_prompt_tokens, model, params.max_tokens)
        # Checked here as well as by the engine, so that the message says which prompt it is.
        if not token_ids:
            raise RequestError(f"{where} is empty; it needs at least one token", "prompt")
        wrong = next((i for i in token_ids if not 0 <= i < model.info.vocab_size), None)
        if wrong is not None:
            allowed = f"0 … {model.info.vocab_size - 1}"
            raise RequestError(
                f"{where} holds {wrong}, which is no token id of this model ({allowed})", "prompt"
            )
        if request.echo and (text is None or len(token_ids) < whole):
            tokenizer = need_tokenizer(model, "echo")
            text = tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)
        prompts.append(PromptPlan(text, token_ids))
    return prompts


@dataclass(slots=True)
class _Choice:
    """One of the answers to a request."""

    logprobs: CompletionLogprobs
    begun: bool = False
    finished: bool = False


class CompletionAnswer:
    """Writes the answer of one plan, whole or as a stream."""

    def __init__(self, plan: CompletionPlan) -> None:
        self.id = new_id("cmpl")
        self._plan = plan
        self._created = int(time.time())
        request = plan.request
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in plan.prompts)
        self._usage = UsageCounter(num_prompt_tokens, has_prediction="prediction" in plan.params.set_fields)
        self._names = TokenNames(plan.model.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self._choices = [
            _Choice(CompletionLogprobs(self._names)) for _ in range(len(plan.prompts) * plan.params.n)
        ]

    # ------------------------------------------------------------------ whole

    async def whole(self, reader: OutputReader) -> dict[str, Any]:
        """The body of an answer that does not stream."""
        outputs: dict[int, RequestOutput] = {}
        try:
            async for item in reader.stream():
                assert item is not None
                outputs[item[0]] = item[1]
        finally:
            await reader.close()
        choices = []
        for number in range(len(self._plan.prompts)):
            output = outputs[number]
            self._note(output)
            choices += [self._choice(number, answer, output) for answer in output.outputs]
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._plan.model.name,
            "choices": choices,
            "usage": self._usage.usage(),
            "system_fingerprint": None,
        }

    def _choice(self, number: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        check_answer(answer)
        told = self._told(number, answer, output)
        told["finish_reason"] = answer.finish_reason or "stop"
        told["stop_reason"] = answer.stop_reason
        return told

    # ------------------------------------------------------------------ a stream

    async def stream(self, reader: OutputReader) -> AsyncGenerator[bytes, None]:
        """The events of a stream, several in one where they come together."""
        request = self._plan.request
        begin, end = chunk_frame(
            self.id, "text_completion", self._created, self._plan.model.name, request.includes_usage
        )
        is_plain = not (request.echo or request.return_token_ids or request.prompt_logprobs is not None)
        is_plain = is_plain and request.logprobs is None and not request.only_prompt
        async for item in reader.stream():
            if item is None:
                yield WAITING
                continue
            number, output = item
            self._note(output)
            if request.has_continuous_usage:
                end = f',"usage":{json.dumps(self._usage.counts())}}}\n\n'
            events: list[str] = []
            for answer in output.outputs:
                index = number * self._plan.params.n + answer.index
                choice = self._choices[index]
                reason = answer.finish_reason
                if choice.finished or not (answer.token_ids or answer.text or reason):
                    continue
                if reason is None and is_plain:  # one token of plain text, most of the time
                    if answer.text:
                        text = json.dumps(answer.text)
                        plain = f'"index":{index},"text":{text},"logprobs":null,"finish_reason":null'
                        events.append(f"{begin}{{{plain}}}]{end}")
                    continue
                if reason is not None:
                    check_answer(answer)
                    choice.finished = True
                told = self._told(number, answer, output)
                told["finish_reason"] = reason
                if reason is not None:
                    told["stop_reason"] = answer.stop_reason
                events.append(f"{begin}{json.dumps(told, separators=(',', ':'))}]{end}")
            if events:
                yield "".join(events).encode()
        if request.includes_usage:
            yield f'{begin}],"usage":{json.dumps(self._usage.usage(), separators=(",", ":"))}}}\n\n'.encode()
        yield DONE

    # ------------------------------------------------------------------ both

    def _note(self, output: RequestOutput) -> None:
        self._usage.note(output)
        if self._plan.request.only_prompt:
            self._usage.num_output_tokens = 0

    def _told(self, number: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        """What an output says of one choice, but for its end."""
        request, prompt = self._plan.request, self._plan.prompts[number]
        index = number * self._plan.params.n + answer.index
        choice = self._choices[index]
        is_first, choice.begun = not choice.begun, True
        text, token_ids, found = answer.text, answer.token_ids, answer.logprobs
        if request.only_prompt:
            text, token_ids, found = "", [], None if found is None else []
        logprobs: list[dict[str, Any]] = []
        if is_first and request.echo:
            assert prompt.text is not None
            text = prompt.text + text
            if request.logprobs is not None and output.prompt_logprobs is not None:
                entries = output.prompt_logprobs
                logprobs.append(choice.logprobs.add(prompt.token_ids, entries, self._plan.hidden))
                choice.logprobs.skip_to(len(prompt.text))
        if found is not None:
            logprobs.append(choice.logprobs.add(token_ids, found, self._plan.hidden))
        told: dict[str, Any] = {"index": index, "text": text, "logprobs": joined(logprobs) or None}
        if request.return_token_ids:
            told["token_ids"] = token_ids
            if is_first:
                told["prompt_token_ids"] = prompt.token_ids
        if is_first and request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            shown = prompt_logprobs(self._names, output.prompt_logprobs, request.prompt_logprobs)
            told["prompt_logprobs"] = shown
        return told
