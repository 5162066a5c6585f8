"""What NVML says about one GPU at one moment: power, load, memory, temperature, clocks, throttling.

A card, a driver or a container may withhold any of it. A reading that is refused once is not asked for
again, and its reason is kept; a card that falls off the bus in the middle of a run is noticed. Nothing that
could not be read ever becomes a zero.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from octavo.platform.energy import NvmlError, open_nvml, plain_uuid

NVML_MISSING = "GPU figures need nvidia-ml-py: pip install 'octavo[bench]'"

# NVML's error codes that mean "never", and "the card is gone".
_NEVER = frozenset({2, 3, 4})  # invalid argument, not supported, no permission
_GONE = frozenset({15, 6})  # GPU is lost, not found

# Bits of the clocks' event (throttle) reasons that mean that the card was slowed down.
THROTTLE_REASONS = {
    0x004: "power cap", 0x008: "hardware slowdown", 0x020: "software thermal", 0x040: "hardware thermal",
    0x080: "power brake",
}  # fmt: skip
_MIB = 1 << 20
_SM_CLOCK, _MEMORY_CLOCK, _TEMPERATURE_GPU = 1, 2, 0  # NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU


class GpuProbe:
    """One GPU. `index` is NVML's, whatever CUDA_VISIBLE_DEVICES makes of it.

    `refused` maps a reading to the reason why it is never there; `lost` is the reason why the card as a whole
    cannot be asked any more, None while it can.
    """

    def __init__(self, nvml: Any, index: int, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self.index = index
        self.refused: dict[str, str] = {}
        self.lost: str | None = None
        self.name = self._asked("name", nvml.nvmlDeviceGetName) or f"GPU {index}"
        if isinstance(self.name, bytes):
            self.name = self.name.decode(errors="replace")
        memory = self._asked("memory", nvml.nvmlDeviceGetMemoryInfo)
        self.memory_total_mib = None if memory is None else memory.total / _MIB
        limit = self._asked("power_limit", nvml.nvmlDeviceGetEnforcedPowerLimit)
        self.power_limit_w = None if limit is None else limit / 1000

    def read(self) -> dict[str, Any]:
        """Every reading there is: power_w, utilization (0 to 100), memory_used_mib, temperature_c,
        sm_clock_mhz, memory_clock_mhz, throttle (list of reasons). Absent ones are left out."""
        nvml = self._nvml
        found: dict[str, Any] = {}
        power = self._asked("power_w", nvml.nvmlDeviceGetPowerUsage)
        if power is not None:
            found["power_w"] = power / 1000
        rates = self._asked("utilization", nvml.nvmlDeviceGetUtilizationRates)
        if rates is not None:
            found["utilization"] = float(rates.gpu)
        memory = self._asked("memory_used_mib", nvml.nvmlDeviceGetMemoryInfo)
        if memory is not None:
            found["memory_used_mib"] = memory.used / _MIB
        degrees = self._asked("temperature_c", nvml.nvmlDeviceGetTemperature, _TEMPERATURE_GPU)
        if degrees is not None:
            found["temperature_c"] = float(degrees)
        for name, kind in (("sm_clock_mhz", _SM_CLOCK), ("memory_clock_mhz", _MEMORY_CLOCK)):
            clock = self._asked(name, nvml.nvmlDeviceGetClockInfo, kind)
            if clock is not None:
                found[name] = float(clock)
        bits = self._asked("throttle", self._throttle_function())
        if bits is not None:
            found["throttle"] = [text for bit, text in THROTTLE_REASONS.items() if bits & bit]
        return found

    def _throttle_function(self) -> Callable[..., Any]:
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            function = getattr(self._nvml, name, None)
            if callable(function):
                return function  # type: ignore[no-any-return]  # NVML has no types
        return _no_such_function

    def _asked(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.lost is not None or what in self.refused:
            return None
        try:
            return function(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError) as error:
            code = getattr(error, "value", None)
            if code in _GONE:
                self.lost = f"GPU {self.index} was lost: {error}"
            elif code in _NEVER or isinstance(error, AttributeError):
                self.refused[what] = f"GPU {self.index} does not tell its {what}: {error}"
            return None  # anything else passes: the next sample asks again


def _no_such_function(*_: Any) -> None:
    raise AttributeError("this version of NVML has no such function")


def probes(gpu_ids: Sequence[int]) -> tuple[list[GpuProbe], list[str]]:
    """Probes of the GPUs that CUDA numbers `gpu_ids` in this process, and why others have none."""
    if not gpu_ids:
        return [], ["no GPU was used"]
    try:
        nvml, handles = open_nvml()
    except ImportError:
        return [], [NVML_MISSING]
    except NvmlError as error:
        return [], [f"NVML shows no GPU: {error}"]
    by_uuid = {}
    for index, handle in enumerate(handles):
        try:
            by_uuid[plain_uuid(nvml.nvmlDeviceGetUUID(handle))] = index
        except nvml.NVMLError:
            continue  # it can still be found by its number
    found: list[GpuProbe] = []
    reasons = []
    for gpu in gpu_ids:
        index_of, reason = _nvml_index(gpu, by_uuid, len(handles))
        if index_of is None:
            reasons.append(reason)
        elif index_of not in [probe.index for probe in found]:
            found.append(GpuProbe(nvml, index_of, handles[index_of]))
    return found, reasons


def _nvml_index(gpu: int, by_uuid: dict[str, int], count: int) -> tuple[int | None, str]:
    """NVML's number of CUDA's device `gpu`, or why there is none.

    NVML counts in the order of the bus and knows nothing of CUDA_VISIBLE_DEVICES. The UUID decides where CUDA
    is in use in this process already; otherwise the variable is read, which is right on machines with one
    model of card (elsewhere CUDA sorts the fastest first).
    """
    uuid = _uuid_from_torch(gpu)
    if uuid is not None and uuid in by_uuid:
        return by_uuid[uuid], ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return (gpu, "") if 0 <= gpu < count else (None, f"NVML shows {count} GPUs, and no number {gpu}")
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    if not 0 <= gpu < len(entries):
        return None, f"CUDA_VISIBLE_DEVICES={visible} shows no GPU {gpu}"
    entry = entries[gpu]
    if entry.isdigit() and int(entry) < count:
        return int(entry), ""
    matches = [index for known, index in by_uuid.items() if known.startswith(plain_uuid(entry))]
    if len(matches) == 1:
        return matches[0], ""
    if entry.startswith("MIG-"):
        return None, f"{entry} is a part of a GPU, and parts have no counters of their own"
    return None, f"NVML shows no GPU {entry} (CUDA_VISIBLE_DEVICES={visible})"


def _uuid_from_torch(gpu: int) -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        return plain_uuid(torch.cuda.get_device_properties(gpu).uuid)
    except (AttributeError, RuntimeError, AssertionError):
        return None
