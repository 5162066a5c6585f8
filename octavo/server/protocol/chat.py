"""The request of /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from octavo.errors import RequestError
from octavo.server.protocol.base import ApiModel, Whole
from octavo.server.protocol.generation import COMMON_IGNORED, COMMON_REFUSED, GenerationRequest
from octavo.server.settings import ServeSettings


class ContentPart(ApiModel):
    """A part of a message. Only text can be read here."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(ApiModel):
    """What an earlier answer called."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(ApiModel):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(ApiModel):
    """One message. Keys beyond these go to the chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class Function(ApiModel):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ApiModel):
    """A tool. Only functions can be called here."""

    type: str
    function: Function | None = None


class NamedFunction(ApiModel):
    """The function that must be called."""

    name: str


class AllowedTools(ApiModel):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


class ToolChoice(ApiModel):
    """A function that must be called, or the tools among which to choose."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class ChatRequest(GenerationRequest):
    """A conversation to be answered."""

    IGNORED: ClassVar = {
        **COMMON_IGNORED,
        "store": "nothing is stored",
        "safety_identifier": "not used",
        "prompt_cache_key": "prompts that begin alike share their cache anyway; cache_salt parts them",
        "prompt_cache_retention": "the cache keeps what fits",
        "prompt_cache_options": "the cache keeps what fits",
    }
    REFUSED: ClassVar = {
        **COMMON_REFUSED,
        "audio": "this server writes text only",
        "web_search_options": "there is no web search",
        "functions": "is OpenAI's old spelling; use tools",
        "function_call": "is OpenAI's old spelling; use tool_choice",
        "moderation": "there is no moderation",
        "chat_template": "a template is a program and is not taken from requests; start the server with one",
    }

    messages: list[ChatMessage]
    max_completion_tokens: Whole | None = Field(
        None, description="as max_tokens; default: the rest of the context"
    )
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    metadata: dict[str, str] | None = Field(default=None, description="returned with the answer")
    reasoning_effort: str | None = Field(
        default=None, description="given to the chat template, where it knows it"
    )
    verbosity: str | None = Field(default=None, description="given to the chat template, where it knows it")
    include_reasoning: bool | None = Field(
        default=None, description="false: leave the reasoning out of the answer"
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = Field(default=None, description="given to the chat template")

    def check(self, settings: ServeSettings) -> list[str]:
        """See GenerationRequest."""
        warnings = super().check(settings)
        if not self.messages:
            raise RequestError("messages must hold at least one message", "messages")
        if self.modalities and self.modalities != ["text"]:
            raise RequestError("modalities: this server writes text only", "modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= settings.max_logprobs:
            raise RequestError(
                f"top_logprobs must be from 0 to {settings.max_logprobs}, not {self.top_logprobs}",
                "top_logprobs",
            )
        if (
            self.max_tokens is not None
            and self.max_completion_tokens is not None
            and self.max_tokens != self.max_completion_tokens
        ):
            raise RequestError("max_tokens and max_completion_tokens differ; give one", "max_tokens")
        return warnings

    def sampling_kwargs(self) -> dict[str, Any]:
        """See GenerationRequest. max_tokens is left open where the request leaves it open."""
        given = super().sampling_kwargs()
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if limit is not None:
            if limit < 1:
                name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
                raise RequestError(f"{name} must be at least 1, not {limit}", name)
            given["max_tokens"] = limit
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates expect them. Raises RequestError for what is not text.

    A developer message is a system message. The arguments of earlier calls become objects, since
    templates write them out as JSON. An assistant message without a text has the text "".
    """
    result = []
    for index, message in enumerate(messages):
        plain = message.model_dump(exclude_none=True)
        plain["role"] = "system" if message.role == "developer" else message.role
        if message.content is None:
            if not message.tool_calls:
                if message.role != "assistant":
                    raise RequestError(f"messages[{index}] has no content", f"messages[{index}].content")
                plain["content"] = message.refusal or ""
        elif not isinstance(message.content, str):
            plain["content"] = [
                {"type": "text", "text": _part_text(part, f"messages[{index}].content[{number}]")}
                for number, part in enumerate(message.content)
            ]
        reasoning = plain.pop("reasoning", None)
        if reasoning is not None:
            plain.setdefault("reasoning_content", reasoning)
        plain.pop("tool_calls", None)
        if message.tool_calls:
            plain["tool_calls"] = [_template_call(call) for call in message.tool_calls]
        result.append(plain)
    return result


def _part_text(part: ContentPart, where: str) -> str:
    text = part.text if part.type == "text" else part.refusal if part.type == "refusal" else None
    if text is None:
        kind = "has no text" if part.type in ("text", "refusal") else "is of a type this server cannot read"
        raise RequestError(f"{where} {kind}; content is a text, or parts of type text", where)
    return text


def _template_call(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            arguments = parsed
    function = {
        **call.function.model_dump(exclude_none=True),
        "arguments": {} if arguments is None else arguments,
    }
    plain: dict[str, Any] = {"type": "function", "function": function}
    return plain if call.id is None else {"id": call.id, **plain}
