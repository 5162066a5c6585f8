"""Asks an OpenAI-compatible server and times its stream.

The clock is read when a piece of the network has been received, before anything is parsed. A piece counts as
an arrival only if it carries content or reasoning: not the first chunk with the role, not the last with the
reason or the usage. Tokens are counted by the server's usage, never by chunks; where the server sends the
token ids along, by those.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from octavo.bench.openai_stream import NotAChunkError, chunk_of, error_message, is_end, pieces_of, server_root
from octavo.bench.sse import EventReader
from octavo.bench.target import Answer, TargetError, TargetRequest

LONGEST_ERROR = 2000  # characters of a server's error that are kept


@dataclass(frozen=True)
class HttpJob:
    """All that a client must know of the server; plain data, so that it can cross to another process.

    `own_dialect`: the server is Octavo or vLLM and knows fields beyond OpenAI's (token ids both ways, cache
    salts). Without it only fields that were asked for are sent.
    """

    url: str
    model: str
    endpoint: str = "auto"
    api_key: str | None = field(default=None, repr=False)
    own_dialect: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False

    def to_json(self) -> dict[str, Any]:
        """For another process's stdin: the key is in it."""
        return asdict(self)

    @property
    def base(self) -> str:
        """The URL up to and without /v1."""
        return server_root(self.url)

    def path_and_body(self, request: TargetRequest) -> tuple[str, dict[str, Any]]:
        """What is posted, and where."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": (self.seed * 1_000_003 + request.index) & 0x7FFFFFFF,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.top_k > 0:
            body["top_k"] = self.top_k
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.own_dialect and request.cache_salt is not None:
            body["cache_salt"] = request.cache_salt
        if self.own_dialect and request.prompt_token_ids is not None:
            body["prompt"] = list(request.prompt_token_ids)
            body["return_token_ids"] = True
            return "/v1/completions", body
        chat = request.messages is not None if self.endpoint == "auto" else self.endpoint == "chat"
        if chat:
            messages = request.messages or ({"role": "user", "content": request.text or ""},)
            body["messages"] = [dict(message) for message in messages]
            return "/v1/chat/completions", body
        text = request.text
        if text is None:
            text = "\n\n".join(message["content"] for message in request.messages or ())
        body["prompt"] = text
        return "/v1/completions", body


class HttpEngine:
    """Connections to one server; made within the event loop that uses them."""

    def __init__(self, job: HttpJob) -> None:
        self._job = job
        headers = {"authorization": f"Bearer {job.api_key}"} if job.api_key else {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
            auto_decompress=True,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def get(self, path: str, seconds: float = 10.0) -> tuple[int, str]:
        """(status, body) of a page. Raises TargetError if the server cannot be reached."""
        try:
            limit = aiohttp.ClientTimeout(total=seconds)
            async with self._session.get(self._job.base + path, timeout=limit) as response:
                return response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _connection_error(error, self._job.base) from error

    async def generate(self, request: TargetRequest, answer: Answer) -> None:
        """Stream one answer. Raises TargetError for every way in which it may not come to its end."""
        path, body = self._job.path_and_body(request)
        try:
            async with self._session.post(self._job.base + path, json=body) as response:
                if response.status != 200:
                    text = await response.text(errors="replace")
                    raise TargetError(f"http_{response.status}", _error_text(text))
                if "text/event-stream" not in response.headers.get("content-type", ""):
                    raise TargetError(
                        "protocol",
                        f"the server did not stream (content-type {response.headers.get('content-type')!r})",
                    )
                await _read_stream(response, answer)
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionResetError) as error:
            raise TargetError("cut_off", f"the connection ended in the middle: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _connection_error(error, self._job.base) from error


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer) -> None:
    reader, stream = EventReader(), _Stream(answer)
    try:
        async for piece in response.content.iter_any():
            moment = time.monotonic()
            for event in reader.feed(piece):
                stream.event(event, moment)
            if stream.done:
                break
    finally:
        stream.keep()  # what has come is kept, also of an answer that is cut off or takes too long
    stream.check_end()


class _Stream:
    """One answer as its events tell it."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._pieces: list[tuple[float, str, int | None]] = []  # moment, text, tokens if their ids came
        self._usage: dict[str, Any] | None = None
        self.done = False

    def event(self, data: str, moment: float) -> None:
        """One event's data."""
        if is_end(data):
            self.done = True
            return
        try:
            chunk = chunk_of(data)
        except NotAChunkError as error:
            raise TargetError("protocol", str(error)) from None
        if chunk.get("error") is not None:
            raise TargetError("server_error", _error_text(data))
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
        for choice in chunk.get("choices") or ():
            self._choice(choice, moment)

    def _choice(self, choice: Mapping[str, Any], moment: float) -> None:
        text = pieces_of(choice).text
        ids = choice.get("token_ids")
        tokens = len(ids) if isinstance(ids, list) else None
        if isinstance(ids, list):
            self._answer.token_ids = [*(self._answer.token_ids or ()), *ids]
        if text or tokens:
            self._answer.text = (self._answer.text or "") + text
            self._pieces.append((moment, text, tokens))
        if choice.get("finish_reason") is not None:
            self._answer.finish_reason = str(choice["finish_reason"])

    @property
    def _is_complete(self) -> bool:
        return self.done or self._answer.finish_reason is not None

    def keep(self) -> None:
        """Tell the answer all that has come."""
        answer = self._answer
        if self._usage is not None:
            _note_usage(answer, self._usage)
        if answer.token_ids is not None:
            answer.generated_tokens = len(answer.token_ids)
        # Without a usage whoever has a tokenizer counts the text.
        answer.tokens_estimated = answer.generated_tokens is None
        for moment, tokens in _spread(self._pieces, answer.generated_tokens):
            answer.arrived(tokens, moment)

    def check_end(self) -> None:
        """The connection has ended: was that the answer's end as well?"""
        if not self._is_complete:
            raise TargetError("cut_off", "the stream ended without a finish_reason and without [DONE]")


def _note_usage(answer: Answer, usage: Mapping[str, Any]) -> None:
    if isinstance(usage.get("completion_tokens"), int):
        answer.generated_tokens = usage["completion_tokens"]
    if isinstance(usage.get("prompt_tokens"), int):
        answer.prompt_tokens = usage["prompt_tokens"]
    details = usage.get("prompt_tokens_details")
    if isinstance(details, Mapping) and isinstance(details.get("cached_tokens"), int):
        answer.cached_tokens = details["cached_tokens"]
    told = usage.get("speculation")
    if isinstance(told, Mapping):
        answer.drafted, answer.accepted = told.get("drafted"), told.get("accepted")
        answer.num_verifications = told.get("num_steps")


def _spread(pieces: list[tuple[float, str, int | None]], total: int | None) -> list[tuple[float, int]]:
    """Tokens of each piece: from its ids, else the total shared out by length of text."""
    if all(tokens is not None for _, _, tokens in pieces):
        return [(moment, tokens or 0) for moment, _, tokens in pieces]
    characters = sum(len(text) for _, text, _ in pieces) or 1
    spread, seen, given = [], 0, 0
    for moment, text, _ in pieces:
        seen += len(text)
        upto = round((total or 0) * seen / characters)
        spread.append((moment, upto - given))
        given = upto
    return spread


def _error_text(body: str) -> str:
    """An error's message, or whatever else the body says."""
    return (error_message(body) or body.strip() or "(no text)")[:LONGEST_ERROR]


def _connection_error(error: BaseException, url: str) -> TargetError:
    cause = error.__cause__ if error.__cause__ is not None else error
    os_error = getattr(error, "os_error", cause)
    if isinstance(os_error, ConnectionRefusedError) or "refused" in str(error).lower():
        return TargetError("refused", f"nothing listens at {url} (connection refused)")
    if getattr(error, "errno", None) in (errno.ECONNRESET, errno.EPIPE):
        return TargetError("cut_off", f"the connection ended in the middle: {error}")
    if isinstance(error, TimeoutError):
        return TargetError("connect", f"{url} did not answer in time")
    return TargetError("connect", f"{url} cannot be reached: {type(error).__name__}: {error}")
