"""An engine in the server's own process: `--in-process`, for debugging and for tests.

Steps and HTTP share one interpreter here and hold each other up; `octavo serve` without the flag puts
the engine into a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec

from octavo.engine.async_engine import AsyncLLM
from octavo.engine.engine_stats import EngineStats
from octavo.engine.process import ready_message
from octavo.engine.setup import EngineParts
from octavo.errors import EngineDeadError, OctavoError
from octavo.server.base_client import BaseEngineClient, Limits, OpenRequest
from octavo.server.engine_client import EngineClientInfo, LoadProgress
from octavo.server.metrics import ServerMetrics


class InProcessEngineClient(BaseEngineClient):
    """An EngineClient around an `AsyncLLM`."""

    def __init__(
        self, limits: Limits, metrics: ServerMetrics, *, served_model_names: tuple[str, ...] = ()
    ) -> None:
        super().__init__(limits, metrics)
        self._names = served_model_names
        self._llm: AsyncLLM | None = None
        self._pumps: dict[int, asyncio.Task[None]] = {}
        self._loading: asyncio.Task[None] | None = None

    def begin(self, engine_args: Mapping[str, Any]) -> None:
        """Start `load` and return."""
        self._loading = self._loop.create_task(self.load(engine_args))

    async def load(self, engine_args: Mapping[str, Any]) -> None:
        """Build an engine, in a thread; `wait_ready` tells how that went."""
        from octavo.config import EngineArgs
        from octavo.engine.energy_account import measure_energy
        from octavo.engine.setup import build_engine

        def tell(stage: str, fraction: float | None) -> None:
            self._loop.call_soon_threadsafe(self._note_progress, LoadProgress(stage, fraction))

        try:
            args = EngineArgs.from_kwargs(**engine_args)
            parts = await asyncio.to_thread(build_engine, args, tell)
            measure_energy(parts)
            self.serve(parts)
        except Exception as error:
            self._note_end(error)

    def serve(self, parts: EngineParts) -> None:
        """Serve an engine that was built already."""
        self._llm = AsyncLLM.from_parts(parts)
        facts = msgspec.structs.asdict(ready_message(parts))
        self._note_ready(EngineClientInfo(served_model_names=self._names or (facts["model"],), **facts))

    def _submit(self, request: OpenRequest) -> None:
        self._pumps[request.key] = self._loop.create_task(self._pump(request))

    def _cancel(self, key: int) -> None:
        pump = self._pumps.pop(key, None)
        if pump is not None:
            pump.cancel()

    async def _pump(self, request: OpenRequest) -> None:
        assert self._llm is not None
        outputs = self._llm.generate(
            {"prompt_token_ids": request.prompt_ids},
            request.params,
            kind=request.kind,
            add_special_tokens=request.continue_prompt,
        )
        is_first = True
        try:
            async with contextlib.aclosing(outputs) as stream:  # type: ignore[type-var]
                async for output in stream:
                    output.request_id, output.prompt = request.request_id, request.prompt
                    if not is_first:
                        output.prompt_logprobs = None  # they travel once, as from another process
                    is_first = False
                    request.stream.put(output)
        except OctavoError as error:
            request.stream.fail(error)
            if isinstance(error, EngineDeadError):
                self._note_end(error.__cause__ or error)
        except Exception as error:
            request.stream.fail(error)
        finally:
            self._pumps.pop(request.key, None)

    async def stats(self, *, check_integrity: bool = False) -> EngineStats:
        """See EngineClient."""
        if self._llm is None or self._is_ended:
            raise self._dead_error()
        return await self._llm.stats(check_integrity=check_integrity)

    async def _end(self) -> None:
        for pump in list(self._pumps.values()):
            pump.cancel()
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)
