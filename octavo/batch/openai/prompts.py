"""The prompts of a request as the server makes them, without asking the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from octavo.batch.openai.answers import WorkersClient
from octavo.batch.workers import EngineWorkers
from octavo.errors import RequestError
from octavo.server import chat_plan, completions
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.settings import ServeSettings
from octavo.server.state import ServedModel, ServerState


@dataclass(frozen=True)
class MadePrompt:
    """Token ids, and the text that an answer begins with besides what is generated."""

    token_ids: list[int]
    echoed: str = ""


def prompts_of(workers: EngineWorkers, url: str, body: dict[str, Any]) -> list[MadePrompt]:
    """One for each prompt of the body. Raises RequestError for a body that cannot be served."""
    client = WorkersClient(workers, (workers.info.model,))
    settings = ServeSettings()
    state = ServerState(client, settings, ServedModel.of(client.info, settings, workers.tokenizer))
    given = {**body, "model": None}
    try:
        if url == "/v1/chat/completions":
            chat = chat_plan.make_plan(state, ChatRequest.model_validate(given))
            return [MadePrompt(chat.prompt_ids, chat.echoed)]
        plan = completions.make_plan(state, CompletionRequest.model_validate(given))
    except ValidationError as error:
        raise RequestError(f"the request cannot be read: {error.errors()[0]['msg']}") from None
    echo = bool(plan.request.echo)
    return [MadePrompt(made.token_ids, (made.text or "") if echo else "") for made in plan.prompts]
