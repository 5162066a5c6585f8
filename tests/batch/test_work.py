"""Items are kept in flight, no more than the window, and each ends in a result."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.batch import work
from octavo.batch.work import Result, WorkItem, run_items, seed_of, window_of
from octavo.errors import EngineDeadError, RequestError
from octavo.sampling_params import SamplingParams
from tests.batch.fakes import FakeWorkers, Flaky, fake_info

PARAMS = SamplingParams(max_tokens=4)


def items(count: int) -> Iterator[WorkItem]:
    for i in range(count):
        yield WorkItem(f"k{i}", [i], PARAMS)


def collect(workers: FakeWorkers, source: Any, **options: Any) -> list[Result]:
    async def main() -> list[Result]:
        return [result async for result in run_items(workers, source, **options)]

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "RETRY_SECONDS", 0.001)


def test_every_item_has_one_result_and_the_window_is_filled() -> None:
    workers = FakeWorkers(delay=lambda item: 0.001 * (int(item.key[1:]) % 3))
    results = collect(workers, items(100), window=7)
    assert sorted(result.item.key for result in results) == sorted(f"k{i}" for i in range(100))
    assert workers.most_open == 7
    assert workers.num_open == 0


def test_items_are_taken_when_there_is_room() -> None:
    taken: list[int] = []

    def source() -> Iterator[WorkItem]:
        for i, item in enumerate(items(1000)):
            taken.append(i)
            yield item

    async def main() -> None:
        results = run_items(FakeWorkers(), source(), window=10)
        async for _ in results:
            break
        await results.aclose()

    asyncio.run(main())
    assert len(taken) <= 21


def test_the_order_is_that_of_the_ends() -> None:
    workers = FakeWorkers(delay=lambda item: 0.05 if item.key == "k0" else 0.0)
    results = collect(workers, items(5), window=5)
    assert results[-1].item.key == "k0"


def test_a_request_that_cannot_be_served_is_not_tried_again() -> None:
    workers = FakeWorkers(fault=lambda item, attempt: RequestError("no") if item.key == "k1" else None)
    results = {result.item.key: result for result in collect(workers, items(3))}
    assert isinstance(results["k1"].error, RequestError)
    assert results["k1"].num_attempts == workers.attempts["k1"] == 1
    assert results["k0"].output is not None


@pytest.mark.parametrize(("num_faults", "succeeds"), [(2, True), (3, False)])
def test_a_failure_is_tried_again_so_many_times(num_faults: int, succeeds: bool) -> None:
    workers = FakeWorkers(
        fault=lambda item, attempt: Flaky("now") if item.key == "k1" and attempt <= num_faults else None
    )
    results = {result.item.key: result for result in collect(workers, items(3), max_retries=2)}
    assert (results["k1"].output is not None) == succeeds
    assert (results["k1"].error is None) == succeeds
    assert results["k1"].num_attempts == 3


def test_a_dead_engine_ends_the_job() -> None:
    workers = FakeWorkers(fault=lambda item, attempt: EngineDeadError("gone") if item.key == "k5" else None)
    with pytest.raises(EngineDeadError, match="gone"):
        collect(workers, items(50), window=4)
    assert workers.num_open == 0


def test_after_a_stop_nothing_is_begun_and_what_is_slow_is_aborted() -> None:
    async def main() -> tuple[list[str], FakeWorkers]:
        stop = asyncio.Event()
        workers = FakeWorkers(delay=lambda item: 60.0 if item.key == "k1" else 0.005)
        keys = []
        async for result in run_items(workers, items(1000), window=4, stop=stop, stop_seconds=0.1):
            keys.append(result.item.key)
            if len(keys) == 10:
                stop.set()
        return keys, workers

    keys, workers = asyncio.run(main())
    assert 10 <= len(keys) <= 17
    assert "k1" not in keys
    assert workers.num_open == 0


def test_a_stop_before_the_start_does_nothing() -> None:
    async def main() -> list[Result]:
        stop = asyncio.Event()
        stop.set()
        await asyncio.sleep(0)
        return [result async for result in run_items(FakeWorkers(), items(3), stop=stop, window=1)]

    assert asyncio.run(main()) == []


def test_the_window_leaves_no_place_empty() -> None:
    assert window_of(fake_info(max_num_seqs=8)) > 8
    assert window_of(fake_info(max_num_seqs=128)) == 160


def test_seeds_depend_on_all_parts_and_on_nothing_else() -> None:
    assert seed_of(42, "user", 3, 0) == 2182403690375150  # written into results: never changes
    seeds = {seed_of(42, "user", i, j) for i in range(20) for j in range(20)}
    assert len(seeds) == 400
    assert seed_of("1", 2) != seed_of(1, "2")
    assert all(0 <= seed < 2**53 for seed in seeds)
