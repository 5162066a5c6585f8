"""Joules, from the counters of the hardware: NVIDIA GPUs through NVML, processors through Linux' powercap.

    meter = EnergyMeter.of_machine()      # or of_gpus(uuids), of_processor()
    meter.read()                          # {"gpu:0": 1234.5, "package:0": 98.7} since the meter was made
    meter.reason                          # why there is nothing to read, where that is so

A counter covers the whole GPU, or the whole processor package with all that runs on it. NVML's counter
exists since Volta and moves about every 20 to 100 ms; powercap's needs the right to read `energy_uj`,
which most systems leave to root. What cannot be measured is absent, with the reason, and never zero.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyCounter:
    """One counter of the hardware. `raw` gives joules that grow, and begin again behind `wrap_joules`."""

    name: str  # "gpu:0", "package:0"
    kind: Literal["gpu", "cpu"]
    index: int  # NVML's index, the package's number
    raw: Callable[[], float]
    wrap_joules: float | None = None  # None: it never begins again


class EnergyMeter:
    """Joules of several counters since the meter was made. Any thread may read.

    A counter that wraps (powercap's, every few hours at full load of a small processor, every half hour
    of a large one) must be read at least once between two wraps.
    """

    def __init__(self, counters: Sequence[EnergyCounter], missing: Sequence[str] = ()) -> None:
        """`missing` are the reasons, one a source, why others are not there."""
        self.missing = tuple(missing)
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._total: dict[str, float] = {}
        counters_that_read = []
        for counter in counters:
            try:
                self._last[counter.name] = counter.raw()
            except Exception as error:
                self.missing += (f"{counter.name} cannot be read: {error}",)
                continue
            self._total[counter.name] = 0.0
            counters_that_read.append(counter)
        self.counters = tuple(counters_that_read)

    @classmethod
    def of_machine(cls) -> EnergyMeter:
        """Every GPU that NVML shows, and every processor package."""
        gpus, no_gpu = gpu_counters()
        packages, no_package = package_counters()
        return cls([*gpus, *packages], [reason for reason in (no_gpu, no_package) if reason])

    @classmethod
    def of_gpus(cls, uuids: Iterable[str]) -> EnergyMeter:
        """These GPUs alone; torch tells a device's UUID, whatever CUDA_VISIBLE_DEVICES says."""
        counters, reason = gpu_counters(uuids)
        return cls(counters, [reason] if reason else [])

    @classmethod
    def of_processor(cls) -> EnergyMeter:
        """The processor packages alone."""
        counters, reason = package_counters()
        return cls(counters, [reason] if reason else [])

    @property
    def is_empty(self) -> bool:
        """True where nothing can be measured; `reason` says why."""
        return not self.counters

    @property
    def reason(self) -> str | None:
        """Why nothing can be measured; None if something can."""
        return None if self.counters else "; ".join(self.missing) or "no counter was asked for"

    def read(self) -> dict[str, float]:
        """Joules of each counter since the meter was made.

        A counter that fails now and then keeps its last value, and catches up at the next reading.
        """
        with self._lock:
            for counter in self.counters:
                try:
                    now = counter.raw()
                except Exception:  # a driver's hiccup must not end what is measured
                    continue
                step = now - self._last[counter.name]
                if step < 0:
                    # Behind its end; or set back, by a driver that was loaded again.
                    step = step + counter.wrap_joules if counter.wrap_joules else 0.0
                self._last[counter.name] = now
                self._total[counter.name] += step
            return dict(self._total)

    def total(self) -> float:
        """Joules of all counters together. Raises ValueError for a meter without any."""
        if not self.counters:
            raise ValueError(f"no energy counter: {self.reason}")
        return sum(self.read().values())


class NvmlError(Exception):
    """NVML is installed and does not answer: there is no driver, or it is not ours to ask."""


def open_nvml() -> tuple[Any, list[Any]]:
    """(the module, its handles of all GPUs in NVML's order).

    Raises ImportError where nvidia-ml-py is not installed, NvmlError where it finds no driver.
    """
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()  # counted by NVML, and never undone: a reader may live as long as the process
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise NvmlError(str(error)) from error


def gpu_counters(uuids: Iterable[str] | None = None) -> tuple[list[EnergyCounter], str | None]:
    """Counters of NVIDIA GPUs, all or those with these UUIDs, and the reason for those that are missing."""
    wanted = None if uuids is None else {plain_uuid(uuid) for uuid in uuids}
    try:
        nvml, handles = open_nvml()
    except ImportError:
        return [], "GPU energy needs nvidia-ml-py: pip install 'octavo[monitor]'"
    except NvmlError as error:
        return [], f"NVML shows no GPU ({error})"
    counters, reasons = [], []
    for index, handle in enumerate(handles):
        if wanted is not None and plain_uuid(nvml.nvmlDeviceGetUUID(handle)) not in wanted:
            continue
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            reasons.append(f"gpu:{index} has no energy counter ({error})")
            continue
        counters.append(EnergyCounter(f"gpu:{index}", "gpu", index, _millijoules(nvml, handle)))
    if not counters and not reasons:
        reasons.append("NVML shows none of the GPUs asked for" if wanted else "NVML shows no GPU")
    return counters, "; ".join(reasons) or None


def package_counters(root: Path = _POWERCAP) -> tuple[list[EnergyCounter], str | None]:
    """Counters of the processor packages, and the reason if there is none.

    Memory (dram) and the parts of a package are left out: the first is not everywhere, the others are
    in their package already. So is `psys`, the whole board.
    """
    if not root.is_dir():
        return [], "processor energy needs Linux' powercap, which this system does not show"
    counters, reasons = [], []
    for zone in sorted(root.glob("*-rapl:*")):
        # intel-rapl:0 is a package (on AMD as well), intel-rapl:0:1 a part of it; the memory-mapped
        # intel-rapl-mmio:0 is the same counter again.
        prefix, _, number = zone.name.partition(":")
        if prefix != "intel-rapl" or not number.isdigit():
            continue
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            if not name.startswith("package"):
                continue
            _microjoules(zone / "energy_uj")()
            wrap = _microjoules(zone / "max_energy_range_uj")()
        except PermissionError:
            reasons.append(f"{zone / 'energy_uj'} may be read by root alone; chmod a+r it to measure")
            continue
        except (OSError, ValueError) as error:
            reasons.append(f"{zone} cannot be read: {error}")
            continue
        package = name.rpartition("-")[2]
        index = int(package) if package.isdigit() else int(number)
        raw = _microjoules(zone / "energy_uj")
        counters.append(EnergyCounter(f"package:{index}", "cpu", index, raw, wrap))
    if not counters and not reasons:
        reasons.append("powercap shows no processor package")
    return counters, "; ".join(reasons) or None


def _millijoules(nvml: Any, handle: Any) -> Callable[[], float]:
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def _microjoules(file: Path) -> Callable[[], float]:
    return lambda: int(file.read_text(encoding="ascii")) / 1e6


def plain_uuid(uuid: object) -> str:
    """A UUID as torch and NVML both can be brought to write it."""
    text = uuid.decode() if isinstance(uuid, bytes) else str(uuid)
    return text.removeprefix("GPU-").lower()
