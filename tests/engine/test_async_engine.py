"""AsyncLLM over the fake device: concurrency, cancellation, death."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest

from octavo.engine import engine_thread
from octavo.engine.async_engine import INLINE_CHARACTERS, AsyncLLM
from octavo.engine.engine_thread import Mailbox
from octavo.errors import EngineDeadError, RequestError
from octavo.outputs import CompletionOutput, Logprob, RequestOutput
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
        if not llm._parts.engine.has_work() and llm._engine_thread.commands.empty():
            break
        await asyncio.sleep(0.005)
    scheduler = llm._parts.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.kv.pool.num_used == 0
    assert llm._parts.engine.num_unfinished == 0
    assert not llm._engine_thread.mailboxes


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


# ---------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": [np.array([1, 2, 3])]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": b"abc"}, "prompt"),
        ({"sampling_params": {"temperature": 0}}, "sampling_params"),
        ({"request_id": ["x"]}, "request_id"),
        ({"request_id": 7}, "request_id"),
        ({"kind": "deltas"}, "kind"),
        ({"kind": ["delta"]}, "kind"),
    ],
    ids=repr,
)
def test_a_bad_argument_is_its_callers_alone(options: dict[str, Any], param: str) -> None:
    async def main() -> None:
        llm = make(delay=0.001)
        good = asyncio.create_task(collect(llm, 1, 40))
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError) as caught:
            async for _ in llm.generate(**{"prompt": PROMPT, **options}):
                pass
        assert caught.value.param == param
        assert await good == gold(1, 40)
        assert llm.is_alive
        await idle(llm)
        llm.shutdown()

    asyncio.run(main())


def test_whatever_fails_in_the_engine_thread_reaches_its_caller_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        llm = make(delay=0.001)
        good = asyncio.create_task(collect(llm, 1, 40))
        await asyncio.sleep(0.01)
        engine, admit = llm._parts.engine, llm._parts.engine.admit

        def broken(request_id: str, *given: Any, **options: Any) -> None:
            if request_id == "broken":
                raise KeyError("a bug")
            admit(request_id, *given, **options)

        monkeypatch.setattr(engine, "admit", broken)
        with pytest.raises(KeyError, match="a bug"):
            await collect(llm, 2, request_id="broken")
        assert await good == gold(1, 40)
        assert await collect(llm, 3) == gold(3, 8)
        await idle(llm)
        llm.shutdown()

    asyncio.run(main())


# ---------------------------------------------------------------------- threads and ids


@pytest.mark.parametrize("prompt", [" w1", " w1" * INLINE_CHARACTERS], ids=["short", "long"])
def test_the_engine_thread_reads_no_prompt(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        llm = make(max_model_len=2000, blocks=600)
        engine = llm._parts.engine
        readers: list[str] = []
        read = engine.read_request

        def noted(*given: Any, **options: Any) -> Any:
            readers.append(threading.current_thread().name)
            return read(*given, **options)

        monkeypatch.setattr(engine, "read_request", noted)
        async for output in llm.generate(prompt, SamplingParams(max_tokens=2), kind="final"):
            assert len(output.outputs[0].token_ids) == 2
        assert len(readers) == 1
        assert readers[0] != "octavo-engine"
        assert (readers[0] == "MainThread") == (len(prompt) <= INLINE_CHARACTERS)
        llm.shutdown()

    asyncio.run(main())


class RecordingTemplate:
    """A chat template that remembers in which threads it was rendered."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.is_busy = False

    def render(self, messages: Any, tools: Any = None, **options: Any) -> str:
        self.threads.append(threading.get_ident())
        return " w5"


def test_short_conversations_are_rendered_at_once_and_all_others_in_a_thread() -> None:
    template = RecordingTemplate()
    short = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f"}}
    elsewhere: list[tuple[Any, dict[str, Any]]] = [
        ([{"role": "user", "content": "x" * INLINE_CHARACTERS}], {}),
        ([{"role": "user", "content": "hi"}] * 30, {}),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], {}),
        ([{"role": "assistant", "content": None}], {}),
        (short, {"tools": [tool]}),
        ("no list of messages", {}),
    ]

    async def main() -> None:
        llm = make()
        vars(llm._parts)["chat_template"] = lambda given: template
        params = SamplingParams(max_tokens=2)

        async def rendered_here(messages: Any, **options: Any) -> bool:
            async for _ in llm.chat(messages, params, **options):
                pass
            return template.threads.pop() == threading.get_ident()

        assert await rendered_here(short)
        assert [await rendered_here(messages, **options) for messages, options in elsewhere] == [False] * 6
        template.is_busy = True  # another one's rendering would hold up the loop
        assert not await rendered_here(short)
        llm.shutdown()

    asyncio.run(main())


def test_ids_of_its_own_leave_those_of_the_callers_alone() -> None:
    async def main() -> None:
        llm = make(delay=0.001)
        taken = [asyncio.create_task(collect(llm, n, 60, request_id=f"auto-{n}")) for n in range(3)]
        await asyncio.sleep(0.02)
        ids = {output.request_id async for output in llm.generate(PROMPT, SamplingParams(max_tokens=2))}
        assert ids == {"auto-3"}
        with pytest.raises(RequestError, match="being served already"):
            await collect(llm, 9, request_id="auto-1")
        assert await asyncio.gather(*taken) == [gold(n, 60) for n in range(3)]
        await idle(llm)
        llm.shutdown()

    asyncio.run(main())


# ---------------------------------------------------------------------- slow and vanished consumers


def wait_for_the_engine(llm: AsyncLLM) -> None:
    """Block the consumer, and the event loop, until the engine has ended all requests."""
    engine = llm._parts.engine
    for _ in range(1000):
        if engine.num_unfinished == 0:
            return
        time.sleep(0.002)
    raise AssertionError("the engine did not end")


@pytest.mark.parametrize("kind", ["cumulative", "delta"])
def test_a_slow_consumer_finds_one_output_with_everything(kind: Any) -> None:
    async def main() -> None:
        llm = make(delay=0.001)
        params = SamplingParams(seed=5, max_tokens=50, n=2, temperature=1.0)
        outputs = llm.generate(PROMPT, params, kind=kind)
        seen: list[RequestOutput] = [await anext_(outputs)]
        wait_for_the_engine(llm)
        seen += [output async for output in outputs]
        # The first, at most one whose delivery was under way, and the rest in one.
        assert 2 <= len(seen) <= 3
        assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
        tokens: list[list[int]] = [[], []]
        texts = ["", ""]
        for output in seen:
            for one in output.outputs:
                if kind == "delta":
                    tokens[one.index] += one.token_ids
                    texts[one.index] += one.text
                else:
                    tokens[one.index], texts[one.index] = one.token_ids, one.text
        whole = [output async for output in llm.generate(PROMPT, params, kind="final")]
        assert len(whole) == 1
        assert tokens == [one.token_ids for one in whole[0].outputs]
        assert texts == [one.text for one in whole[0].outputs]
        assert [one.finish_reason for one in seen[-1].outputs] == ["length", "length"]
        await idle(llm)
        llm.shutdown()

    asyncio.run(main())


async def anext_(outputs: Any) -> RequestOutput:
    found: RequestOutput = await outputs.__anext__()
    return found


def test_deltas_are_joined_field_by_field() -> None:
    def delta(text: str, tokens: list[int], reason: Any = None) -> RequestOutput:
        logprobs = [{token: Logprob(-1.0 * token)} for token in tokens]
        one = CompletionOutput(0, text, tokens, -1.0 * sum(tokens), logprobs, finish_reason=reason)
        return RequestOutput("x", None, [1], outputs=[one], finished=reason is not None)

    async def main() -> None:
        mailbox = Mailbox(asyncio.get_running_loop(), "delta")
        for item in (delta("a", [1]), delta("", [2]), delta("bc", [3, 4], "stop")):
            assert mailbox.send(item)
        mailbox.send(EngineDeadError("later"))
        output = await mailbox.take()
        assert output.finished
        assert output.outputs == [
            CompletionOutput(
                0, "abc", [1, 2, 3, 4], -7.0, [{t: Logprob(-1.0 * t)} for t in (1, 2, 3, 4)], "stop"
            )
        ]
        with pytest.raises(EngineDeadError, match="later"):  # an error comes after what was before it
            await mailbox.take()

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["cumulative", "final"])
def test_closing_the_event_loop_aborts(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "final":  # the next output finds out; only where there is none must the loop be looked at
        monkeypatch.setattr(engine_thread, "STEPS_BETWEEN_LOOP_CHECKS", 10**9)
    llm = make(delay=0.002, max_model_len=790)
    loop = asyncio.new_event_loop()
    outputs = llm.generate(PROMPT, SamplingParams(max_tokens=780, ignore_eos=True), kind=kind)
    first = loop.create_task(anext_(outputs))
    loop.run_until_complete(asyncio.wait([first], timeout=0.1))
    assert llm._parts.engine.num_unfinished == 1
    loop._ready.clear()  # type: ignore[attr-defined]
    loop.close()
    started = time.monotonic()
    while llm._parts.engine.num_unfinished and time.monotonic() - started < 5:
        time.sleep(0.005)
    asyncio.run(idle(llm))
    assert time.monotonic() - started < 1  # 780 steps would take longer
    llm.shutdown()
    del first, outputs
    gc.collect()


# ---------------------------------------------------------------------- the end


@pytest.mark.parametrize("fail_at", [None, 3])
def test_shutdown_may_come_twice(fail_at: int | None) -> None:
    closed: list[int] = []

    async def main() -> None:
        llm = make(fail_at=fail_at)
        llm._parts.close = lambda: closed.append(1)  # type: ignore[method-assign]
        if fail_at is not None:
            with pytest.raises(EngineDeadError):
                await collect(llm, 1, 20)
        llm.shutdown()
        llm.shutdown()
        assert closed == [1]
        assert not llm.is_alive
        with pytest.raises(EngineDeadError):
            await collect(llm, 1)

    asyncio.run(main())


@pytest.mark.parametrize("fail_at", [None, 3])
def test_one_that_was_dropped_is_freed(fail_at: int | None) -> None:
    async def use(llm: AsyncLLM) -> None:
        if fail_at is None:
            assert await collect(llm, 1) == gold(1, 8)
        else:
            with pytest.raises(EngineDeadError):
                await collect(llm, 1, 20)

    llm = make(fail_at=fail_at)
    asyncio.run(use(llm))
    gone = weakref.ref(llm)
    executor: Any = llm._parts.engine.executor
    thread = llm._engine_thread._thread
    del llm
    deadline = time.monotonic() + 30
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)  # the thread may still hold the error that it has just sent, and its traceback
    assert gone() is None
    thread.join(30)
    assert not thread.is_alive()
    assert executor.is_shut_down
