"""AsyncLLM over the fake device: concurrency, cancellation, death."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from octavo.engine.async_engine import AsyncLLM
from octavo.errors import EngineDeadError, RequestError
from octavo.sampling_params import SamplingParams
from tests.engine.fakes import FakeParts, fake_engine, word_tokenizer
from tests.engine.test_engine import PROMPT, gold


def make(depth: int = 1, **options: Any) -> AsyncLLM:
    parts: Any = FakeParts(fake_engine(depth, tokenizer=word_tokenizer(), **options))
    return AsyncLLM.from_parts(parts)


async def collect(llm: AsyncLLM, seed: int, count: int = 8, **options: Any) -> list[int]:
    tokens: list[int] = []
    params = SamplingParams(seed=seed, max_tokens=count)
    async for output in llm.generate(PROMPT, params, kind="delta", **options):
        tokens += output.outputs[0].token_ids
    return tokens


async def idle(llm: AsyncLLM) -> None:
    """Wait until the engine has nothing to do."""
    for _ in range(500):
        if not llm._parts.engine.has_work() and llm._commands.empty():
            break
        await asyncio.sleep(0.005)
    scheduler = llm._parts.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.kv.pool.num_used == 0
    assert llm._parts.engine.num_unfinished == 0
    assert not llm._listeners


def test_many_callers_at_once() -> None:
    async def main() -> None:
        llm = make(delay=0.0005)
        found = await asyncio.gather(*(collect(llm, seed) for seed in range(20)))
        assert found == [gold(seed, 8) for seed in range(20)]
        await idle(llm)
        llm.shutdown()

    asyncio.run(main())


def test_leaving_the_iterator_aborts() -> None:
    async def main() -> None:
        llm = make(delay=0.001)
        outputs = llm.generate(PROMPT, SamplingParams(max_tokens=80))
        async for _ in outputs:
            break
        await outputs.aclose()  # type: ignore[attr-defined]
        await idle(llm)
        assert await collect(llm, 3) == gold(3, 8)
        llm.shutdown()

    asyncio.run(main())


def test_cancelling_the_task_aborts() -> None:
    async def main() -> None:
        llm = make(delay=0.002)
        tasks = [asyncio.create_task(collect(llm, seed, 80)) for seed in range(6)]
        await asyncio.sleep(0.03)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for seed, result in enumerate(results):
            if seed % 2:
                assert result == gold(seed, 80)
            else:
                assert isinstance(result, asyncio.CancelledError)
        await idle(llm)
        llm.shutdown()

    asyncio.run(main())


def test_a_bad_request_reaches_its_caller_alone() -> None:
    async def main() -> None:
        llm = make()
        good = asyncio.create_task(collect(llm, 1))
        with pytest.raises(RequestError, match="empty"):
            async for _ in llm.generate([]):
                pass
        assert await good == gold(1, 8)
        llm.shutdown()

    asyncio.run(main())


def test_a_dead_engine_tells_everybody() -> None:
    async def main() -> None:
        llm = make(delay=0.001, fail_at=5)
        results = await asyncio.gather(*(collect(llm, s, 50) for s in range(4)), return_exceptions=True)
        assert all(isinstance(r, EngineDeadError) and "flames" in str(r) for r in results), results
        assert not llm.is_alive
        with pytest.raises(EngineDeadError, match="flames"):
            await collect(llm, 9)
        llm.shutdown()

    asyncio.run(main())


def test_shutdown_tells_those_who_wait() -> None:
    async def main() -> None:
        llm = make(delay=0.002)
        task = asyncio.create_task(collect(llm, 1, 80))
        await asyncio.sleep(0.02)
        await asyncio.get_running_loop().run_in_executor(None, llm.shutdown)
        with pytest.raises(EngineDeadError, match="shut down"):
            await task

    asyncio.run(main())
