"""Small routes: the models, tokens of a text and back, and what is not in this version."""

from __future__ import annotations

import asyncio
from typing import Any

from octavo.errors import RequestError
from octavo.server.chat_plan import make_plan
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from octavo.server.state import ServerState, need_tokenizer


def model_card(state: ServerState, name: str) -> dict[str, Any]:
    """A model as /v1/models shows it. Raises ModelUnknownError."""
    model = state.model(name)
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "octavo",
        "root": model.info.model,
        "parent": None,
        "max_model_len": model.info.max_model_len,
    }


def model_list(state: ServerState) -> dict[str, Any]:
    """All names of the model."""
    names = state.served.info.served_model_names
    return {"object": "list", "data": [model_card(state, name) for name in names]}


async def tokenize(state: ServerState, request: TokenizeRequest) -> tuple[dict[str, Any], list[str]]:
    """(token ids of a text or a conversation, warnings). Raises RequestError."""
    model = state.model(request.model)
    tokenizer = need_tokenizer(model, "tokenize")
    warnings = request.check_extra_fields()
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give prompt or messages, one of them", "prompt")
    if request.prompt is not None:
        special = request.add_special_tokens is not False
        token_ids = await asyncio.to_thread(tokenizer.encode, request.prompt, add_special_tokens=special)
    else:
        names = {"model", "messages", "tools", "add_special_tokens", "add_generation_prompt"}
        names |= {"continue_final_message", "chat_template_kwargs"}
        chat = ChatRequest.model_validate({name: getattr(request, name) for name in names})
        plan = await asyncio.to_thread(make_plan, state, chat)
        token_ids = plan.prompt_ids
        warnings += plan.warnings
    body: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": model.info.max_model_len,
        "tokens": token_ids,
    }
    body["token_strs"] = (
        [tokenizer.id_to_token(i) or "" for i in token_ids] if request.return_token_strs else None
    )
    return body, warnings


async def detokenize(state: ServerState, request: DetokenizeRequest) -> tuple[dict[str, Any], list[str]]:
    """(text of token ids, warnings). Raises RequestError."""
    model = state.model(request.model)
    tokenizer = need_tokenizer(model, "detokenize")
    wrong = next((i for i in request.tokens if not 0 <= i < tokenizer.vocab_size), None)
    if wrong is not None:
        allowed = f"0 … {tokenizer.vocab_size - 1}"
        raise RequestError(f"tokens holds {wrong}, which is no id of this tokenizer ({allowed})", "tokens")
    hide = bool(request.skip_special_tokens)
    text = await asyncio.to_thread(tokenizer.decode, request.tokens, skip_special_tokens=hide)
    return {"prompt": text}, request.check_extra_fields()
