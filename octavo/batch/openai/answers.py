"""Answers to the lines of a batch file: the server's own, without a port.

Each body goes through the server's application, the same object that `octavo serve` puts behind its
port, so every field means here what it means there, and every error has its status and its words. Only
what depends on the run rather than on the request is left out of an answer: how many prompt tokens the
cache knew, what speculation did, what energy it took. So an interrupted job's results are those of an
undisturbed one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from octavo.batch.openai.lines import BadLine, RequestLine
from octavo.batch.work import (
    MAX_RETRY_SECONDS,
    RETRY_SECONDS,
    Workers,
    WorkItem,
    seed_of,
)
from octavo.engine.engine_stats import EngineStats
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import EngineDeadError, NotInThisVersionError
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.app import create_app
from octavo.server.engine_client import ClientState, EngineClientInfo, LoadProgress, StreamKind
from octavo.server.request_record import CURRENT_RECORD, RequestRecord
from octavo.server.settings import ServeSettings
from octavo.server.state import ServedModel, ServerState

Record = dict[str, Any]

_FAILURES = frozenset({429, 500, 502, 503, 504})  # not the request's fault: worth another attempt
# What a usage tells of the request; the rest (cached tokens, speculation, energy) is of the run.
_OF_THE_REQUEST = ("prompt_tokens", "completion_tokens", "total_tokens")
_PREDICTION = ("accepted_prediction_tokens", "rejected_prediction_tokens")


@dataclass(slots=True)
class Answer:
    """A finished record, and what it adds to the counts of its job."""

    key: str
    record: Record
    num_tokens: int = 0
    num_cached: int = 0
    num_attempts: int = 1

    @property
    def failed(self) -> bool:
        """True unless the request was answered."""
        return is_failed(self.record)


def is_failed(record: Record) -> bool:
    """True unless a record holds an answer."""
    response = record.get("response")
    return record.get("error") is not None or not isinstance(response, dict) or response["status_code"] >= 400


def is_engine_failure(record: Record) -> bool:
    """True for a record that says the engine failed: the request itself may be all right."""
    response = record.get("response")
    return isinstance(response, dict) and response["status_code"] in _FAILURES


def key_of(record: Record) -> str | None:
    """What a record finishes; see RequestLine.key and BadLine.key."""
    error = record.get("error")
    if isinstance(error, dict) and "line" in error:
        return f"line:{error['line']}"
    custom_id = record.get("custom_id")
    return f"id:{custom_id}" if isinstance(custom_id, str) else None


class Answerer:
    """Answers lines; made in the event loop in which it is used."""

    def __init__(
        self,
        workers: Workers,
        tokenizer: Tokenizer | None,
        names: tuple[str, ...],
        *,
        seed: int,
        max_retries: int,
        settings: ServeSettings,
    ) -> None:
        client = WorkersClient(workers, names)
        served = ServedModel.of(client.info, settings, tokenizer)
        self._app = create_app(ServerState(client, settings, served))
        self._seed = seed
        self._max_retries = max_retries

    async def answer(self, line: RequestLine | BadLine) -> Answer:
        """The record of one line. Raises EngineDeadError once nobody is left to work."""
        name = hashlib.blake2b(f"{self._seed}\x00{line.key}".encode("utf-8", "surrogatepass")).hexdigest()[
            :24
        ]
        if isinstance(line, BadLine):
            return Answer(line.key, bad_record(line, name))
        body = dict(line.body)
        if body.get("seed") is None:
            body["seed"] = seed_of(self._seed, line.custom_id)
        pause = RETRY_SECONDS
        attempt = 1
        while True:
            status, answered, warnings = await self._post(line.url, body, name)
            if status not in _FAILURES or attempt > self._max_retries:
                break
            await asyncio.sleep(pause)
            pause = min(MAX_RETRY_SECONDS, pause * 2)
            attempt += 1
        cached = _without_the_run(answered, keeps_speculation=bool(body.get("trace")))
        response: Record = {"status_code": status, "request_id": f"req-{name}", "body": answered}
        if warnings:
            response["warnings"] = warnings
        record: Record = {
            "id": f"batch_req_{name}",
            "custom_id": line.custom_id,
            "response": response,
            "error": None,
            "seed": body["seed"],
        }
        usage = answered.get("usage")
        num_tokens = usage.get("completion_tokens", 0) if isinstance(usage, dict) else 0
        return Answer(line.key, record, num_tokens, cached, attempt)

    async def _post(self, url: str, body: Record, name: str) -> tuple[int, Record, list[str]]:
        """(status, body, warnings) of one request to the application."""
        record = RequestRecord(name, "POST", url)
        CURRENT_RECORD.set(record)  # of this task alone; the answer's id is made from it
        data = json.dumps(body).encode()
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": url,
            "raw_path": url.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"batch")],
            "client": None,
            "server": None,
        }
        is_read = False
        status, headers, parts = 500, {}, []

        async def receive() -> dict[str, Any]:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": data, "more_body": False}
            await asyncio.Event().wait()  # this client never goes away
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message["headers"])
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, send)
        answered = json.loads(b"".join(parts))
        if status == 500 and _code(answered) == "engine_dead":
            raise EngineDeadError(answered["error"]["message"])
        warned = headers.get(b"x-octavo-warnings", b"").decode()
        return status, answered, warned.split("; ") if warned else []


def bad_record(line: BadLine, name: str) -> Record:
    """What is written for a line that is no request."""
    error = {"code": line.code, "message": line.message, "line": line.number}
    return {"id": f"batch_req_{name}", "custom_id": line.custom_id, "response": None, "error": error}


def _code(answered: Record) -> str | None:
    error = answered.get("error")
    return error.get("code") if isinstance(error, dict) else None


def _without_the_run(answered: Record, *, keeps_speculation: bool) -> int:
    """Leave in a usage what every run would tell alike; returns the cached prompt tokens."""
    usage = answered.get("usage")
    if not isinstance(usage, dict):
        return 0
    prompt = usage.get("prompt_tokens_details")
    kept = {name: usage[name] for name in _OF_THE_REQUEST if name in usage}
    details = usage.get("completion_tokens_details")
    if isinstance(details, dict):
        details = {name: value for name, value in details.items() if name not in _PREDICTION}
        if details:
            kept["completion_tokens_details"] = details
    if keeps_speculation and "speculation" in usage:
        kept["speculation"] = usage["speculation"]
    answered["usage"] = kept
    return int(prompt.get("cached_tokens", 0)) if isinstance(prompt, dict) else 0


class WorkersClient:
    """The workers of a job with the face that the server's application knows (EngineClient)."""

    def __init__(self, workers: Workers, names: tuple[str, ...]) -> None:
        self._workers = workers
        self._num_open = 0
        self._cause: BaseException | None = None
        self._ended = asyncio.Event()
        found = workers.info
        self._info = EngineClientInfo(
            model=found.model,
            served_model_names=names,
            model_path=found.model_path,
            tokenizer_path=found.tokenizer_path,
            chat_template=found.chat_template,
            trust_remote_code=found.trust_remote_code,
            max_model_len=found.max_model_len,
            vocab_size=found.vocab_size,
            eos_token_ids=found.eos_token_ids,
            dtype=found.dtype,
            max_num_seqs=found.max_num_seqs,
            block_size=found.block_size,
            num_blocks=found.num_blocks,
            speculative_method=found.speculative_method,
            generation_defaults=found.generation_defaults,
            notes=found.notes,
        )

    @property
    def info(self) -> EngineClientInfo:
        """See EngineClient."""
        return self._info

    @property
    def state(self) -> ClientState:
        """See EngineClient."""
        return "ready" if self.is_alive else "dead"

    @property
    def progress(self) -> LoadProgress:
        """See EngineClient."""
        return LoadProgress("ready", 1.0)

    @property
    def is_alive(self) -> bool:
        """See EngineClient."""
        return not self._ended.is_set()

    @property
    def num_open(self) -> int:
        """See EngineClient."""
        return self._num_open

    async def wait_ready(self) -> EngineClientInfo:
        """See EngineClient."""
        return self._info

    async def wait_found(self) -> str | None:
        """See EngineClient."""
        return self._info.tokenizer_path

    async def wait_dead(self) -> BaseException | None:
        """See EngineClient."""
        await self._ended.wait()
        return self._cause

    async def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        arrival_time: float,
        kind: StreamKind = "delta",
        continue_prompt: bool = True,
        prompt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """See EngineClient; whatever `kind` says, there is one output, at the end."""
        item = WorkItem(request_id, prompt_ids, params, add_special_tokens=continue_prompt)
        self._num_open += 1
        try:
            output = await self._workers.run(item)
        except EngineDeadError as error:
            self._cause = error
            self._ended.set()
            raise
        finally:
            self._num_open -= 1
        output.request_id, output.prompt = request_id, prompt
        yield output

    async def stats(self, *, check_integrity: bool = False) -> EngineStats:
        """Nobody asks here: a job has its own summary."""
        raise NotInThisVersionError("statistics of a batch job's engine")

    def drain(self) -> None:
        """Nothing to do: a job decides itself what it begins."""

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        """See EngineClient."""
        await self._workers.close()
        self._ended.set()
