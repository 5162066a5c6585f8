"""Answers held strictly to the types of the official `openai` package.

The package itself never checks what it receives. Here every field must be there and of the declared
type, and nothing may come beside the declared fields but the additions that docs/api.md names.
Where OpenAI's own servers send null against their types (a completion chunk's finish_reason, the
first token's log-probability with echo) the same is allowed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, TypeVar

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

ADDED = {
    "reasoning_content",
    "stop_reason",
    "token_ids",
    "prompt_token_ids",
    "prompt_logprobs",
    "speculation",
    "energy_joules",
    "store",
}

M = TypeVar("M", bound=BaseModel)


def strict(kind: type[M], data: Any) -> M:
    """`data` as a `kind`; fails on what is missing, of another type, or not declared."""
    found = kind.model_validate_json(json.dumps(data), strict=True)
    check_extras(found)
    return found


def check_extras(value: Any, where: str = "") -> None:
    """No field that is neither declared nor one of Octavo's additions."""
    if isinstance(value, BaseModel):
        unknown = set(value.model_extra or {}) - ADDED
        assert not unknown, f"{where}: {unknown}"
        for name in type(value).model_fields:
            check_extras(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for item in value:
            check_extras(item, where + "[]")


def chat(data: Any) -> ChatCompletion:
    """A whole chat answer."""
    return strict(ChatCompletion, data)


def completion(data: Any) -> Completion:
    """A whole answer of /v1/completions."""
    data = copy.deepcopy(data)
    for choice in data["choices"]:
        lists = choice["logprobs"] or {}
        if lists.get("token_logprobs") and lists["token_logprobs"][0] is None:
            lists["token_logprobs"][0], lists["top_logprobs"][0] = 0.0, {}
    return strict(Completion, data)


def response(data: Any) -> Response:
    """A whole answer of /v1/responses."""
    return strict(Response, data)


def events(body: str) -> Iterator[Any]:
    """The data of each event of a stream; checks that it ends with [DONE]."""
    assert body.endswith("data: [DONE]\n\n"), body[-200:]
    for event in body.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        assert event.startswith("data: ")
        assert "\n" not in event
        yield json.loads(event.removeprefix("data: "))


def chat_chunks(body: str) -> list[ChatCompletionChunk]:
    """A chat stream, with what holds for every one: roles first, then null until the last finish_reason."""
    chunks = [strict(ChatCompletionChunk, data) for data in events(body)]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    begun: set[int] = set()
    ended: set[int] = set()
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in ended, "a choice goes on after its finish_reason"
            assert (choice.delta.role == "assistant") == (choice.index not in begun)
            begun.add(choice.index)
            if choice.finish_reason is not None:
                ended.add(choice.index)
    assert begun == ended
    return chunks


def completion_chunks(body: str) -> list[Completion]:
    """A completion stream."""
    found = []
    ended: set[int] = set()
    for data in events(body):
        for choice in data["choices"]:
            assert choice["index"] not in ended
            assert "finish_reason" in choice
            if choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"  # null in OpenAI's streams, against their own type
            else:
                ended.add(choice["index"])
        found.append(completion(data))
    return found


_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def response_events(body: str) -> list[Any]:
    """The events of a stream of /v1/responses, numbered from 0, named as their type."""
    found = []
    for number, event in enumerate(body.removesuffix("\n\n").split("\n\n")):
        name, data = event.split("\n")
        parsed = _EVENT.validate_json(data.removeprefix("data: "), strict=True)
        assert name == f"event: {parsed.type}"
        assert parsed.sequence_number == number
        check_extras(parsed, parsed.type)
        found.append(parsed)
    return found
