"""The monitor of a run: a thread that samples GPUs and host between two readings of the energy counters.

Energy is the difference of the hardware's own counters over the measured window (NVML's power readings see
a part of the time only: a quarter of it on A100 and H100, arXiv 2312.02741). What the machine draws anyway
is measured before the run. `octavo.bench.monitor_result` makes figures of it; the thread also says what it
costs itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from octavo.bench.cpu_probe import CpuProbe
from octavo.bench.monitor_result import Gpu, Host, Tally, monitoring
from octavo.bench.nvml_probe import GpuProbe, probes
from octavo.platform.energy import EnergyCounter, EnergyMeter, gpu_counters, package_counters

KEPT_SNAPSHOTS = 2000  # beyond it every second one is dropped; peaks and means are made of all
_IDLE_POLL = 0.02  # seconds; the counters move every 20 to 100 ms


class Monitor:
    """Watches one run. `with` starts and stops it, or call `start` and `stop`.

    `gpu_ids` are the devices in use as CUDA numbers them in this process, None where no GPU is used; `pids`
    the processes whose load and memory count (default: this one).
    """

    def __init__(
        self,
        gpu_ids: Sequence[int] | None,
        *,
        interval: float = 0.5,
        enabled: bool = True,
        pids: Sequence[int] = (),
    ) -> None:
        self._interval = interval
        self._enabled = enabled
        self._probes: list[GpuProbe] = []
        self._why_no_gpu: list[str] = []
        self._tallies: dict[int, Tally] = {}
        self._snapshots: list[dict[str, Any]] = []
        self._stride, self._samples = 1, 0
        self._idle_gpu: dict[int, float] = {}
        self._idle_cpu: float | None = None
        self._origin = self._begin = self._end = 0.0
        self._joules: dict[str, float] = {}
        self._sampler_seconds = 0.0
        self._latest: dict[str, float] = {}
        self._last_energy: tuple[float, dict[str, float]] | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed: str | None = None
        self._lost_counters: dict[str, str] = {}
        if not enabled:
            self._cpu = CpuProbe(())
            self._meter = EnergyMeter([])
            self._why_no_gpu = ["the monitor was switched off"]
            self._why_no_package: str | None = self._why_no_gpu[0]
            self._why_no_counter: str | None = self._why_no_gpu[0]
            return
        self._cpu = CpuProbe(pids or (os.getpid(),))
        self._probes, self._why_no_gpu = probes(gpu_ids or ())
        packages, self._why_no_package = package_counters()
        gpus, self._why_no_counter = self._gpu_counters()
        self._meter = EnergyMeter([*gpus, *packages])

    def _gpu_counters(self) -> tuple[list[EnergyCounter], str | None]:
        if not self._probes:
            return [], "; ".join(self._why_no_gpu)
        used = {probe.index for probe in self._probes}
        counters, reason = gpu_counters()
        return [counter for counter in counters if counter.index in used], reason

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Monitor:
        self.start(time.monotonic())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def measure_idle(self, seconds: float = 1.0) -> None:
        """Measure what everything draws while nothing is asked of it; takes that long."""
        if not self._enabled:
            return
        edges: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {}
        tallies = {probe.index: Tally() for probe in self._probes}
        before = self._meter.read()
        start = now = time.monotonic()
        while now < start + seconds:
            joules = self._meter.read()
            for name, value in joules.items():
                if value != before[name]:  # between two of its own ticks a counter is exact
                    first = edges[name][0] if name in edges else (now, value)
                    edges[name] = (first, (now, value))
            before = joules
            for probe in self._probes:
                tallies[probe.index].add(now, probe.read())
            time.sleep(_IDLE_POLL)
            now = time.monotonic()
        watts = {
            name: (last[1] - first[1]) / (last[0] - first[0])
            for name, (first, last) in edges.items()
            if last[0] > first[0]
        }
        for probe in self._probes:
            power = watts.get(f"gpu:{probe.index}", tallies[probe.index].mean("power_w"))
            if power is not None:
                self._idle_gpu[probe.index] = power
        packages = [watts.get(counter.name) for counter in self._meter.counters if counter.kind == "cpu"]
        if packages and None not in packages:
            self._idle_cpu = sum(power for power in packages if power is not None)

    def start(self, origin: float) -> None:
        """Begin to measure; `origin` is the moment (time.monotonic) from which snapshots count."""
        if self._thread is not None:
            raise RuntimeError("the monitor runs already")
        self._origin = origin
        self._tallies = {probe.index: Tally() for probe in self._probes}
        self._snapshots.clear()
        self._stride, self._samples, self._sampler_seconds = 1, 0, 0.0
        self._joules, self._last_energy, self._lost_counters = {}, None, {}
        self._before = self._meter.read()
        self._raw = {counter.name: _raw(counter) for counter in self._meter.counters}
        self._begin = self._end = time.monotonic()
        if not self._enabled:
            return
        self._stopping.clear()
        self._thread = threading.Thread(target=self._watch, name="octavo-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the measurement; without effect if none runs."""
        if self._thread is None:
            return
        after = self._meter.read()
        self._end = time.monotonic()
        self._joules = {name: value - self._before[name] for name, value in after.items()}
        for counter in self._meter.counters:
            # The meter bridges a reading that failed and a counter that was set back; over the whole window
            # that would be joules that are missing.
            before, now = self._raw[counter.name], _raw(counter)
            if isinstance(now, str):
                self._lost_counters[counter.name] = f"{counter.name} could not be read at the end: {now}"
            elif isinstance(before, str):
                self._lost_counters[counter.name] = f"{counter.name} could not be read at the start: {before}"
            elif now < before and counter.wrap_joules is None:
                self._lost_counters[counter.name] = f"{counter.name} was set back during the run"
        self._stopping.set()
        self._thread.join()
        self._thread = None

    def latest(self) -> Mapping[str, float]:
        """The last sample, for a live view: any of watts, gpu_utilization, cpu_utilization (percent)."""
        return dict(self._latest)

    # ------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        due = time.monotonic()
        try:
            while True:
                began = time.thread_time()
                self._sample()
                self._sampler_seconds += time.thread_time() - began
                due = max(due + self._interval, time.monotonic())
                if self._stopping.wait(due - time.monotonic()):
                    break
            began = time.thread_time()
            self._sample()  # so that a curve reaches the end
            self._sampler_seconds += time.thread_time() - began
        except Exception as error:  # a defect here must not end the run, nor be hidden
            self._failed = f"sampling ended early: {type(error).__name__}: {error}"

    def _sample(self) -> None:
        now = time.monotonic()
        joules = self._meter.read()  # also often enough for a counter that wraps
        readings = {probe.index: probe.read() for probe in self._probes}
        host = self._cpu.read(now)
        for index, reading in readings.items():
            self._tallies[index].add(now, reading)
        power = self._power_since(now, joules)
        self._samples += 1
        if (self._samples - 1) % self._stride == 0:
            snapshot: dict[str, Any] = {"t": now - self._origin}
            if readings:
                snapshot["gpus"] = {str(index): reading for index, reading in readings.items()}
            if host:
                snapshot["host"] = host
            if power:
                snapshot["power_from_counter_w"] = power
            self._snapshots.append(snapshot)
            if len(self._snapshots) > KEPT_SNAPSHOTS:
                del self._snapshots[1::2]
                self._stride *= 2
        self._latest = _live(readings, host, power)

    def _power_since(self, now: float, joules: dict[str, float]) -> dict[str, float]:
        """Mean watts of each counter since the sample before."""
        before, self._last_energy = self._last_energy, (now, joules)
        if before is None or now <= before[0]:
            return {}
        return {name: (value - before[1][name]) / (now - before[0]) for name, value in joules.items()}

    # ------------------------------------------------------------------ what it found

    def result(self, total_tokens: int | None) -> dict[str, Any]:
        """`gpu_monitoring` of the result file. Every None at its top has an entry in `reasons`."""
        duration = self._end - self._begin
        gpus = []
        for probe in self._probes:
            name = f"gpu:{probe.index}"
            gpus.append(
                Gpu(
                    probe=probe,
                    tally=self._tallies.get(probe.index, Tally()),
                    joules=self._joules.get(name),
                    lost=probe.lost or self._lost_counters.get(name),
                    no_counter=self._why_no_counter,
                    idle=self._idle_gpu.get(probe.index),
                )
            )
        names = [counter.name for counter in self._meter.counters if counter.kind == "cpu"]
        lost = next((self._lost_counters[name] for name in names if name in self._lost_counters), None)
        measured = names and lost is None and self._joules
        host = Host(
            joules=sum(self._joules[name] for name in names) if measured else None,
            why_no_energy=lost or self._why_no_package or "; ".join(self._meter.missing) or "not measured",
            idle=self._idle_cpu,
            cores=self._cpu.cores,
            why_no_load=self._cpu.reason,
            samples=[snapshot["host"] for snapshot in self._snapshots if "host" in snapshot],
        )
        sampler = {
            "interval": self._interval,
            "samples": self._samples,
            "cpu_seconds": self._sampler_seconds,
            "share_of_core": self._sampler_seconds / duration if duration > 0 else None,
            "kept_every": self._stride,
            "error": self._failed,
        }
        no_gpu = "; ".join(self._why_no_gpu) or None
        return {
            **monitoring(gpus, host, duration, total_tokens, no_gpu),
            "sampler": sampler,
            "snapshots": self._snapshots,
        }


def _raw(counter: EnergyCounter) -> float | str:
    """What the counter shows, or why it shows nothing."""
    try:
        return counter.raw()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _live(
    readings: Mapping[int, Mapping[str, Any]], host: Mapping[str, float], power: Mapping[str, float]
) -> dict[str, float]:
    """The few figures of a live line. Watts of the GPUs where there are some, else of the processor."""
    live: dict[str, float] = {}
    watts = [reading["power_w"] for reading in readings.values() if "power_w" in reading]
    if watts:
        live["watts"] = sum(watts)
    elif power and not readings:
        live["watts"] = sum(power.values())
    loads = [reading["utilization"] for reading in readings.values() if "utilization" in reading]
    if loads:
        live["gpu_utilization"] = sum(loads) / len(loads)
    if "process_cpu" in host:
        live["cpu_utilization"] = host["process_cpu"]
    return live
