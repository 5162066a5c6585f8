"""The routes. Each reads its request's type, hands it to the module that answers it, and nothing else.

Guards, access log and the operators' routes (/health, /ready, /metrics) are added around the
application where it is served: `launch.guard`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from octavo import __version__
from octavo.errors import NotInThisVersionError
from octavo.server.chat import serve_chat, warning_headers
from octavo.server.completions import serve_completion
from octavo.server.errors import ErrorBody, install_handlers
from octavo.server.models import detokenize, model_card, model_list, tokenize
from octavo.server.openapi import ANSWERS, describe
from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from octavo.server.responses import serve_response
from octavo.server.state import ServerState
from octavo.server.streaming import ClientGone, json_response

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it but the access log

# Known routes of other servers: what is missing, and what to do instead, rather than "no such URL".
_NOT_HERE = {
    ("/v1/embeddings", "/embeddings", "/pooling"): ("making embeddings", ""),
    ("/classify",): ("classification", ""),
    ("/v1/rerank", "/v2/rerank", "/rerank"): ("reranking", ""),
    ("/v1/score", "/score"): ("scoring", ""),
    ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"): ("LoRA", ""),
    ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech"): ("audio", ""),
    ("/v1/images/generations", "/v1/images/edits"): ("making images", ""),
    ("/v1/moderations",): ("moderation", ""),
    ("/v1/batches", "/v1/files"): ("the batch interface", "octavo batch openai answers such a file offline"),
    ("/v1/fine_tuning/jobs",): ("training", ""),
    ("/v1/assistants", "/v1/threads"): ("the assistants interface", "use /v1/chat/completions"),
    ("/v1/responses/{name}", "/v1/conversations"): ("keeping responses", "send the conversation each time"),
    ("/v1/messages", "/v1/messages/count_tokens"): ("Anthropic's interface", "use /v1/chat/completions"),
    ("/api/chat", "/api/generate"): ("Ollama's interface", "use /v1/chat/completions or /v1/completions"),
    ("/generate", "/completion", "/invocations"): ("this interface", "use /v1/completions"),
    ("/sleep", "/wake_up", "/is_sleeping"): ("putting the engine to sleep", "end the server instead"),
    ("/reset_prefix_cache",): ("emptying the prefix cache", "cache_salt in a request leaves it unused"),
    ("/start_profile", "/stop_profile", "/collective_rpc"): ("profiling over HTTP", "see /metrics"),
    ("/ping",): ("this probe", "use /health"),
    ("/load", "/server_info"): ("this page", "see /metrics and /version"),
}  # fmt: skip


def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.octavo
    return state


State = Annotated[ServerState, Depends(_state)]


def create_app(state: ServerState) -> FastAPI:
    """The application that serves `state`."""
    app = FastAPI(
        title="Octavo",
        version=__version__,
        description="OpenAI-compatible text generation. Fields and their meaning: docs/api.md.",
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
        redirect_slashes=False,
    )
    app.state.octavo = state
    install_handlers(app)
    app.add_exception_handler(ClientGone, _nobody_is_left)
    _add_generation(app)
    _add_models(app)
    for paths, (feature, instead) in _NOT_HERE.items():
        for path in paths:
            _add_missing(app, path, feature, instead)
    describe(app)
    return app


def _add_generation(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", tags=["generation"], responses=ANSWERS)
    async def chat_completions(http: Request, state: State, body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await serve_chat(state, http, body)

    @app.post("/v1/completions", tags=["generation"], responses=ANSWERS)
    async def completions(http: Request, state: State, body: CompletionRequest) -> Response:
        """Continue one or more prompts."""
        return await serve_completion(state, http, body)

    @app.post("/v1/responses", tags=["generation"], responses=ANSWERS)
    async def responses(http: Request, state: State, body: ResponsesRequest) -> Response:
        """Answer an input; nothing is stored."""
        return await serve_response(state, http, body)


def _add_models(app: FastAPI) -> None:
    @app.get("/v1/models", tags=["models"])
    async def list_models(state: State) -> dict[str, Any]:
        """The model, under each of its names."""
        return model_list(state)

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def get_model(state: State, name: str) -> dict[str, Any]:
        """One model."""
        return model_card(state, name)

    @app.post("/tokenize", tags=["tokens"])
    async def post_tokenize(state: State, body: TokenizeRequest) -> Response:
        """Token ids of a text or a conversation."""
        found, warnings = await tokenize(state, body)
        return json_response(found, warning_headers(warnings))

    @app.post("/detokenize", tags=["tokens"])
    async def post_detokenize(state: State, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        found, warnings = await detokenize(state, body)
        return json_response(found, warning_headers(warnings))

    @app.get("/version", tags=["models"])
    async def version() -> dict[str, str]:
        """Octavo's version."""
        return {"version": __version__}


def _add_missing(app: FastAPI, path: str, feature: str, instead: str) -> None:
    @app.api_route(path, methods=["GET", "POST"], include_in_schema=False)
    async def missing() -> Response:
        raise NotInThisVersionError(feature, instead)


async def _nobody_is_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
