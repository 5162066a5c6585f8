"""The monitor against cards that draw a known power, refuse to tell, fall off the bus, or are not there."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.bench.gpu_monitor import KEPT_SNAPSHOTS, Monitor
from octavo.platform import energy
from tests.bench.fake_nvml import LOST, NOT_SUPPORTED, Card, install


@pytest.fixture(autouse=True)
def _no_package_counter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No counter of the machine the tests run on: its energy is nobody's expectation."""
    monkeypatch.setattr("octavo.bench.gpu_monitor.package_counters", lambda: ([], "no package counter here"))


def watched(monitor: Monitor, seconds: float = 0.4, idle: float = 0.0, tokens: int = 1000) -> dict[str, Any]:
    if idle:
        monitor.measure_idle(idle)
    monitor.start(time.monotonic())
    time.sleep(seconds)
    monitor.stop()
    return monitor.result(tokens)


def assert_reasons(found: dict[str, Any]) -> None:
    """No figure is missing without a reason, and none is a zero that nobody measured."""
    for name, value in found.items():
        if value is None:
            assert found["reasons"].get(name), f"{name} is None without a reason"


def test_energy_is_the_difference_of_the_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Card(400.0, "GPU-a"), Card(250.0, "GPU-b"), Card(999.0, "GPU-unused")]
    install(monkeypatch, cards)
    found = watched(Monitor([0, 1], interval=0.05), idle=0.3)
    duration = found["duration"]
    # A counter moves by ticks, so it is off by one tick at most.
    for index, card in ((0, cards[0]), (1, cards[1])):
        assert found["total_energy_consumed"][str(index)] == pytest.approx(
            card.watts * duration, abs=card.watts * card.tick * 1.5
        )
    assert found["total_energy_all_gpus"] == pytest.approx(650 * duration, rel=0.12)
    assert found["average_power"] == pytest.approx(650, rel=0.12)
    assert found["energy_source"] == "counter"
    assert found["idle_power"] == pytest.approx(650, rel=0.12)
    assert abs(found["net_energy_all_gpus"]) < 0.25 * found["total_energy_all_gpus"]
    assert found["joules_per_token"] == pytest.approx(found["total_energy_all_gpus"] / 1000)
    assert found["tokens_per_kwh"] == pytest.approx(found["tokens_per_joule"] * 3.6e6)
    assert found["gpu_ids"] == [0, 1]
    assert (found["average_utilization"], found["peak_temperature"]) == (75, 61)
    assert found["average_memory_usage"] == 2 * 8 * 1024
    assert found["gpus"]["0"]["throttled"] == {"power cap": 1.0}
    assert not cards[2].calls or set(cards[2].calls) <= {"UUID", "TotalEnergyConsumption"}
    assert_reasons(found)
    times = [snapshot["t"] for snapshot in found["snapshots"]]
    assert times == sorted(times)
    assert found["snapshots"][1]["gpus"]["0"]["sm_clock_mhz"] == 1980


def test_a_card_without_a_counter_is_integrated_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [Card(300.0, refuses={"TotalEnergyConsumption": NOT_SUPPORTED})])
    found = watched(Monitor([0], interval=0.05))
    assert found["energy_source"] == "polled power"
    times = [snapshot["t"] for snapshot in found["snapshots"]]
    assert found["total_energy_all_gpus"] == pytest.approx(300 * (times[-1] - times[0]), rel=0.02)
    assert "no energy counter" in found["gpus"]["0"]["reasons"]["energy"]
    assert found["net_energy_all_gpus"] is None
    assert_reasons(found)


def test_what_a_card_refuses_is_none_with_the_reason_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(300.0, refuses={"PowerUsage": NOT_SUPPORTED, "TotalEnergyConsumption": NOT_SUPPORTED,
                                "Temperature": NOT_SUPPORTED})  # fmt: skip
    install(monkeypatch, [card])
    found = watched(Monitor([0], interval=0.03))
    for name in (
        "total_energy_all_gpus",
        "average_power",
        "peak_power",
        "peak_temperature",
        "joules_per_token",
    ):
        assert found[name] is None
    assert "Not Supported" in found["reasons"]["peak_temperature"]
    assert card.calls.count("Temperature") == 1
    assert card.calls.count("UtilizationRates") > 3
    assert_reasons(found)


def test_a_gpu_that_is_lost_has_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Card(300.0, "GPU-a"), Card(200.0, "GPU-b")]
    install(monkeypatch, cards)
    monitor = Monitor([0, 1], interval=0.03)
    cards[1].lost_at = time.monotonic() + 0.15
    found = watched(monitor)
    assert found["total_energy_consumed"]["0"] is not None
    assert found["total_energy_consumed"]["1"] is None
    assert found["total_energy_all_gpus"] is None, "a part is not the whole"
    assert "lost" in found["reasons"]["total_energy_all_gpus"]
    assert found["sampler"]["error"] is None
    assert_reasons(found)


def test_a_counter_that_was_set_back_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(300.0)
    install(monkeypatch, [card])
    monitor = Monitor([0], interval=0.03)
    card.set_back_at = time.monotonic() + 0.15
    found = watched(monitor)
    assert found["total_energy_all_gpus"] is None
    assert "set back" in found["reasons"]["total_energy_all_gpus"]


def test_a_package_counter_that_wraps_is_unwrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    step, wrap, calls = 10.0, 35.0, 0

    def raw() -> float:  # moves when it is read, so that no pause of the machine can hide a wrap
        nonlocal calls
        calls += 1
        return (calls * step) % wrap

    counter = energy.EnergyCounter("package:0", "cpu", 0, raw, wrap)
    monkeypatch.setattr("octavo.bench.gpu_monitor.package_counters", lambda: ([counter], None))
    monitor = Monitor(None, interval=0.03)
    before = calls
    found = watched(monitor)
    # Read once more at the start, then by the thread; beside the meter's readings there are two of the check.
    assert found["cpu"]["energy"] == pytest.approx(step * (calls - before), abs=5 * step)
    assert found["cpu"]["energy"] > wrap
    assert found["energy_of"] == "cpu packages"
    assert found["joules_per_token"] == pytest.approx(found["cpu"]["energy"] / 1000)
    assert found["total_energy_all_gpus"] is None
    assert found["reasons"]["total_energy_all_gpus"] == "no GPU was used"
    assert_reasons(found)


@pytest.mark.parametrize(
    ("visible", "gpu", "index"),
    [(None, 1, 1), ("2,0", 0, 2), ("2,0", 1, 0), ("GPU-b", 0, 1), ("GPU-c,GPU-a", 1, 0)],
)
def test_gpus_are_found_under_the_numbers_cuda_gives_them(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpu: int, index: int
) -> None:
    install(monkeypatch, [Card(1.0, "GPU-a"), Card(1.0, "GPU-b"), Card(1.0, "GPU-c")])
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert watched(Monitor([gpu], interval=0.05), 0.05)["gpu_ids"] == [index]


@pytest.mark.parametrize(
    ("visible", "reason"), [("", "shows no GPU 0"), ("MIG-1", "part of a GPU"), ("7", "no GPU 7")]
)
def test_a_gpu_that_nvml_does_not_show_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, visible: str, reason: str
) -> None:
    install(monkeypatch, [Card(1.0, "GPU-a")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = watched(Monitor([0], interval=0.05), 0.05)
    assert reason in found["reasons"]["gpus"]
    assert_reasons(found)


def test_without_nvml_and_psutil_everything_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = watched(Monitor([0], interval=0.05), 0.1)
    assert "nvidia-ml-py" in found["reasons"]["total_energy_all_gpus"]
    assert "psutil" in found["cpu"]["reasons"]["load"]
    assert found["cpu"]["average_process_cpu"] is None
    assert_reasons(found)


def test_no_tokens_and_no_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [Card(100.0)])
    found = watched(Monitor([0], interval=0.05), 0.1, tokens=0)
    assert found["joules_per_token"] is None
    assert found["reasons"]["joules_per_token"] == "no tokens were generated"
    off = watched(Monitor([0], enabled=False), 0.01)
    assert "switched off" in off["reasons"]["total_energy_all_gpus"]
    assert_reasons(off)
    assert LOST == 15


def test_long_runs_keep_peaks_and_drop_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(100.0)
    install(monkeypatch, [card])
    monitor = Monitor([0])
    monitor.start(time.monotonic())
    monitor.stop()
    for number in range(KEPT_SNAPSHOTS + 500):
        card.watts = 555.0 if number == 777 else 100.0
        monitor._sample()
    found = monitor.result(1)
    assert len(found["snapshots"]) <= KEPT_SNAPSHOTS
    assert found["sampler"]["kept_every"] == 2
    assert found["peak_power"] == 555.0
    times = [snapshot["t"] for snapshot in found["snapshots"]]
    assert times == sorted(times)


def test_the_host_is_read_and_the_sampler_is_cheap() -> None:
    monitor = Monitor(None, interval=0.1)
    monitor.start(time.monotonic())
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        sum(range(1000))
    assert monitor.latest()["cpu_utilization"] > 0
    monitor.stop()
    found = monitor.result(1)
    assert found["cpu"]["average_process_cpu"] > 0
    assert found["cpu"]["peak_process_memory"] > 10
    # Five times the default rate must stay below five times the share that is promised (1% of a core).
    assert found["sampler"]["cpu_seconds"] / found["sampler"]["samples"] < 0.005
