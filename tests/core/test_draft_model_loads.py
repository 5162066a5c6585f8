"""The draft budget with a draft model at the loads of one H200: against fixed numbers, and against none.

The costs are those of a measured machine (draft_simulation.H200), the acceptance that of the benchmark. A
budget that has served one request and sixteen knows what drafts are worth; what it may get wrong is their
price, and that is what these loads differ in.
"""

from __future__ import annotations

import random
from functools import cache

import pytest

from tests.core.draft_simulation import H200
from tests.core.timed_device import TimedEngine, TimedStep

RATES = (0.80, 0.66 / 0.80, 0.55 / 0.66, 0.46 / 0.55, 0.38 / 0.46)
ERROR = 0.02  # of what the start measured
SEED = 3
Load = tuple[tuple[int, int], ...]


def alike(requests: int) -> Load:
    return ((512, 256),) * requests


def many() -> Load:
    source = random.Random(SEED)
    return tuple((source.randint(100, 1024), source.randint(100, 1024)) for _ in range(256))


def seconds(steps: list[TimedStep]) -> float:
    return sum(step.seconds for step in steps)


@cache
def plain(load: Load) -> float:
    return seconds(TimedEngine(H200, RATES, SEED, fixed=0).run(load))


def experienced(seed: int = SEED) -> TimedEngine:
    engine = TimedEngine(H200, RATES, seed, error=ERROR)
    for luck in range(3):
        engine.run(alike(1), luck + 100)
    engine.run(alike(16), 100)
    return engine


def expected_tokens(drafts: int) -> float:
    tokens = chance = 1.0
    for position in range(drafts):
        chance *= RATES[min(position, len(RATES) - 1)]
        tokens += chance
    return tokens


def expected_rate(engine: TimedEngine, runs: int) -> float:
    """What the choices for one request would bring on average: luck decides over percents of so few steps."""
    tokens = taken = 0.0
    for luck in range(runs):
        for step in engine.run(alike(1), luck)[1:-1]:
            tokens += expected_tokens(step.rows - 1)
            taken += step.seconds
    return tokens / taken


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_request_gets_the_best_number(seed: int) -> None:
    best = max(expected_rate(TimedEngine(H200, RATES, seed, fixed=fixed), 1) for fixed in range(2, 8))
    engine = TimedEngine(H200, RATES, seed, error=ERROR)
    assert expected_rate(engine, 3) > 0.95 * best  # while it learns
    assert expected_rate(engine, 9) > 0.985 * best


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sixteen_requests_are_within_two_percent_of_the_best_number(seed: int) -> None:
    best = min(
        seconds(TimedEngine(H200, RATES, seed, fixed=fixed).run(alike(16), seed)) for fixed in (2, 3, 4)
    )
    auto = seconds(experienced(seed).run(alike(16), seed))
    assert auto < 1.02 * best
    assert auto < 0.8 * plain(alike(16))


def test_sixty_four_requests_gain_a_little_and_nobody_is_left_behind() -> None:
    steps = experienced().run(alike(64))
    assert seconds(steps) < 0.99 * plain(alike(64))
    decoding = [step for step in steps if not step.chunk_rows and step.requests == 64]
    # all have caught up: later every request has its drafts, but for a window of plain steps
    late = decoding[len(decoding) // 2 :]
    assert sum(step.rows >= 128 for step in late) > 0.8 * len(late)


def test_the_prompts_of_a_crowd_are_not_caught_up_with() -> None:
    """Who joins with them changes the load, and with it what drafts are worth."""
    steps = experienced().run(alike(64))
    crowded = [step for step in steps if step.chunk_rows > 7000]
    assert len(crowded) == 4
    assert not any(step.passes for step in crowded)


def test_a_full_engine_is_as_fast_as_without_a_draft_model() -> None:
    load = many()
    steps = experienced().run(load)
    assert seconds(steps) < plain(load) / 0.99
    full = [step for step in steps if step.requests > 128 and not step.chunk_rows]
    assert sum(step.draft_seconds for step in full) < 0.005 * seconds(full)
    assert any(step.passes for step in steps[-50:])  # the last ones draft again
