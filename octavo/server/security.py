"""Who may ask, and how much: keys, and the size of what is sent.

Both guards are ASGI middlewares that answer by themselves, before any route sees the request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import stat
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import ConfigError
from octavo.server.settings import ServeSettings, check_key

OPEN_PATHS = frozenset({"/health", "/ready"})
METRICS_PATH = "/metrics"

# Whose request this is, where several keys are known: whatever the engine remembers of earlier requests
# (prefix cache, outputs a drafter learns from) stays with the key, since timing would tell one owner what
# another wrote. None: everyone is the same.
CACHE_OWNER: ContextVar[str | None] = ContextVar("octavo_cache_owner", default=None)


def load_keys(settings: ServeSettings) -> tuple[list[str], list[str]]:
    """(all API keys: the options' and the file's, warnings). Raises ConfigError; no key is ever shown."""
    keys, warnings = list(settings.api_key), []
    if settings.api_key_file is not None:
        path = Path(settings.api_key_file)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            mode = path.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"api_key_file: {path} cannot be read: {reason}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigError(f"api_key_file: {path} holds no key; write one a line")
        for key in found:
            check_key(key, "api_key_file")
        keys += found
        if mode & (stat.S_IRGRP | stat.S_IROTH):
            warnings.append(f"other users of this machine can read {path}: chmod 600 {path}")
    return keys, warnings


class KeyRing:
    """Knows keys by their hashes; comparing takes the same time whatever is given."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in dict.fromkeys(key.encode() for key in keys)]

    def __len__(self) -> int:
        return len(self._digests)

    def holds(self, given: bytes) -> bool:
        """True if `given` is one of the keys."""
        digest = _digest(given)
        found = False
        for known in self._digests:  # all of them, whichever fits
            found |= hmac.compare_digest(known, digest)
        return found


class ApiKeys:
    """Lets nobody past without a key, if there are keys, but to /health and /ready.

    `metrics_key`: None: /metrics wants an API key as all routes do; "none": it is open; another text: it
    is a key for /metrics alone.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics_key: str | None = None) -> None:
        self._app = app
        self._keys = KeyRing(keys)
        self._metrics_is_open = metrics_key == "none"
        own = [] if metrics_key in (None, "none") else [metrics_key]
        self._metrics_keys = KeyRing([*keys, *own])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            keys = self._keys_for(route_path(scope))
            given = _bearer(scope)
            if keys and not keys.holds(given):
                await send_error(
                    send,
                    401,
                    "this server wants a key it knows: send the header Authorization: Bearer KEY",
                    "authentication_error",
                    "invalid_api_key",
                    [(b"www-authenticate", b"Bearer")],
                )
                return
            if len(self._keys) > 1:
                CACHE_OWNER.set(_digest(given).hex()[:16])
        elif scope["type"] != "lifespan":
            return  # a websocket: there are none here
        await self._app(scope, receive, send)

    def _keys_for(self, path: str) -> KeyRing | None:
        if path in OPEN_PATHS:
            return None
        if path == METRICS_PATH:
            return None if self._metrics_is_open else self._metrics_keys
        return self._keys


class BodyLimit:
    """Reads the body of each request, so much and no more, before the application sees the request.

    The limit holds while reading, whatever Content-Length says or if there is none. A client that stops
    sending is answered 408 after `read_timeout` seconds (0: never).
    """

    def __init__(self, app: ASGIApp, max_bytes: int, read_timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._read_timeout = read_timeout or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        if _declared_length(scope) > self._max_bytes:
            await self._refuse(send)
            return
        pieces: list[bytes] = []
        size = 0
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), self._read_timeout)
            except asyncio.TimeoutError:
                text = f"the body did not come: nothing for {self._read_timeout:g} s"
                await send_error(send, 408, text, "invalid_request_error", "timeout", _CLOSE)
                return
            if message["type"] != "http.request":
                return  # the client is gone
            piece = message.get("body", b"")
            size += len(piece)
            if size > self._max_bytes:
                await self._refuse(send)
                return
            pieces.append(piece)
            more = message.get("more_body", False)
        whole: Message | None = {"type": "http.request", "body": b"".join(pieces), "more_body": False}
        pieces.clear()

        async def read() -> Message:
            nonlocal whole
            if whole is not None:
                first, whole = whole, None
                return first
            return await receive()

        await self._app(scope, read, send)

    async def _refuse(self, send: Send) -> None:
        text = f"the request's body is larger than the {self._max_bytes} bytes this server takes"
        await send_error(send, 413, text, "invalid_request_error", "request_too_large", _CLOSE)


# What follows an answer that was given before the whole request was read cannot be trusted to be a request.
_CLOSE = [(b"connection", b"close")]


async def send_error(
    send: Send,
    status: int,
    message: str,
    kind: str,
    code: str | None,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """An answer in OpenAI's shape, without a framework."""
    await send_json(
        send, status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, headers
    )


async def send_json(
    send: Send, status: int, content: object, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """A JSON answer, without a framework."""
    body = json.dumps(content).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


def route_path(scope: Scope) -> str:
    """The path as routes know it: without the prefix that a proxy has for us."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _bearer(scope: Scope) -> bytes:
    """What stands after Bearer, or nothing. A request with two such headers has none."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return b""
    scheme, _, key = bytes(given[0]).partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0
