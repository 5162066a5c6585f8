"""Requests of /tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from octavo.server.protocol.base import ApiRequest
from octavo.server.protocol.chat import ChatMessage, Tool


class TokenizeRequest(ApiRequest):
    """A text (`prompt`) or a conversation (`messages`), to be made into token ids."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="default: true for a text, false for a chat"
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ApiRequest):
    """Token ids, to be made into text."""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool | None = Field(default=None, description="default: false, as with vLLM")
