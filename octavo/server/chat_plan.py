"""From a chat request to what the engine is asked and how its text will be read.

All of this is decided before the engine sees the request: the prompt's tokens, legal sampling
parameters, and a reader for each answer. Rendering and tokenizing a long conversation takes its time,
so it is done beside the event loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams
from octavo.server.answer.reader import AnswerReader
from octavo.server.answer.reasoning import BEGIN, END, ThinkSplitter
from octavo.server.answer.tool_formats import HERMES, ToolFormat
from octavo.server.answer.tool_parsers import ArgumentsParser, MistralParser, PlainParser, ToolParser
from octavo.server.answer.tool_prompt import uses_tools, with_tools_as_text
from octavo.server.protocol.chat import ChatRequest, template_messages
from octavo.server.protocol.generation import make_params
from octavo.server.state import ServedModel, ServerState, need_tokenizer
from octavo.server.tool_use import ToolUse, read_tools

INLINE_CHARACTERS = 1000  # a shorter conversation is rendered faster than a thread is woken
_CHARACTERS_AROUND_A_MESSAGE = 50
# Names that rendering a template has arguments of its own for.
_OWN_VARIABLES = ("self", "messages", "tools", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class ChatPlan:
    """A chat request, ready for the engine."""

    request: ChatRequest
    model: ServedModel
    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    tools: ToolUse
    tool_format: ToolFormat | None  # how calls will be written; None: they are not looked for
    dropped: tuple[str, ...]  # special tokens that the engine shows and the answer must not
    reasoning: bool | None  # None: not split off; otherwise whether the answer begins inside of it
    echoed: str  # text that the answer begins with, from the request's `echo`
    warnings: tuple[str, ...]

    def reader(self) -> AnswerReader | None:
        """A reader for one answer; None if all of its text is content."""
        parser = self._tool_parser()
        if parser is None and self.reasoning is None:
            return None
        splitter = None if self.reasoning is None else ThinkSplitter(begins_inside=self.reasoning)
        return AnswerReader(splitter, parser, max_calls=None if self.tools.parallel else 1)

    def _tool_parser(self) -> ToolParser | None:
        if self.tools.mode == "named":
            assert self.tools.name is not None
            return ArgumentsParser(self.tools.name)
        if self.tools.mode == "required":
            return MistralParser(begins_with_list=True)
        if self.tool_format is not None:
            return self.tool_format.make(self.tools.names, self.dropped)
        return PlainParser(self.dropped) if self.dropped else None


async def plan_chat(state: ServerState, request: ChatRequest) -> ChatPlan:
    """Check, render and tokenize. Raises RequestError, ModelUnknownError."""
    template = state.served.template
    is_short = _size(request) <= INLINE_CHARACTERS and not request.tools
    if is_short and template is not None and not template.is_busy:
        return make_plan(state, request)
    return await asyncio.to_thread(make_plan, state, request)


def make_plan(state: ServerState, request: ChatRequest) -> ChatPlan:
    """`plan_chat` in the calling thread."""
    settings = state.settings
    model = state.model(request.model)
    tokenizer = need_tokenizer(model, "chat")
    warnings = request.check(settings)
    tools = read_tools(request.tools, request.tool_choice, request.parallel_tool_calls, settings)
    warnings += tools.warnings
    form, enforced = request.structured(settings), tools.schema()
    if form is not None and enforced is not None:
        raise RequestError(
            f"tool_choice {tools.mode!r} holds the answer to a call and response_format to another form; "
            "drop one of them",
            "tool_choice",
        )
    if form is not None and tools.mode == "auto":
        warnings.append("tools: cannot be called while the answer is held to a form")
        tools = ToolUse()
    messages = template_messages(request.messages)
    shown_tools = tools.for_template()
    if not model.knows_tools and (shown_tools or uses_tools(messages)):
        warnings.append("tools: the chat template knows none; they are described in the system message")
        messages, shown_tools = with_tools_as_text(messages, shown_tools), None
    prompt = _render(model, request, messages, shown_tools, warnings)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=bool(request.add_special_tokens))
    given = request.sampling_kwargs()
    if enforced is not None:
        form = {"json": enforced}
    if form is not None:
        given["structured_outputs"] = form
    given |= request.prediction_kwargs(model.info.speculative_method, warnings)
    prompt_ids = truncated(prompt_ids, request.truncate_prompt_tokens, model, given.get("max_tokens"))
    params = make_params(given, model.info.generation_defaults)
    if "max_tokens" not in given and "max_new_tokens" not in model.info.generation_defaults:
        params = params.replace(max_tokens=None)
    tool_format = None
    if tools.mode == "auto":
        tool_format = _format(model)
    reasoning = _reasoning(model, prompt) if form is None else None
    marks = (tool_format.marks if tool_format is not None else ()) + (
        (BEGIN, END) if reasoning is not None else ()
    )
    dropped: tuple[str, ...] = ()
    if params.skip_special_tokens:
        special = [tokenizer.id_to_token(i) or "" for i in tokenizer.special_ids]
        if any(mark in special for mark in marks):
            # The engine must not hide what the answer is read by; what else it shows then is taken out here.
            params = params.replace(skip_special_tokens=False)
            dropped = tuple(name for name in special if name and name not in marks)
    echoed = ""
    if request.echo and messages[-1]["role"] == "assistant":
        echoed = _text(messages[-1].get("content"))
    return ChatPlan(
        request,
        model,
        prompt,
        prompt_ids,
        params,
        tools,
        tool_format,
        dropped,
        reasoning,
        echoed,
        tuple(warnings),
    )


def truncated(
    prompt_ids: list[int], wanted: int | None, model: ServedModel, max_tokens: int | None
) -> list[int]:
    """The last `wanted` tokens of a prompt; -1: as many as leave room for the answer."""
    if wanted is None:
        return prompt_ids
    if wanted < -1 or wanted == 0:
        raise RequestError(
            f"truncate_prompt_tokens must be at least 1, or -1, not {wanted}", "truncate_prompt_tokens"
        )
    if wanted == -1:
        wanted = max(1, model.info.max_model_len - (max_tokens or 1))
    return prompt_ids[-wanted:]


def _render(
    model: ServedModel,
    request: ChatRequest,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    warnings: list[str],
) -> str:
    variables = dict(request.chat_template_kwargs or {})
    for name in _OWN_VARIABLES:
        if name in variables:
            raise RequestError(f"chat_template_kwargs cannot hold {name!r}", "chat_template_kwargs")
    if request.documents is not None:
        variables["documents"] = request.documents
    _add_template_option(model, variables, "verbosity", request.verbosity, warnings)
    effort = request.reasoning_effort
    if effort == "none" and "enable_thinking" in model.template_text:
        variables.setdefault("enable_thinking", False)
    else:
        _add_template_option(model, variables, "reasoning_effort", effort, warnings)
    if request.include_reasoning is False and not model.writes_reasoning:
        warnings.append("include_reasoning: this model marks no reasoning")
    assert model.template is not None
    add_generation_prompt = request.add_generation_prompt
    if add_generation_prompt is None:
        add_generation_prompt = not request.continue_final_message
    return model.template.render(
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        **variables,
    )


def _add_template_option(
    model: ServedModel, variables: dict[str, Any], name: str, value: str | None, warnings: list[str]
) -> None:
    """Give the template a variable that it reads, or say that it does not."""
    if value is None:
        return
    if name in model.template_text:
        variables.setdefault(name, value)
    else:
        warnings.append(f"{name}: the chat template does not know it")


def _format(model: ServedModel) -> ToolFormat:
    if not model.knows_tools:
        return HERMES  # what the system message asks for
    if model.tool_format is None:
        raise RequestError(
            "this model's chat template does not show in which format it writes tool calls; start the server "
            "with --tool-parser, or use tool_choice required or a named function",
            "tools",
        )
    return model.tool_format


def _reasoning(model: ServedModel, prompt: str) -> bool | None:
    """Whether the answer begins inside of reasoning; None if there is none to be split off."""
    if not model.writes_reasoning:
        return None
    end = prompt.rstrip()
    if end.endswith(END):
        return None  # the template has closed it: the model is not to think
    return end.endswith(BEGIN)


def _size(request: ChatRequest) -> int:
    size = 0
    for message in request.messages:
        size += _CHARACTERS_AROUND_A_MESSAGE + len(_text(message.content))
    return size


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join((part.get("text") if isinstance(part, dict) else part.text) or "" for part in content)
    return content or ""
