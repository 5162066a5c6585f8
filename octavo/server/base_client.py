"""What every engine client does, wherever its engine runs: let in, hand on, count, and end in order.

An implementation only carries requests to its engine (`_submit`, `_cancel`) and feeds what comes back
into the requests' streams. The rest of the protocol is here, so that a fake engine in a test behaves
like a real one at a full queue, after a time-out, or at a client's sudden end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from octavo.engine.engine_stats import EngineStats
from octavo.errors import (
    BusyError,
    EngineDeadError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    ServerDrainingError,
)
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.engine_client import ClientState, EngineClientInfo, LoadProgress, StreamKind
from octavo.server.metrics import ServerMetrics
from octavo.server.output_stream import OutputStream
from octavo.server.request_record import CURRENT_RECORD, RequestRecord
from octavo.server.security import CACHE_OWNER

MAX_RETRY_AFTER = 60
_ENDINGS_REMEMBERED = 64


@dataclass(frozen=True)
class Limits:
    """How much a client takes in. 0 is no limit."""

    max_queue: int = 1024  # sequences beyond the engine's max_num_seqs
    request_timeout: float = 0.0  # seconds from arrival


@dataclass(slots=True)
class OpenRequest:
    """A request between `_submit` and its end."""

    key: int
    prompt_ids: list[int]
    params: SamplingParams
    request_id: str
    arrival_time: float
    kind: StreamKind
    continue_prompt: bool
    prompt: str | None
    stream: OutputStream


class BaseEngineClient(ABC):
    """See EngineClient, whose methods these are."""

    def __init__(self, limits: Limits, metrics: ServerMetrics) -> None:
        self.metrics = metrics
        self._limits = limits
        self._info: EngineClientInfo | None = None
        self._progress = LoadProgress("starting")
        self._open: dict[int, OpenRequest] = {}
        self._num_sequences = 0  # of the open requests
        self._keys = itertools.count(1)
        self._is_draining = False
        self._cause: BaseException | None = None  # of its end, if it was not asked for
        self._is_ended = False
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineClientInfo] = self._loop.create_future()
        self._found: asyncio.Future[str | None] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._endings: deque[float] = deque(maxlen=_ENDINGS_REMEMBERED)

    # ------------------------------------------------------------------ of the engine

    @abstractmethod
    def _submit(self, request: OpenRequest) -> None:
        """Send a request to the engine. Raises RequestError if it cannot be sent."""

    @abstractmethod
    def _cancel(self, key: int) -> None:
        """Nobody waits for this request any more."""

    @abstractmethod
    async def stats(self, *, check_integrity: bool = False) -> EngineStats:
        """See EngineClient."""

    @abstractmethod
    async def _end(self) -> None:
        """End the engine; called once."""

    # ------------------------------------------------------------------ state

    @property
    def info(self) -> EngineClientInfo:
        """See EngineClient."""
        if self._info is None:
            raise EngineDeadError("the engine is not ready")
        return self._info

    @property
    def state(self) -> ClientState:
        """See EngineClient."""
        if self._is_ended:
            return "dead"
        if self._info is None:
            return "loading"
        return "draining" if self._is_draining else "ready"

    @property
    def progress(self) -> LoadProgress:
        """See EngineClient."""
        return self._progress

    @property
    def is_alive(self) -> bool:
        """See EngineClient."""
        return not self._is_ended

    @property
    def num_open(self) -> int:
        """See EngineClient."""
        return len(self._open)

    async def wait_ready(self) -> EngineClientInfo:
        """See EngineClient."""
        return await asyncio.shield(self._ready)

    async def wait_found(self) -> str | None:
        """See EngineClient."""
        return await asyncio.shield(self._found)

    async def wait_dead(self) -> BaseException | None:
        """See EngineClient."""
        await self._ended.wait()
        return self._cause

    def drain(self) -> None:
        """See EngineClient."""
        self._is_draining = True

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        """See EngineClient."""
        self.drain()
        if drain_seconds > 0 and not self._idle.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), drain_seconds)
        if not self._is_ended:
            self._note_end(None)
            await self._end()

    # ------------------------------------------------------------------ requests

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
        """See EngineClient."""
        owner = CACHE_OWNER.get()
        if owner is not None:
            params = params.replace(cache_salt=f"{owner}/{params.cache_salt or ''}")
        num_sequences = params.num_samples
        self._let_in(num_sequences)
        stream = OutputStream(self._loop)
        request = OpenRequest(
            next(self._keys),
            prompt_ids,
            params,
            request_id,
            arrival_time,
            kind,
            continue_prompt,
            prompt,
            stream,
        )
        key = request.key
        self._open[key] = request
        self._num_sequences += num_sequences
        self._idle.clear()
        timer = self._start_timer(request)
        record = CURRENT_RECORD.get()
        account = _Account(self.metrics, record, request)
        error: BaseException | None = None
        try:
            self._submit(request)
            is_last = False
            while not is_last:
                output = await stream.take()
                account.note(output)
                if output.finished:  # all is done before the reader, who may never come back, has it
                    is_last = True
                    self._forget(key, num_sequences)
                    account.close(output, None)
                yield output
        except (GeneratorExit, asyncio.CancelledError):
            raise
        except BaseException as raised:
            error = raised
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if self._forget(key, num_sequences):
                if not self._is_ended:
                    self._cancel(key)
                account.close(None, error)

    def _let_in(self, num_sequences: int) -> None:
        """Raise if no request is taken now, or not this many sequences more."""
        if self._is_ended:
            raise self._dead_error()
        if self._info is None:
            raise BusyError("the model is still loading", retry_after=5)
        if self._is_draining:
            self.metrics.rejected["draining"] += 1
            raise ServerDrainingError("the server is shutting down and takes no new requests", retry_after=5)
        capacity = self._info.max_num_seqs + self._limits.max_queue
        if self._num_sequences and self._num_sequences + num_sequences > capacity:
            self.metrics.rejected["queue_full"] += 1
            raise QueueFullError(
                f"the server is at its limit of {capacity} sequences, running and waiting; try again later",
                self._retry_after(),
            )

    def _retry_after(self) -> int:
        """Seconds until about half of what is open will have ended, going by the last endings."""
        if len(self._endings) < 2:
            return 5
        rate = (len(self._endings) - 1) / max(time.monotonic() - self._endings[0], 1e-3)
        return max(1, min(MAX_RETRY_AFTER, math.ceil(len(self._open) / 2 / rate)))

    def _start_timer(self, request: OpenRequest) -> asyncio.TimerHandle | None:
        limit = self._limits.request_timeout
        if not limit:
            return None
        remaining = request.arrival_time + limit - time.monotonic()
        error = RequestTimeoutError(f"the request took longer than the {limit:g} s this server allows")
        if remaining <= 0:
            request.stream.fail(error)
            return None
        return self._loop.call_later(remaining, request.stream.fail, error)

    def _forget(self, key: int, num_sequences: int) -> bool:
        """False if it was forgotten already."""
        if self._open.pop(key, None) is None:
            return False
        self._num_sequences -= num_sequences
        self._endings.append(time.monotonic())
        if not self._open:
            self._idle.set()
        return True

    # ------------------------------------------------------------------ from the engine

    def _note_progress(self, progress: LoadProgress) -> None:
        self._progress = progress

    def _note_found(self, tokenizer_path: str | None) -> None:
        if not self._found.done():
            self._found.set_result(tokenizer_path)

    def _note_ready(self, info: EngineClientInfo) -> None:
        self._note_found(info.tokenizer_path)
        self._info = info
        if not self._ready.done():
            self._ready.set_result(info)

    def _refuse(self, key: int, error: BaseException) -> None:
        request = self._open.get(key)
        if request is not None:
            request.stream.fail(error)

    def _note_end(self, cause: BaseException | None) -> None:
        """The engine has ended, or is about to; every open request hears of it."""
        if self._is_ended:
            return
        self._is_ended, self._cause = True, cause
        for request in self._open.values():
            request.stream.fail(self._dead_error())
        for waited in (self._ready, self._found):
            if not waited.done():
                waited.set_exception(cause or EngineDeadError("the server was shut down"))
                waited.exception()  # whoever waits gets it; nobody need
        self._ended.set()

    def _dead_error(self) -> EngineDeadError:
        if self._cause is None:
            return EngineDeadError("the server is shutting down")
        return EngineDeadError(f"the engine has stopped: {self._cause}")


class _Account:
    """Counts one request into the metrics and the record of the HTTP request it belongs to."""

    __slots__ = ("_kind", "_last_time", "_metrics", "_num_tokens", "_record", "_start")

    def __init__(self, metrics: ServerMetrics, record: RequestRecord | None, request: OpenRequest) -> None:
        self._metrics = metrics
        self._record = record
        self._kind = request.kind
        self._start = request.arrival_time
        self._last_time = 0.0  # of the last output with tokens; 0: there was none
        self._num_tokens = 0
        num_prompt = len(request.prompt_ids)
        metrics.num_prompt_tokens += num_prompt
        metrics.params_n.observe(request.params.n)
        if request.params.max_tokens is not None:
            metrics.params_max_tokens.observe(request.params.max_tokens)
        if record is not None:
            record.num_prompt_tokens += num_prompt
            record.num_generations += 1

    def note(self, output: RequestOutput) -> None:
        """Every output comes through here: as little as possible."""
        count = 0
        for answer in output.outputs:
            count += len(answer.token_ids)
        if count:
            self._num_tokens += count
            self._metrics.num_generation_tokens += count
            if self._kind == "delta":
                now = time.monotonic()
                if self._last_time:
                    self._metrics.inter_token.observe(now - self._last_time)
                else:
                    self._note_first(now - self._start)
                self._last_time = now

    def _note_first(self, ttft: float) -> None:
        self._metrics.ttft.observe(ttft)
        if self._record is not None:
            self._record.note_first_token()

    def close(self, last: RequestOutput | None, error: BaseException | None) -> None:
        """The request has ended: with its last output, an error, or because nobody waits any more."""
        metrics = last.metrics if last is not None else None
        reasons: list[str]
        if last is not None:
            reasons = [answer.finish_reason or "stop" for answer in last.outputs]
        elif isinstance(error, RequestError):
            reasons = []  # it never ran
            self._metrics.rejected["invalid"] += 1
        elif isinstance(error, RequestTimeoutError):
            reasons = ["timeout"]
        else:
            reasons = ["abort" if error is None else "error"]
        if self._kind == "final" and metrics is not None and metrics.ttft is not None:
            self._metrics.ttft.observe(metrics.ttft)
            if self._record is not None and self._record.ttft is None:
                self._record.ttft = metrics.ttft
        self._metrics.request_ended(reasons, metrics)
        record = self._record
        if record is None:
            return
        record.num_output_tokens += self._num_tokens
        record.finish_reasons += reasons
        if metrics is not None:
            record.num_cached_tokens += metrics.num_cached_tokens
        if error is not None:
            record.error = type(error).__name__
