"""Every error as OpenAI's clients expect it: `{"error": {message, type, param, code}}` with its status."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from octavo.errors import (
    BusyError,
    EngineDeadError,
    NotInThisVersionError,
    OctavoError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
)

logger = logging.getLogger("octavo")

_MAX_INPUT_SHOWN = 80


class ModelUnknownError(OctavoError):
    """No model of this name is served here."""

    def __init__(self, name: str, served: Sequence[str]) -> None:
        shown = name if len(name) <= _MAX_INPUT_SHOWN else name[:_MAX_INPUT_SHOWN] + "…"
        super().__init__(f"the model {shown!r} is not served here; there is: {', '.join(served)}")


class ErrorObject(BaseModel):
    """What went wrong. `param` names the field of the request, where it was one."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorObject


class HttpError(NamedTuple):
    """An error as HTTP sees it."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = {}

    def object(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def response(self) -> Response:
        """The whole answer."""
        body = json.dumps({"error": self.object()}).encode()
        return Response(body, self.status, dict(self.headers), media_type="application/json")


def http_error(error: BaseException) -> HttpError:
    """What an exception of any kind is to the client. Only those made on purpose tell their message."""
    message = str(error)
    if isinstance(error, RequestError):
        return HttpError(400, "invalid_request_error", message, error.param)
    if isinstance(error, ModelUnknownError):
        return HttpError(404, "invalid_request_error", message, "model", "model_not_found")
    if isinstance(error, NotInThisVersionError):
        return HttpError(501, "not_implemented_error", message, None, "not_implemented")
    if isinstance(error, BusyError):
        later = {"Retry-After": str(error.retry_after)}
        if isinstance(error, QueueFullError):
            return HttpError(429, "rate_limit_error", message, None, "rate_limit_exceeded", later)
        return HttpError(503, "service_unavailable_error", message, None, "unavailable", later)
    if isinstance(error, RequestTimeoutError):
        return HttpError(504, "timeout_error", message, None, "timeout")
    if isinstance(error, EngineDeadError):
        return HttpError(500, "server_error", message, None, "engine_dead")
    if isinstance(error, HTTPException):
        return _of_http_exception(error)
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    return HttpError(500, "server_error", "the server failed on this request; its log says why", None, "internal")


def _of_http_exception(error: HTTPException) -> HttpError:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return HttpError(404, "invalid_request_error", "there is no such URL", None, "unknown_url", headers)
    if error.status_code == 405:
        message = "this URL does not take that method"
        return HttpError(405, "invalid_request_error", message, None, "method_not_allowed", headers)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return HttpError(error.status_code, kind, str(error.detail), None, None, headers)


def _of_validation(error: RequestValidationError) -> HttpError:
    """The first thing that is wrong with a body, in one line."""
    problems = error.errors()
    first = problems[0] if problems else {"loc": (), "msg": "the body cannot be read", "type": ""}
    where = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return HttpError(400, "invalid_request_error", f"the body is not JSON: {_reason(first)}")
    if not where:
        message = "the body must be a JSON object, sent as Content-Type: application/json"
        return HttpError(400, "invalid_request_error", message)
    # A field of several types reports one problem for each; their names in `loc` are pydantic's.
    field = str(where[0])
    path = field
    for part in where[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in _PYDANTIC_NAMES and not part[0].isupper():
            path += f".{part}"
    several = {tuple(problem["loc"])[:2] for problem in problems}
    reason = first["msg"] if len(several) == 1 else f"{first['msg']} (in one reading of {len(problems)})"
    return HttpError(400, "invalid_request_error", f"{_printable(path)}: {reason}", _printable(path))


_PYDANTIC_NAMES = frozenset({"str", "int", "float", "bool", "dict", "list", "constrained-str", "nullable"})


def _reason(problem: Any) -> str:
    context = problem.get("ctx")
    return str(context.get("error", problem["msg"])) if isinstance(context, dict) else str(problem["msg"])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_INPUT_SHOWN])


def install_handlers(app: FastAPI) -> None:
    """Make every error of an application answer in this form, those nobody thought of included."""

    async def answer(request: Request, error: Exception) -> Response:
        found = http_error(error)
        if found.code == "internal":
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return found.response()

    for kind in (OctavoError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)
