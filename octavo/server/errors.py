"""Every error as OpenAI's clients expect it: `{"error": {message, type, param, code}}` with its status."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
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

_MAX_INPUT_SHOWN = 80


class ModelUnknownError(OctavoError):
    """No model of this name is served here."""

    def __init__(self, name: str, served: Sequence[str]) -> None:
        shown = name if len(name) <= _MAX_INPUT_SHOWN else name[:_MAX_INPUT_SHOWN] + "…"
        super().__init__(f"the model {shown!r} is not served here; there is: {', '.join(served)}")


class AnswerFailedError(OctavoError):
    """An answer that had begun could not be finished; the message says why."""


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
    headers: Mapping[str, str] | None = None

    def object(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def response(self) -> Response:
        """The whole answer."""
        body = json.dumps({"error": self.object()}).encode()
        return Response(body, self.status, dict(self.headers or {}), media_type="application/json")


def http_error(error: BaseException) -> HttpError:
    """What an exception of any kind is to the client. Only those made on purpose tell their message."""
    message = str(error)
    if isinstance(error, RequestError):
        return HttpError(400, "invalid_request_error", message, error.param)
    if isinstance(error, ModelUnknownError):
        return HttpError(404, "invalid_request_error", message, "model", "model_not_found")
    if isinstance(error, NotInThisVersionError):
        never = {"x-should-retry": "false"}  # OpenAI's clients would try again after any 5xx
        return HttpError(501, "not_implemented_error", message, None, "not_implemented", never)
    if isinstance(error, BusyError):
        later = {"Retry-After": str(error.retry_after)}
        if isinstance(error, QueueFullError):
            return HttpError(429, "rate_limit_error", message, None, "rate_limit_exceeded", later)
        return HttpError(503, "service_unavailable", message, None, "unavailable", later)
    if isinstance(error, RequestTimeoutError):
        return HttpError(504, "timeout_error", message, None, "timeout")
    if isinstance(error, AnswerFailedError):
        return HttpError(500, "server_error", message, None, "answer_failed")
    if isinstance(error, EngineDeadError):
        return HttpError(500, "server_error", message, None, "engine_dead")
    if isinstance(error, HTTPException):
        return _of_http_exception(error)
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    return HttpError(
        500, "server_error", "the server failed on this request; its log says why", None, "internal"
    )


def _of_http_exception(error: HTTPException) -> HttpError:
    headers = dict(error.headers or {})
    if isinstance(error.__cause__, UnicodeDecodeError):
        return HttpError(400, "invalid_request_error", "the body is not JSON: it is not UTF-8 text")
    if isinstance(error.__cause__, RecursionError):
        return HttpError(
            400, "invalid_request_error", "the body is not JSON that can be read: it nests too deep"
        )
    if error.status_code == 405:
        message = "this URL does not take that method"
        return HttpError(405, "invalid_request_error", message, None, "method_not_allowed", headers)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return HttpError(error.status_code, kind, str(error.detail), None, None, headers)


def _unknown_url(request: Request, app: FastAPI) -> HttpError:
    """A path that no route has, with the one that was probably meant."""
    path = request.scope["path"]
    routes = sorted(
        {route.path for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema}
    )
    near = [f"/v1{path}"] if f"/v1{path}" in routes else difflib.get_close_matches(path, routes, n=1)
    hint = f"did you mean {near[0]}?" if near else "GET /docs lists what there is"
    shown = _printable(path, _MAX_INPUT_SHOWN)
    return HttpError(
        404, "invalid_request_error", f"there is no such URL: {shown}; {hint}", None, "unknown_url"
    )


def _of_validation(error: RequestValidationError) -> HttpError:
    """What is wrong with a body, in one line: the first of its fields that cannot be read."""
    problems = error.errors()
    first = problems[0] if problems else {"loc": ("body",), "msg": "it cannot be read", "type": ""}
    if first["type"] == "json_invalid":
        return HttpError(400, "invalid_request_error", f"the body is not JSON: {_reason(first)}")
    name = next((part for part in first["loc"] if part != "body"), None)
    if not isinstance(name, str):
        message = "the body must be a JSON object, sent as Content-Type: application/json"
        return HttpError(400, "invalid_request_error", message)
    # A field that may be of several types has a problem with each of them.
    mine = [problem for problem in problems if name in problem["loc"][:2]]
    reasons = dict.fromkeys(f"{_path(problem['loc'])}: {problem['msg']}" for problem in mine)
    shown = _printable(" / ".join(list(reasons)[:_MAX_REASONS]), _MAX_MESSAGE)
    return HttpError(400, "invalid_request_error", shown, _printable(name, _MAX_INPUT_SHOWN))


def _path(loc: Sequence[Any]) -> str:
    """Where in the body, in the words of JSON; names that pydantic gives to types are left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in _TYPE_NAMES and not part[0].isupper():
            path += f".{part}" if path else part
    return path


_TYPE_NAMES = frozenset({"body", "str", "int", "float", "bool", "dict", "list", "nullable"})
_MAX_REASONS = 4
_MAX_MESSAGE = 500


def _reason(problem: Any) -> str:
    context = problem.get("ctx")
    return str(context.get("error", problem["msg"])) if isinstance(context, dict) else str(problem["msg"])


def _printable(text: str, limit: int) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


def install_handlers(app: FastAPI) -> None:
    """Make every error of an application answer in this form, those nobody thought of included.

    The latter are raised again once they are answered, so that whoever runs the application logs them.
    """

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            return _unknown_url(request, app).response()
        return http_error(error).response()

    for kind in (OctavoError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)
