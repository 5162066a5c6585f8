"""The other end of `octavo chat --url`: a server that speaks OpenAI's protocol, Octavo's or any other.

Only the standard library is needed, and no engine is loaded. Tokens are counted by the server's usage, never
by the pieces that arrive.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import click

from octavo.bench.openai_stream import (
    NotAChunkError,
    chunk_of,
    error_message,
    is_end,
    model_names,
    pieces_of,
    server_root,
)
from octavo.bench.sse import EventReader
from octavo.cli.console import Speed
from octavo.errors import RequestError

ANSWER_SECONDS = 600.0  # longest silence of an answer, its prompt's computation included
PAGE_SECONDS = 10.0


class RemoteModel:
    """One model of a server. `options` are the request's fields beside model and messages.

    Raises ConfigError if `url` is none, RequestError if nobody there speaks the protocol.
    """

    def __init__(self, url: str, model: str | None, key: str | None, options: Mapping[str, Any]) -> None:
        self._base = server_root(url) + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._options = dict(options)
        self.name = model if model is not None else self._first_model()

    def _first_model(self) -> str:
        with closing(self._open("/models", None, PAGE_SECONDS)) as page:
            names = model_names(page.read())
        if names is None:
            raise RequestError(f"{self._base}/models does not answer as OpenAI's servers do")
        if not names:
            raise RequestError(f"{self._base} serves no model")
        return names[0]

    def answer(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Speed, bool]:
        """Print an answer as it comes. Returns it, its speed, and whether Ctrl-C cut it short.

        Reasoning is shown dimmed and is no part of what is returned. Raises RequestError.
        """
        body = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        speed, text, start, thinks, stopped = Speed(), "", time.perf_counter(), False, False
        try:
            for chunk in self._chunks(body):
                now = time.perf_counter() - start
                pieces = pieces_of(next(iter(chunk.get("choices") or ()), {}))
                content, reasoning = pieces.content + pieces.other, pieces.reasoning
                if content or reasoning:
                    speed.first = now if speed.first is None else speed.first
                    speed.last = now
                if reasoning:
                    click.secho(reasoning, dim=True, nl=False)
                elif content and thinks:
                    click.echo("\n")
                if content:
                    click.echo(content, nl=False)
                thinks = bool(reasoning) or (thinks and not content)
                text += content
                _count(chunk, speed)
        except KeyboardInterrupt:  # the connection is closed by now, which ends the request over there
            stopped = True
        if text and not text.endswith("\n"):
            click.echo()
        return text, speed, stopped

    def _chunks(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """The stream's objects up to [DONE]."""
        reader, ended = EventReader(), False
        try:
            with closing(
                self._open("/chat/completions", json.dumps(body).encode(), ANSWER_SECONDS)
            ) as stream:
                while not ended and (piece := stream.read1(1 << 16)):
                    for event in reader.feed(piece):
                        if is_end(event):
                            ended = True
                        else:
                            yield _chunk(event)
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"the connection to {self._base} broke off: {error}") from error
        if not ended:
            raise RequestError(f"{self._base} ended the answer in the middle")

    def _open(self, path: str, body: bytes | None, seconds: float) -> http.client.HTTPResponse:
        request = urllib.request.Request(self._base + path, body, self._headers)
        try:
            response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, error.read()) from None
        except urllib.error.URLError as error:
            reason = error.reason.strerror if isinstance(error.reason, OSError) else error.reason
            raise RequestError(f"{self._base} cannot be reached: {reason or error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"{self._base} cannot be reached: {error}") from None
        return response


def _chunk(event: str) -> Mapping[str, Any]:
    try:
        chunk = chunk_of(event)
    except NotAChunkError as error:
        raise RequestError(f"the server's stream cannot be read: {error}") from None
    if chunk.get("error") is not None:
        raise RequestError(error_message(chunk) or "the server failed")
    return chunk


def _count(chunk: Mapping[str, Any], speed: Speed) -> None:
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        speed.prompt_tokens = usage.get("prompt_tokens") or 0
        speed.tokens = usage.get("completion_tokens") or 0


def _refusal(status: int, body: bytes) -> RequestError:
    message = error_message(body) or http.client.responses.get(status, "")
    hint = "; OPENAI_API_KEY holds the key that is sent" if status == 401 else ""
    return RequestError(f"the server answered {status}: {message}{hint}")
