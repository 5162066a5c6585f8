"""A job's event loop: long calls do not hold up its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from octavo.batch.run import in_thread, leave, run_async, unless_stopped

ROOT = Path(__file__).resolve().parents[2]


def fail() -> None:
    raise ValueError("no")


def test_a_call_in_a_thread_gives_its_result_or_raises() -> None:
    assert asyncio.run(in_thread(lambda: 7)) == 7
    with pytest.raises(ValueError, match="no"):
        asyncio.run(in_thread(fail))


def test_a_stop_does_not_wait_for_it_and_its_result_is_dropped() -> None:
    go, dropped = threading.Event(), threading.Event()

    def slow() -> int:
        go.wait()
        return 7

    async def main() -> int | None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, stop.set)
        found = await unless_stopped(in_thread(slow, lambda result: dropped.set()), stop)
        go.set()
        while not dropped.is_set():
            await asyncio.sleep(0.001)
        return found

    assert asyncio.run(main()) is None
    assert asyncio.run(unless_stopped(in_thread(lambda: 3), asyncio.Event())) == 3


def test_a_signal_is_told_and_a_second_one_ends_it() -> None:
    async def main(stop: asyncio.Event) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        return "stopped"

    async def stubborn(stop: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await stop.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    async def quick(stop: asyncio.Event) -> str:
        return "done"

    assert run_async(main) == ("stopped", signal.SIGTERM)
    assert run_async(quick) == ("done", None)
    with pytest.raises(KeyboardInterrupt):
        run_async(stubborn)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_calls_of_the_run_itself_end_the_process() -> None:
    go = threading.Event()

    async def leaves_one(stop: asyncio.Event) -> None:
        asyncio.get_running_loop().call_soon(stop.set)
        await unless_stopped(in_thread(go.wait), stop)

    async def quick(stop: asyncio.Event) -> None:
        await in_thread(lambda: None)

    try:
        run_async(leaves_one)
        with pytest.raises(AssertionError, match="ended the process with code 143"):
            leave(143)  # see tests/conftest.py
        run_async(quick)
        assert leave(143) == 143
    finally:
        go.set()


def test_the_process_ends_with_its_code_while_a_call_goes_on() -> None:
    code = (
        "import asyncio, sys, time\n"
        "from octavo.batch.run import in_thread, leave, run_async, unless_stopped\n"
        "async def main(stop):\n"
        "    asyncio.get_running_loop().call_later(0.05, stop.set)\n"
        "    await unless_stopped(in_thread(lambda: time.sleep(600)), stop)\n"
        "assert leave(5) == 5\n"
        "run_async(main)\n"
        "print('told', end='')\n"
        "leave(143)\n"
        "print('never')\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (143, b"told")
    assert time.monotonic() - began < 300
