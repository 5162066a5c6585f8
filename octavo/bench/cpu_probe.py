"""What the host did meanwhile: processor load and memory, of the machine and of the processes measured.

psutil reads them. It comes with the extra `bench`; without it the figures are absent, with that reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

PSUTIL_MISSING = "host figures need psutil: pip install 'octavo[bench]'"
_MIB = 1 << 20


class CpuProbe:
    """The machine and some of its processes. Loads are percent of one core, 0 to 100 times the cores."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.reason: str | None = None
        self.cores: int | None = None
        self._processes: list[Any] = []
        self._before: tuple[float, float, dict[int, float]] | None = None
        try:
            self._psutil: Any = importlib.import_module("psutil")
        except ImportError:
            self.reason = PSUTIL_MISSING
            return
        self.cores = self._psutil.cpu_count()
        for pid in dict.fromkeys(pids):
            try:
                self._processes.append(self._psutil.Process(pid))
            except self._psutil.Error:
                continue  # it has ended; what it did before is not ours

    def read(self, now: float) -> dict[str, float]:
        """machine_cpu, process_cpu (both since the last reading, so absent in the first), memory_used_mib
        of the machine and process_memory_mib (resident) of the processes together."""
        if self.reason is not None:
            return {}
        times = self._psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        memory = self._psutil.virtual_memory()
        found = {"memory_used_mib": (memory.total - memory.available) / _MIB}
        seconds: dict[int, float] = {}
        resident = 0
        for process in self._processes:
            try:
                with process.oneshot():
                    used = process.cpu_times()
                    resident += process.memory_info().rss
            except self._psutil.Error:
                continue
            seconds[process.pid] = used.user + used.system
        if seconds:
            found["process_memory_mib"] = resident / _MIB
        if self._before is not None and now > self._before[0] and self.cores:
            then, idle_then, seconds_then = self._before
            span = now - then
            found["machine_cpu"] = max(0.0, 100 * (self.cores - (idle - idle_then) / span))
            both = seconds.keys() & seconds_then.keys()
            if both:
                found["process_cpu"] = 100 * sum(seconds[p] - seconds_then[p] for p in both) / span
        self._before = (now, idle, seconds)
        return found
