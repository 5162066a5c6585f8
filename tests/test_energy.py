"""Energy counters: which are found, how they are read, and what is said where there are none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.platform import energy
from octavo.platform.energy import EnergyCounter, EnergyMeter


def zone(root: Path, folder: str, name: str, microjoules: int, wrap: int = 1_000_000_000) -> Path:
    """One folder of /sys/class/powercap."""
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{wrap}\n")
    return path


def test_packages_are_read_and_their_parts_left_out(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 1)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    counters, reason = energy.package_counters(tmp_path)
    assert [(c.name, c.kind, c.index, c.wrap_joules) for c in counters] == [
        ("package:0", "cpu", 0, 1000.0),
        ("package:1", "cpu", 1, 1000.0),
    ]
    assert reason is None
    meter = EnergyMeter(counters)
    assert meter.read() == {"package:0": 0.0, "package:1": 0.0}
    (first / "energy_uj").write_text("6500000\n")
    (second / "energy_uj").write_text("7250000\n")
    assert meter.read() == {"package:0": 1.5, "package:1": 0.25}
    assert meter.total() == 1.75


def test_a_counter_that_begins_again_goes_on(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000) / "energy_uj"
    meter = EnergyMeter(energy.package_counters(tmp_path)[0])
    file.write_text("2000000\n")
    assert meter.read() == {"package:0": pytest.approx(3.0)}
    file.write_text("1000000\n")
    assert meter.total() == pytest.approx(3.0 + 999.0)


def test_a_counter_without_an_end_that_is_set_back_loses_nothing() -> None:
    values = iter([100.0, 130.0, 10.0, 15.0])
    meter = EnergyMeter([EnergyCounter("gpu:0", "gpu", 0, lambda: next(values))])
    assert [meter.total() for _ in range(3)] == [30.0, 30.0, 35.0]


def test_a_reading_that_fails_keeps_the_last_value_and_catches_up() -> None:
    answers: list[float | Exception] = [1.0, 4.0, OSError("busy"), 9.0]

    def raw() -> float:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    meter = EnergyMeter([EnergyCounter("package:0", "cpu", 0, raw)])
    assert [meter.total() for _ in range(3)] == [3.0, 3.0, 8.0]


def test_nothing_to_read_has_a_reason_and_no_zero(tmp_path: Path) -> None:
    counters, reason = energy.package_counters(tmp_path / "missing")
    assert counters == []
    assert reason is not None
    assert "powercap" in reason
    meter = EnergyMeter(counters, [reason])
    assert meter.is_empty
    assert meter.reason == reason
    assert meter.read() == {}
    with pytest.raises(ValueError, match="powercap"):
        meter.total()


def test_a_counter_of_root_alone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    counters, reason = energy.package_counters(tmp_path)
    assert counters == []
    assert reason is not None
    assert "root alone" in reason
    assert str(tmp_path / "intel-rapl:0" / "energy_uj") in reason


class FakeNvml:
    """The few functions of pynvml that are used, over GPUs in a list."""

    class NVMLError(Exception):
        """What every function raises."""

    def __init__(self, gpus: list[SimpleNamespace], *, has_driver: bool = True) -> None:
        self.gpus = gpus
        self.has_driver = has_driver

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> SimpleNamespace:
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, handle: SimpleNamespace) -> str:
        return str(handle.uuid)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: SimpleNamespace) -> int:
        if handle.energy is None:
            raise self.NVMLError("Not Supported")
        return int(handle.energy)


def test_gpus_are_found_by_uuid_and_read_in_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [SimpleNamespace(uuid=f"GPU-AB{i}", energy=1000 * i) for i in range(3)]
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(gpus))
    every = EnergyMeter(energy.gpu_counters()[0])
    assert [c.name for c in every.counters] == ["gpu:0", "gpu:1", "gpu:2"]
    one = EnergyMeter.of_gpus(["ab1"])  # as torch writes it
    gpus[1].energy += 2500
    assert one.read() == {"gpu:1": 2.5}
    assert every.total() == 2.5
    none = EnergyMeter.of_gpus(["GPU-other"])
    assert none.is_empty
    assert none.reason == "NVML shows none of the GPUs asked for"


def test_a_gpu_without_counter_or_driver_or_module_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    old = FakeNvml([SimpleNamespace(uuid="GPU-1", energy=None)])
    monkeypatch.setitem(sys.modules, "pynvml", old)
    assert energy.gpu_counters() == ([], "gpu:0 has no energy counter (Not Supported)")
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([], has_driver=False))
    assert energy.gpu_counters() == ([], "NVML shows no GPU (Driver Not Loaded)")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter.of_gpus(["x"]).reason == "GPU energy needs nvidia-ml-py: pip install 'octavo[monitor]'"
