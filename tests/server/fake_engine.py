"""An engine client without an engine: it says what its script tells it to, a token a tick.

Everything around it is real (`BaseEngineClient`: the bounded queue, time-outs, joined deltas, metrics,
the end of everybody when the engine ends), so a server in front of it behaves as in earnest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from octavo.engine.engine_stats import EngineStats
from octavo.errors import EngineDeadError
from octavo.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from octavo.server.base_client import BaseEngineClient, Limits, OpenRequest
from octavo.server.engine_client import EngineClientInfo, LoadProgress
from octavo.server.metrics import ServerMetrics

Piece = tuple[str, int]  # a token: its text, its id

INFO = EngineClientInfo(
    model="fake",
    served_model_names=("fake",),
    model_path="/nowhere/fake",
    tokenizer_path=None,
    chat_template=None,
    trust_remote_code=False,
    max_model_len=4096,
    vocab_size=49152,
    eos_token_ids=(2,),
    dtype="float32",
    max_num_seqs=64,
    block_size=16,
    num_blocks=1024,
    speculative_method=None,
)


def words(text: str) -> list[Piece]:
    """A token a word, the space before it included."""
    parts = text.split(" ")
    return [(part if index == 0 else f" {part}", 100 + index) for index, part in enumerate(parts)]


class FakeEngineClient(BaseEngineClient):
    """`script` gives the tokens of each answer; every `interval` seconds each open request gets one.

    interval 0 emits as fast as the event loop turns. `ready` False leaves it loading until `get_ready`.
    `requests` holds every request that came, `cancelled` the keys of those that were aborted.
    """

    def __init__(
        self,
        script: str | Callable[[OpenRequest], Sequence[Piece]] = "one two three",
        *,
        interval: float = 0.0,
        limits: Limits | None = None,
        metrics: ServerMetrics | None = None,
        ready: bool = True,
        **info: Any,
    ) -> None:
        super().__init__(limits or Limits(), metrics or ServerMetrics())
        self.interval = interval
        self.requests: list[OpenRequest] = []
        self.cancelled: list[int] = []
        self.fault: str | None = None  # what check_integrity finds
        self._script = script if callable(script) else lambda request: words(script)
        self._at: dict[int, _Progress] = {}
        self._wanted_info = dataclasses.replace(INFO, **info)
        self._work = asyncio.Event()
        self._num_steps = 0
        self._task = self._loop.create_task(self._run())
        if ready:
            self.get_ready()

    def get_ready(self) -> None:
        """The model is loaded."""
        self._note_ready(self._wanted_info)

    def load(self, stage: str, fraction: float | None = None) -> None:
        """Loading has come so far."""
        self._progress = LoadProgress(stage, fraction)

    def die(self, why: str = "the device burst into flames") -> None:
        """The engine ends by itself."""
        self._task.cancel()
        self._note_end(EngineDeadError(why))

    # ------------------------------------------------------------------ of the engine

    def _submit(self, request: OpenRequest) -> None:
        pieces = list(self._script(request))
        limit = request.params.max_tokens
        reason = "stop"
        if limit is not None and len(pieces) > limit:
            pieces, reason = pieces[:limit], "length"
        self.requests.append(request)
        self._at[request.key] = _Progress(request, pieces, reason)
        self._work.set()

    def _cancel(self, key: int) -> None:
        self.cancelled.append(key)
        self._at.pop(key, None)

    async def stats(self, *, check_integrity: bool = False) -> EngineStats:
        """See EngineClient."""
        if self._is_ended:
            raise self._dead_error()
        if check_integrity and self.fault:
            raise AssertionError(self.fault)
        used = len(self._at)
        return EngineStats(used, 0, self._wanted_info.num_blocks, used, num_steps=self._num_steps)

    async def _end(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        """Step as an engine does: one token for each open request, then the next step."""
        next_tick = time.monotonic()
        while True:
            if not self._at:
                self._work.clear()
                await self._work.wait()
                next_tick = time.monotonic()
            next_tick += self.interval
            await asyncio.sleep(max(0.0, next_tick - time.monotonic()))
            self._num_steps += 1
            outputs = []
            for key, progress in list(self._at.items()):
                output = progress.step()
                if output is None:
                    continue
                if output.finished:
                    del self._at[key]
                outputs.append((progress.request, output))
            self._emit(outputs)

    def _emit(self, outputs: Sequence[tuple[OpenRequest, RequestOutput]]) -> None:
        """All outputs of a step."""
        for request, output in outputs:
            request.stream.put(output)


class _Progress:
    """How far an answer has come."""

    def __init__(self, request: OpenRequest, pieces: list[Piece], reason: str) -> None:
        self.request = request
        self._pieces = pieces
        self._reason = reason
        self._count = 0
        self._metrics = RequestMetrics(
            request.arrival_time, time.monotonic(), num_prompt_tokens=len(request.prompt_ids)
        )

    def step(self) -> RequestOutput | None:
        """What the next token brings; None if the reader gets nothing yet."""
        request, metrics, start = self.request, self._metrics, self._count
        self._count = min(start + 1, len(self._pieces))
        is_last = self._count == len(self._pieces)
        if metrics.first_token_time is None:
            metrics.first_token_time = time.monotonic()
        if request.kind == "final":
            if not is_last:
                return None
            start = 0
        if is_last:
            metrics.finished_time, metrics.num_output_tokens = time.monotonic(), self._count
        new = self._pieces[start : self._count]
        answers = [
            CompletionOutput(
                index,
                "".join(text for text, _ in new),
                [token for _, token in new],
                logprobs=self._logprobs(new),
                finish_reason=self._reason if is_last else None,  # type: ignore[arg-type]
            )
            for index in range(request.params.n)
        ]
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_ids,
            self._prompt_logprobs() if start == 0 else None,
            answers,
            is_last,
            metrics if is_last else None,
        )

    def _logprobs(self, pieces: Sequence[Piece]) -> list[dict[int, Logprob]] | None:
        wanted = self.request.params.logprobs
        if wanted is None:
            return None
        found = []
        for text, token in pieces:
            at = {token: Logprob(-0.5, 1, text)}
            at.update({token + 1 + i: Logprob(-1.0 - i, 2 + i, f"<{i}>") for i in range(wanted - 1)})
            found.append(at)
        return found

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        if self.request.params.prompt_logprobs is None:
            return None
        known = [{token: Logprob(-0.25, 1, f"[{token}]")} for token in self.request.prompt_ids[1:]]
        return [None, *known]
