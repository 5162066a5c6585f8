"""Joules are divided among the requests that ran, and come to what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.engine.energy_account import EnergyAccount
from octavo.platform.energy import EnergyCounter, EnergyMeter
from octavo.sampling_params import SamplingParams
from tests.engine.fakes import fake_engine


class Machine:
    """A clock, and a counter that moves with it: `power` watts."""

    def __init__(self, power: float = 100.0, tick: float = 0.0) -> None:
        self.now = 50.0
        self.power = power
        self._joules = 0.0
        self._tick = tick  # the counter moves in steps of so many joules
        self.num_readings = 0

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self._joules += seconds * self.power

    def raw(self) -> float:
        self.num_readings += 1
        return self._joules // self._tick * self._tick if self._tick else self._joules

    def account(self) -> EnergyAccount:
        meter = EnergyMeter([EnergyCounter("package:0", "cpu", 0, self.raw)])
        return EnergyAccount(meter, lambda: self.now)

    def steps(self, account: EnergyAccount, count: int, seconds: float, num_sequences: int) -> None:
        for _ in range(count):
            account.begin_step()
            self.pass_time(seconds)
            account.end_step(num_sequences)


def test_a_step_is_divided_among_its_sequences() -> None:
    machine = Machine()
    account = machine.account()
    machine.steps(account, 100, 0.01, 1)  # alone: all of it
    assert account.since(0.0, 1) == pytest.approx(100.0)
    mark = account.mark()
    machine.steps(account, 100, 0.01, 4)
    assert account.since(mark, 4) == pytest.approx(25.0)


def test_a_pause_is_nobodys_and_in_the_total() -> None:
    machine = Machine()
    account = machine.account()
    machine.steps(account, 20, 0.01, 1)
    machine.steps(account, 5, 0.01, 1)  # half an interval, then a pause
    machine.power = 30.0
    machine.pass_time(60.0)
    machine.power = 100.0
    mark = account.mark()
    machine.steps(account, 50, 0.01, 2)
    assert account.since(mark, 2) == pytest.approx(25.0)
    assert account.read()["package:0"] == pytest.approx(25 + 60 * 30 + 50)


def test_all_requests_come_to_what_was_measured_when_the_power_changes() -> None:
    machine = Machine()
    account = machine.account()
    told, measured = 0.0, 0.0
    for number in range(200):
        machine.power = 60.0 + 80.0 * (number % 7) / 6
        mark, num_sequences = account.mark(), 1 + number % 5
        machine.steps(account, 20, 0.013, num_sequences)
        one = account.since(mark, num_sequences)
        assert one is not None
        assert one > 0
        told += num_sequences * one
        measured += 20 * 0.013 * machine.power
    assert told == pytest.approx(measured, rel=0.02)


def test_a_request_that_ends_within_its_only_step_has_its_part_of_it() -> None:
    machine = Machine()
    account = machine.account()
    mark = account.mark()
    account.begin_step()
    machine.pass_time(0.02)
    assert account.since(mark, 2) == pytest.approx(1.0)
    machine.pass_time(0.01)
    account.end_step(2)
    assert account.since(mark, 2) == pytest.approx(1.5)


def test_there_is_no_figure_before_the_counter_moves_and_never_a_zero() -> None:
    machine = Machine(tick=10.0)
    account = machine.account()
    machine.steps(account, 5, 0.01, 1)  # 5 J: the counter stands still
    assert account.since(0.0, 1) is None
    machine.steps(account, 5, 0.01, 1)
    assert account.since(0.0, 1) == pytest.approx(10.0)


def test_readings_are_rare() -> None:
    machine = Machine()
    account = machine.account()
    before = machine.num_readings
    machine.steps(account, 10_000, 0.001, 1)
    assert machine.num_readings - before <= 101


def test_the_engine_tells_each_request_what_it_cost() -> None:
    machine = Machine()
    engine: Any = fake_engine()
    launch = engine.executor.launch

    def slow(out: Any) -> None:
        machine.pass_time(0.01)
        launch(out)

    engine.executor.launch = slow
    engine.measure_energy(machine.account())
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add_request("one", [1, 2, 3], params)
    engine.add_request("two", [1, 2, 3], params.replace(n=3, max_tokens=4))
    ended = {}
    while engine.has_work():
        for output in engine.step():
            ended[output.request_id] = output.metrics.energy_joules
    measured = engine.stats().energy_joules["package:0"]
    assert set(ended) == {"one", "two"}
    assert sum(ended.values()) == pytest.approx(measured, rel=0.05)
    assert ended["two"] == pytest.approx(measured * 3 / 8, rel=0.1)  # three of four in half of the steps
    assert ended["one"] == pytest.approx(measured * 5 / 8, rel=0.1)


def test_without_counters_there_is_no_figure() -> None:
    engine: Any = fake_engine()
    engine.add_request("one", [1, 2, 3], SamplingParams(max_tokens=2))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert outputs[-1].metrics.energy_joules is None
    assert engine.stats().energy_joules is None
