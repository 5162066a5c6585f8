"""A target without a model: answers in a known rhythm, fails when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from octavo.bench.target import Answer, TargetError, TargetRequest
from octavo.errors import OctavoError


class FakeTarget:
    """`pieces` tokens at a time every `pause` seconds; requests whose index is in `fails` end in an error.

    At most `slots` requests run together; the others wait, as in an engine's queue.
    """

    def __init__(
        self, *, pause: float = 0.0, pieces: int = 2, fails: Sequence[int] = (), slots: int = 1000,
        open_error: str | None = None,
    ) -> None:  # fmt: skip
        self.pause, self.pieces, self.fails, self.open_error = pause, pieces, fails, open_error
        self.slots = asyncio.Semaphore(slots)
        self.asked: list[TargetRequest] = []
        self.events: list[str] = []
        self.running = self.peak = 0

    async def open(self) -> None:
        self.events.append("open")
        if self.open_error is not None:
            raise OctavoError(self.open_error)

    async def generate(self, request: TargetRequest, answer: Answer) -> None:
        self.asked.append(request)
        async with self.slots:
            self.running += 1
            self.peak = max(self.peak, self.running)
            try:
                await self._answer(request, answer)
            finally:
                self.running -= 1

    async def _answer(self, request: TargetRequest, answer: Answer) -> None:
        answer.token_ids, answer.text = [], ""
        while len(answer.token_ids) < request.max_tokens:
            await asyncio.sleep(self.pause)
            if request.cache_salt != "warm-up" and request.index in self.fails:
                raise TargetError("engine", "told to fail")
            new = min(self.pieces, request.max_tokens - len(answer.token_ids))
            answer.token_ids += range(new)
            answer.text += "x" * new
            answer.arrived(new)
        answer.verified(3, 2)
        answer.finish_reason = "length"

    async def counters(self) -> dict[str, float]:
        return {"steps": float(len(self.asked)), "prefix_queries": 10.0, "prefix_hits": 5.0, "kv_usage": 0.25}

    def description(self) -> dict[str, Any]:
        return {"engine_version": "fake"}

    def warnings(self) -> Sequence[str]:
        return ["a fake"]

    def gpu_ids(self) -> list[int]:
        return []

    def pids(self) -> list[int]:
        return []

    async def close(self) -> None:
        self.events.append("close")
