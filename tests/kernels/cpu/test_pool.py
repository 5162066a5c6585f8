"""The thread pool: every item once, whoever calls it, and no hang after a fork."""

from __future__ import annotations

import ctypes
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from octavo.kernels.cpu import library as cpu_library
from octavo.kernels.cpu.library import num_threads, set_num_threads
from octavo.kernels.cpu.linear import linear, pack

Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Iterator[None]:
    yield
    set_num_threads(1)


def parallel_for(items: int, grain: int, task: Callable[[int, int, int], None]) -> None:
    function = cpu_library._shared_library().oc_parallel_for
    function.argtypes = [ctypes.c_int64, ctypes.c_int64, Task, ctypes.c_void_p]
    function(items, grain, Task(lambda _, begin, end, thread: task(begin, end, thread)), None)


def covered(items: int, grain: int) -> list[tuple[int, int, int]]:
    """The chunks of a loop, sorted, after checking that each item came once."""
    chunks: list[tuple[int, int, int]] = []
    parallel_for(items, grain, lambda *chunk: chunks.append(chunk))
    chunks.sort()
    at = 0
    for begin, end, thread in chunks:
        assert begin == at
        assert end > begin
        assert 0 <= thread < num_threads()
        at = end
    assert at == items
    return chunks


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_item_once(threads: int) -> None:
    set_num_threads(threads)
    assert num_threads() == threads
    for items in (0, 1, 2, 5, 64, 1000):
        for grain in (1, 3, 16, 2000):
            chunks = covered(items, grain)
            assert all((end - begin) % grain == 0 or end == items for begin, end, _ in chunks)
            if items <= grain:
                assert len(chunks) <= 1


def test_workers_take_part() -> None:
    set_num_threads(2)
    threads = set()

    def task(begin: int, end: int, thread: int) -> None:
        threads.add(thread)
        time.sleep(0.002)

    for _ in range(50):
        parallel_for(8, 1, task)
        if threads == {0, 1}:
            return
    raise AssertionError(f"only threads {threads} worked")


def test_a_late_worker_is_not_waited_for() -> None:
    """After a pause the worker sleeps; loops that it misses end without it."""
    set_num_threads(2)
    covered(100, 1)
    time.sleep(0.01)  # longer than any thread spins
    for _ in range(200):
        covered(3, 1)


def test_a_loop_within_a_loop_runs_in_its_thread() -> None:
    set_num_threads(3)
    total, lock = [0], threading.Lock()

    def outer(begin: int, end: int, thread: int) -> None:
        def inner(first: int, last: int, inner_thread: int) -> None:
            with lock:
                total[0] += (last - first) * (end - begin)

        parallel_for(10, 1, inner)

    parallel_for(12, 1, outer)
    assert total[0] == 120


def test_number_of_threads_may_change_between_loops() -> None:
    for threads in (4, 1, 2, 5, 3):
        set_num_threads(threads)
        covered(500, 1)
    with pytest.raises(ValueError, match="at least 1"):
        set_num_threads(0)


def _work() -> float:
    weight = torch.ones(400, 64)
    return float(linear(torch.ones(3, 64), pack(weight)).sum())


def _child(queue: multiprocessing.Queue[float]) -> None:
    for _ in range(20):
        queue.put(_work())


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_child_works(busy: bool) -> None:
    """The parent's workers do not exist in the child; with `busy` a loop is running at the fork."""
    set_num_threads(2)
    expected = _work()
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            _work()

    other = threading.Thread(target=keep_busy)
    if busy:
        other.start()
    try:
        context = multiprocessing.get_context("fork")
        queue: multiprocessing.Queue[float] = context.Queue()
        child = context.Process(target=_child, args=(queue,))
        child.start()
        results = [queue.get(timeout=20) for _ in range(20)]
        child.join(20)
    finally:
        stop.set()
        if busy:
            other.join()
    assert child.exitcode == 0
    assert results == [expected] * 20


def test_callers_from_several_threads() -> None:
    set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(330, 50, generator=generator))
    x = torch.randn(9, 50, generator=generator)
    expected = linear(x, packed)
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda _: linear(x, packed), range(400)))
    assert all(torch.equal(result, expected) for result in results)
