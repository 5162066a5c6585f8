"""The request of /v1/responses, which becomes a chat request.

The route is stateless: the whole conversation comes with each request, and nothing is stored. What
OpenAI keeps on its side (`previous_response_id`, conversations, stored prompts, background work) is
refused, and so are tools that OpenAI runs itself.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from octavo.errors import RequestError
from octavo.server.protocol.base import ApiModel, ApiRequest, Whole
from octavo.server.protocol.chat import ChatRequest
from octavo.server.settings import ServeSettings

_LOGPROBS = "message.output_text.logprobs"
_STATELESS = "this server keeps nothing between requests; send the whole conversation as input"
# What goes to the chat request under its own name.
_SAME_FIELDS = (
    "model", "stream", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop", "min_tokens", "ignore_eos", "parallel_tool_calls", "prediction",
    "num_speculative_tokens", "cache_salt", "priority", "chat_template_kwargs",
)  # fmt: skip


class TextOptions(ApiModel):
    """What form the text must have."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(ApiModel):
    """How hard to think, for templates that know it."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(ApiRequest):
    """An input to be answered."""

    IGNORED: ClassVar = {
        "user": "not used",
        "safety_identifier": "not used",
        "service_tier": "there is one tier",
        "prompt_cache_key": "prompts that begin alike share their cache without it",
        "prompt_cache_retention": "the cache keeps what fits",
        "prompt_cache_options": "the cache keeps what fits",
        "max_tool_calls": "counts tools that the server runs, of which there are none",
        "stream_options": "streams are not padded, and the last event holds the usage",
    }
    REFUSED: ClassVar = {
        "previous_response_id": _STATELESS,
        "conversation": _STATELESS,
        "store": "nothing is stored here; leave it out or set it to false",
        "background": "there is no background work; leave it out or set it to false",
        "prompt": "there are no stored prompts; send instructions and input",
        "context_management": "conversations are not shortened here",
        "moderation": "there is no moderation",
        "image": "this server reads and writes text only",
        "access_programs": "not supported",
    }

    model: str | None = None
    input: str | list[dict[str, Any]] = Field(
        description="a text, or messages, function calls and their outputs"
    )
    instructions: str | None = Field(default=None, description="the system message")
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: Whole | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: Whole | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    # beyond OpenAI's schema, as in chat
    top_k: Whole | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    min_tokens: Whole | None = None
    ignore_eos: bool | None = None
    prediction: dict[str, Any] | None = None
    num_speculative_tokens: Whole | Literal["auto"] | None = None
    cache_salt: str | None = None
    priority: Whole | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def shows_logprobs(self) -> bool:
        """True if the tokens' log-probabilities are asked for."""
        return _LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def check(self, settings: ServeSettings) -> list[str]:
        """Warnings about what is not used. Raises RequestError for what is refused."""
        warnings = self.check_extra_fields()
        for name in self.include or ():
            if name != _LOGPROBS:
                warnings.append("include: only message.output_text.logprobs can be included")
                break
        if self.truncation not in (None, "disabled"):
            warnings.append("truncation: an input that is too long is refused, not shortened")
        if self.reasoning is not None and self.reasoning.summary is not None:
            warnings.append("reasoning.summary: reasoning is not summarised, it is shown as it is")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= settings.max_logprobs:
            raise RequestError(
                f"top_logprobs must be from 0 to {settings.max_logprobs}, not {self.top_logprobs}",
                "top_logprobs",
            )
        return warnings


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """The same request in the words of chat. Raises RequestError for items that it has no words for."""
    fields: dict[str, Any] = {name: getattr(request, name) for name in _SAME_FIELDS}
    fields["messages"] = _messages(request)
    fields["max_completion_tokens"] = request.max_output_tokens
    fields["tools"] = [
        _tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())
    ] or None
    fields["tool_choice"] = _tool_choice(request.tool_choice)
    if request.text is not None:
        fields["response_format"] = _response_format(request.text.format)
        fields["verbosity"] = request.text.verbosity
    if request.reasoning is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    if request.shows_logprobs:
        fields["logprobs"], fields["top_logprobs"] = True, request.top_logprobs
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(f"the input cannot be used: {where}: {first['msg']}", "input") from None


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    reasoning = ""
    for index, item in enumerate(request.input):
        where = f"input[{index}]"
        kind = item.get("type") or "message"
        if kind == "message":
            message = {"role": item.get("role"), "content": _content(item.get("content"), f"{where}.content")}
            if reasoning and message["role"] == "assistant":
                message["reasoning_content"], reasoning = reasoning, ""
            messages.append(message)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            if reasoning:
                messages[-1]["reasoning_content"], reasoning = reasoning, ""
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _content(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind == "reasoning":
            parts = item.get("content")
            texts = (
                [part.get("text") for part in parts if isinstance(part, dict)]
                if isinstance(parts, list)
                else []
            )
            reasoning = "\n".join(text for text in texts if isinstance(text, str))
        else:
            raise RequestError(f"{where} is of a type that cannot be used here; see docs/api.md", where)
    return messages


def _content(content: Any, where: str) -> Any:
    """A message's content in chat's words."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text", "text"):
            parts.append({"type": "text", "text": part.get("text")})
        elif kind == "refusal":
            parts.append({"type": "refusal", "refusal": part.get("refusal")})
        else:
            raise RequestError(
                f"{where}[{index}] is no text; this server reads text only", f"{where}[{index}]"
            )
    return parts


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(f'{where}: only tools of type "function" can be called here', where)
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | dict[str, Any] | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools":
        return {
            "type": "allowed_tools",
            "allowed_tools": {"mode": choice.get("mode"), "tools": choice.get("tools")},
        }
    raise RequestError(
        'tool_choice must be "none", "auto", "required", a function or allowed_tools', "tool_choice"
    )


def _response_format(form: dict[str, Any] | None) -> dict[str, Any] | None:
    if form is None or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {key: v for key, v in form.items() if key != "type"}}
