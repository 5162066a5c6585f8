"""What an OpenAI-compatible server says: an error's words, a stream's objects, the pieces of a choice.

The one place that knows how servers spell these, for whoever measures one (`octavo.bench.http_client`) and
for `octavo chat --url`. Nothing here opens a connection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from octavo.errors import ConfigError

DONE = "[DONE]"
SHOWN = 200  # characters of what cannot be read that an error shows


class NotAChunkError(ValueError):
    """An event of a stream is no JSON object. The message says what came instead."""


@dataclass(frozen=True)
class Pieces:
    """What one choice of a chunk brings: the answer's text, the model's reasoning, and a tool call's words
    or a refusal."""

    content: str = ""
    reasoning: str = ""
    other: str = ""

    @property
    def text(self) -> str:
        """All that a reader of the answer would see or could unfold."""
        return self.reasoning + self.content + self.other


def server_root(url: str, option: str = "--url") -> str:
    """A server's URL without /v1, whichever way it was written. Raises ConfigError, which names `option`."""
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number, or above 65535
        good = False
    if not good:
        raise ConfigError(f"{option} must be like http://127.0.0.1:8000, not {url!r}")
    whole = whole.rstrip("/")
    for end in ("/completions", "/chat", "/v1"):
        whole = whole.removesuffix(end)
    return whole.rstrip("/")


def is_end(event: str) -> bool:
    """True for the last event of a stream."""
    return event.strip() == DONE


def chunk_of(event: str) -> Mapping[str, Any]:
    """The object in one event's data. Raises NotAChunkError."""
    try:
        chunk = json.loads(event)
    except ValueError:
        raise NotAChunkError(f"an event is not JSON: {event[:SHOWN]!r}") from None
    if not isinstance(chunk, Mapping):
        raise NotAChunkError(f"an event is no object: {event[:SHOWN]!r}")
    return chunk


def pieces_of(choice: Mapping[str, Any]) -> Pieces:
    """What a choice of a chunk brings, chat's (`delta`) or a completion's (`text`)."""
    if isinstance(choice.get("text"), str):
        return Pieces(content=str(choice["text"]))
    delta = choice.get("delta")
    if not isinstance(delta, Mapping):
        return Pieces()
    other = [delta.get("refusal")]
    for call in delta.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            other += [function.get("name"), function.get("arguments")]
    # One text under two names in servers that keep the older name too.
    reasoning = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
    return Pieces(_text(delta.get("content")), reasoning, "".join(map(_text, other)))


def error_message(body: str | bytes | Mapping[str, Any]) -> str | None:
    """An error's message: OpenAI's, or a plain text under `error`, `message` or `detail`; else None."""
    if isinstance(body, (str, bytes)):
        try:
            body = json.loads(body)
        except ValueError:
            return None
    if not isinstance(body, Mapping):
        return None
    error = body.get("error", body.get("message", body.get("detail")))
    if isinstance(error, Mapping):
        error = error.get("message")
    return error if isinstance(error, str) and error else None


def model_names(body: str | bytes) -> list[str] | None:
    """The ids on the page /v1/models; None if that is no such page."""
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
