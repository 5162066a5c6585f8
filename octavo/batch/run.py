"""One offline job in an event loop of its own, and the signals that end it.

The first SIGINT (Ctrl-C) or SIGTERM asks the job to stop: it takes no more work, what is nearly done may
end, and what is finished is on the disk. A second one ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

# Calls of `in_thread` that have not ended: those of the present run, not of others of the same process.
_open_calls: ContextVar[set[object] | None] = ContextVar("octavo-open-calls", default=None)
_end_process = os._exit
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_async(main: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> tuple[T, int | None]:
    """(what `main(stop)` returns, the number of the signal that asked it to stop or None).

    Raises what `main` raises; KeyboardInterrupt after a second signal. For the main thread.
    """
    _open_calls.set(set())
    try:
        return asyncio.run(_with_signals(main))
    except KeyboardInterrupt:
        leave(exit_code(signal.SIGINT))
        raise


def leave(code: int) -> int:
    """The exit code, unless the last run left a call of `in_thread` half-done: then the process ends here
    with it.

    The interpreter's own end would take down the libraries below a model that is still being loaded.
    """
    if _open_calls.get():
        sys.stdout.flush()
        sys.stderr.flush()
        _end_process(code)
    return code


async def in_thread(call: Callable[[], T], drop: Callable[[T], None] = lambda result: None) -> T:
    """What `call` returns or raises. `drop` gets a result that nobody waits for any more.

    For calls that take long: where nobody waits, the process can end without them, as it could not with a
    thread of the event loop's own.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def tell(result: T) -> None:
        if found.cancelled():
            drop(result)
        else:
            found.set_result(result)

    def tell_error(error: BaseException) -> None:
        if not found.cancelled():
            found.set_exception(error)

    open_calls = _open_calls.get()

    def run() -> None:
        answer: Callable[[], None]
        try:
            result = call()
        except BaseException as error:  # whoever waits gets it
            answer = partial(tell_error, error)
        else:
            answer = partial(tell, result)
        if open_calls is not None:
            open_calls.discard(run)
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(answer)

    if open_calls is not None:
        open_calls.add(run)
    threading.Thread(target=run, name="octavo-load", daemon=True).start()
    return await found


async def unless_stopped(work: Awaitable[T], stop: asyncio.Event) -> T | None:
    """What `work` returns or raises; it is cancelled, and this is None, if `stop` is set before its end."""
    task = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        stopping.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)


def exit_code(number: int) -> int:
    """How a shell counts an end by this signal."""
    return 128 + number


async def _with_signals(main: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> tuple[T, int | None]:
    stop = asyncio.Event()
    came: list[int] = []
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main(stop))

    def on_signal(number: int) -> None:
        came.append(number)
        if len(came) == 1:
            stop.set()
        else:
            task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        result = await task
    except asyncio.CancelledError:
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
    return result, came[0] if came else None
