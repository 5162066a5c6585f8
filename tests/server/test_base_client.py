"""What every engine client does with a request, around an engine that follows a script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from octavo.errors import (
    BusyError,
    EngineDeadError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    ServerDrainingError,
)
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.base_client import Limits
from octavo.server.output_stream import OutputStream
from octavo.server.request_record import CURRENT_RECORD, RequestRecord
from octavo.server.security import CACHE_OWNER
from tests.server.fake_engine import FakeEngineClient

Scenario = Callable[[], Awaitable[None]]


def run(scenario: Scenario) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 30)

    asyncio.run(bounded())


def ask(client: FakeEngineClient, **options: Any) -> Any:
    params = options.pop("params", SamplingParams(max_tokens=100))
    options = {"request_id": "r", "arrival_time": time.monotonic(), **options}
    return client.generate([1, 2, 3], params, **options)


async def text_of(outputs: Any) -> str:
    return "".join([output.outputs[0].text async for output in outputs])


def test_requests_of_different_owners_share_no_cache() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("one two three")

        async def salt_of(owner: str | None, salt: str | None = None) -> str | None:
            CACHE_OWNER.set(owner)
            await text_of(ask(client, params=SamplingParams(max_tokens=3, cache_salt=salt)))
            found: str | None = client.requests[-1].params.cache_salt
            return found

        assert await salt_of(None) is None
        assert await salt_of(None, "mine") == "mine"
        salts = [await salt_of(owner, salt) for owner in ("a", "b") for salt in (None, "mine", "yours")]
        assert len(set(salts)) == 6
        assert await salt_of("a") == salts[0]
        await client.shutdown()

    run(scenario)


def test_deltas_make_the_text_and_final_is_all_of_it() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("one two three")
        outputs = [output async for output in ask(client)]
        assert "".join(o.outputs[0].text for o in outputs) == "one two three"
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].metrics is not None
        (whole,) = [output async for output in ask(client, kind="final")]
        assert (whole.outputs[0].text, whole.finished) == ("one two three", True)
        assert (client.num_open, client.cancelled) == (0, [])
        assert client.metrics.finished == {"stop": 2}
        assert client.metrics.num_generation_tokens == 6
        await client.shutdown()

    run(scenario)


def test_a_slow_reader_gets_several_tokens_at_once() -> None:
    async def scenario() -> None:
        client = FakeEngineClient(" ".join("abcdefghij"))
        outputs = ask(client)
        first = await anext(outputs)
        await asyncio.sleep(0.05)  # the engine goes on meanwhile
        second = await anext(outputs)
        assert len(second.outputs[0].token_ids) > 1
        assert second.finished
        assert first.outputs[0].text + second.outputs[0].text == " ".join("abcdefghij")
        await client.shutdown()

    run(scenario)


@pytest.mark.parametrize("way", ["close", "cancel", "forget"])
def test_whoever_goes_takes_the_request_along(way: str) -> None:
    async def scenario() -> None:
        client = FakeEngineClient("a " * 1000, interval=0.05)
        outputs = ask(client)
        await anext(outputs)
        if way == "close":
            await outputs.aclose()
        elif way == "cancel":
            task = asyncio.ensure_future(anext(outputs))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            del outputs
            await asyncio.sleep(0.01)
        assert client.cancelled == [1]
        assert client.num_open == 0
        assert client.metrics.finished == {"abort": 1}
        await client.shutdown()

    run(scenario)


def test_the_last_output_ends_the_request_even_if_nobody_comes_back() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("word")
        record = RequestRecord("id", "POST", "/x")
        CURRENT_RECORD.set(record)
        outputs = ask(client)
        assert (await anext(outputs)).finished
        assert client.num_open == 0
        assert (record.num_output_tokens, record.finish_reasons) == (1, ["stop"])
        await outputs.aclose()
        assert client.cancelled == []
        assert record.finish_reasons == ["stop"]
        await client.shutdown()

    run(scenario)


def test_a_full_queue() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("a " * 50, interval=0.002, limits=Limits(max_queue=1), max_num_seqs=2)
        open_ones = [ask(client) for _ in range(3)]
        for outputs in open_ones:
            await anext(outputs)
        with pytest.raises(QueueFullError) as caught:
            await anext(ask(client))
        assert caught.value.retry_after >= 1
        await open_ones[0].aclose()
        with pytest.raises(QueueFullError):  # one place is free, and this one needs two
            await anext(ask(client, params=SamplingParams(n=2)))
        await anext(late := ask(client))
        assert client.metrics.rejected == {"queue_full": 2}
        assert len(client.requests) == 4
        for outputs in (*open_ones, late):
            await outputs.aclose()
        # Alone, a request may be larger than the queue: otherwise it could never run.
        assert await text_of(ask(client, params=SamplingParams(n=9, max_tokens=1))) != ""
        await client.shutdown()

    run(scenario)


def test_retry_after_follows_the_speed_of_the_last_endings() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("a", limits=Limits(max_queue=0), max_num_seqs=4)
        assert client._retry_after() == 5  # nothing known
        for _ in range(10):
            await text_of(ask(client))
        assert client._retry_after() == 1
        client._endings.clear()
        now = time.monotonic()
        client._endings.extend(now - 100 + 10 * i for i in range(10))  # one in ten seconds
        client._open = dict.fromkeys(range(8))  # type: ignore[assignment]
        assert 35 <= client._retry_after() <= 60
        client._open = {}
        await client.shutdown()

    run(scenario)


def test_a_request_takes_only_so_long() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("a " * 1000, interval=0.01, limits=Limits(request_timeout=0.1))
        with pytest.raises(RequestTimeoutError, match=r"0\.1 s"):
            await text_of(ask(client))
        assert client.cancelled == [1]
        assert client.metrics.finished == {"timeout": 1}
        with pytest.raises(RequestTimeoutError):  # the clock began at the arrival
            await anext(ask(client, arrival_time=time.monotonic() - 1))
        await client.shutdown()

    run(scenario)


def test_an_engine_that_dies_tells_everybody() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("a " * 1000, interval=0.001)
        readers = [asyncio.ensure_future(text_of(ask(client))) for _ in range(5)]
        await asyncio.sleep(0.02)
        client.die("it burst into flames")
        for reader in readers:
            with pytest.raises(EngineDeadError, match="flames"):
                await reader
        assert client.state == "dead"
        assert str(await client.wait_dead()) == "it burst into flames"
        with pytest.raises(EngineDeadError):
            await anext(ask(client))
        with pytest.raises(EngineDeadError):
            await client.stats()
        assert client.metrics.finished == {"error": 5}
        await client.shutdown()

    run(scenario)


def test_draining_waits_for_the_open_and_refuses_the_new() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("a " * 20, interval=0.005)
        reader = asyncio.ensure_future(text_of(ask(client)))
        await asyncio.sleep(0.02)
        ending = asyncio.ensure_future(client.shutdown(10))
        await asyncio.sleep(0)
        assert client.state == "draining"
        with pytest.raises(ServerDrainingError):
            await anext(ask(client))
        assert (await reader).startswith("a a")
        await ending
        assert await client.wait_dead() is None
        await client.shutdown(10)  # a second time is no matter

    run(scenario)


def test_draining_has_an_end() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("a " * 10000, interval=0.01)
        reader = asyncio.ensure_future(text_of(ask(client)))
        await asyncio.sleep(0.02)
        await client.shutdown(0.1)
        with pytest.raises(EngineDeadError, match="shutting down"):
            await reader

    run(scenario)


def test_nothing_is_served_before_it_is_ready() -> None:
    async def scenario() -> None:
        client = FakeEngineClient(ready=False)
        assert client.state == "loading"
        with pytest.raises(BusyError, match="loading"):
            await anext(ask(client))
        waiting = asyncio.ensure_future(client.wait_ready())
        client.get_ready()
        assert (await waiting).model == "fake"
        assert await text_of(ask(client)) == "one two three"
        await client.shutdown()

    run(scenario)


def test_a_refused_request_is_counted_as_one() -> None:
    class Picky(FakeEngineClient):
        def _submit(self, request: Any) -> None:
            raise RequestError("no", "prompt")

    async def scenario() -> None:
        client = Picky()
        with pytest.raises(RequestError):
            await anext(ask(client))
        assert client.num_open == 0
        assert client.metrics.rejected == {"invalid": 1}
        assert not client.metrics.finished
        await client.shutdown()

    run(scenario)


def test_a_record_adds_up_several_generations() -> None:
    async def scenario() -> None:
        client = FakeEngineClient("one two")
        record = RequestRecord("id", "POST", "/x")
        CURRENT_RECORD.set(record)
        await asyncio.gather(text_of(ask(client)), text_of(ask(client, kind="final")))
        assert record.num_generations == 2
        assert (record.num_prompt_tokens, record.num_output_tokens) == (6, 4)
        assert record.finish_reasons == ["stop", "stop"]
        assert record.ttft is not None
        await client.shutdown()

    run(scenario)


def test_an_error_comes_after_the_output_before_it() -> None:
    async def scenario() -> None:
        stream = OutputStream(asyncio.get_running_loop())
        for text in ("a", "b"):
            stream.put(RequestOutput("r", None, [1], outputs=[CompletionOutput(0, text, [1])]))
        stream.fail(EngineDeadError("first"))
        stream.fail(EngineDeadError("second"))
        assert (await stream.take()).outputs[0].text == "ab"
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="first"):
                await stream.take()

    run(scenario)
