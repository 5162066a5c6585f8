"""Figures of a monitored run: `gpu_monitoring` of a result file.

The share that the machine draws anyway is given beside the whole, never hidden in it: `total_energy_all_gpus`
is what the counters say, `net_energy_all_gpus` that less idle power times duration. Where a card has no
counter, polled power is integrated and `energy_source` says so. Whatever could not be measured is None, never
zero, and `reasons` says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.bench.nvml_probe import GpuProbe

UNITS = {
    "energy": "J", "power": "W", "utilization": "% of the time in which a kernel ran", "memory": "MiB",
    "temperature": "°C", "clock": "MHz", "cpu": "% of one core", "t": "s since the measured part began",
}  # fmt: skip


@dataclass
class Tally:
    """What the samples of one GPU add up to."""

    sums: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, float] = field(default_factory=dict)
    throttled: Counter[str] = field(default_factory=Counter)
    polled_joules: float = 0.0
    _last_power: tuple[float, float] | None = None

    def add(self, t: float, reading: Mapping[str, Any]) -> None:
        for name, value in reading.items():
            if name == "throttle":
                self.counts[name] += 1
                self.throttled.update(value)
                continue
            self.counts[name] += 1
            self.sums[name] += value
            self.peaks[name] = max(value, self.peaks.get(name, value))
        power = reading.get("power_w")
        if power is not None:
            if self._last_power is not None:  # the area under straight lines between samples
                then, before = self._last_power
                self.polled_joules += (t - then) * (power + before) / 2
            self._last_power = (t, power)

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if self.counts[name] else None


@dataclass(frozen=True)
class Gpu:
    """What was seen of one GPU. `joules` is its counter's difference, `lost` why it is worth nothing."""

    probe: GpuProbe
    tally: Tally
    joules: float | None
    lost: str | None
    no_counter: str | None
    idle: float | None  # watts


@dataclass(frozen=True)
class Host:
    """What was seen of the processors and the processes."""

    joules: float | None
    why_no_energy: str
    idle: float | None  # watts
    cores: int | None
    why_no_load: str | None
    samples: Sequence[Mapping[str, float]]


def monitoring(
    seen: Sequence[Gpu], host: Host, duration: float, total_tokens: int | None, no_gpu: str | None
) -> dict[str, Any]:
    """The figures; `no_gpu` is why GPUs are missing, `duration` in seconds."""
    gpus = {str(gpu.probe.index): _gpu(gpu, duration) for gpu in seen}
    cpu = _cpu(host, duration)
    reasons: dict[str, str] = {"gpus": no_gpu} if no_gpu else {}
    found: dict[str, Any] = {
        "gpu_ids": [gpu.probe.index for gpu in seen],
        "duration": duration,
        "total_energy_consumed": {name: gpu["energy"] for name, gpu in gpus.items()} or None,
        "total_energy_all_gpus": _total(gpus, "energy"),
        "net_energy_all_gpus": _total(gpus, "net_energy"),
        "energy_source": _one_source(gpus),
        "idle_power": _total(gpus, "idle_power"),
        "average_power": _total(gpus, "average_power"),
        "peak_power": _total(gpus, "peak_power"),
        "average_utilization": _mean(gpus, "average_utilization"),
        "average_memory_usage": _total(gpus, "average_memory_usage"),
        "peak_memory_usage": _total(gpus, "peak_memory_usage"),
        "peak_temperature": _peak(gpus, "peak_temperature"),
    }
    for name, value in found.items():
        if value is None:
            reasons[name] = no_gpu or _first_reason(gpus, name) or "the run was too short to sample it"
    basis = "gpus" if gpus else "cpu packages"
    if gpus:
        energy, net = found["total_energy_all_gpus"], found["net_energy_all_gpus"]
        why = reasons.get("total_energy_all_gpus")
    else:
        energy, net = cpu["energy"], cpu["net_energy"]
        why = "; ".join(dict.fromkeys(each for each in (no_gpu, cpu["reasons"].get("energy")) if each))
    found["energy_of"] = None if energy is None else basis
    found.update(_per_token(energy, net, total_tokens, why or "not measured", reasons))
    if energy is None:
        reasons["energy_of"] = why or "not measured"
    return {**found, "gpus": gpus, "cpu": cpu, "units": UNITS, "reasons": reasons}


def _gpu(seen: Gpu, duration: float) -> dict[str, Any]:
    tally, idle = seen.tally, seen.idle
    reasons = dict(seen.probe.refused)
    energy, source = None, None
    if seen.lost:
        reasons["energy"] = seen.lost
    elif seen.joules is not None:
        energy, source = seen.joules, "counter"
    else:
        reasons["energy"] = seen.no_counter or "there is no energy counter"
        if tally.counts["power_w"] > 1:
            energy, source = tally.polled_joules, "polled power"
    if idle is None:
        reasons["idle_power"] = reasons.get("power_w", "idle power was not measured")
    average = tally.mean("power_w")
    if energy is not None and source == "counter" and duration > 0:
        average = energy / duration
    sampled = tally.counts["throttle"]
    return {
        "name": seen.probe.name,
        "memory_total": seen.probe.memory_total_mib,
        "power_limit": seen.probe.power_limit_w,
        "energy": energy,
        "energy_source": source,
        "net_energy": None if energy is None or idle is None else energy - idle * duration,
        "idle_power": idle,
        "average_power": average,
        "peak_power": tally.peaks.get("power_w"),
        "average_utilization": tally.mean("utilization"),
        "average_memory_usage": tally.mean("memory_used_mib"),
        "peak_memory_usage": tally.peaks.get("memory_used_mib"),
        "peak_temperature": tally.peaks.get("temperature_c"),
        "average_sm_clock": tally.mean("sm_clock_mhz"),
        "average_memory_clock": tally.mean("memory_clock_mhz"),
        "throttled": {why: number / sampled for why, number in tally.throttled.items()} if sampled else None,
        "reasons": reasons,
    }


def _cpu(host: Host, duration: float) -> dict[str, Any]:
    reasons: dict[str, str] = {}
    if host.joules is None:
        reasons["energy"] = host.why_no_energy
    elif host.idle is None:
        reasons["net_energy"] = reasons["idle_power"] = "idle power was not measured"
    if host.why_no_load:
        reasons["load"] = host.why_no_load
    energy, idle = host.joules, host.idle
    memory = [sample["process_memory_mib"] for sample in host.samples if "process_memory_mib" in sample]
    return {
        "energy": energy,
        "net_energy": None if energy is None or idle is None else energy - idle * duration,
        "idle_power": idle,
        "average_power": None if energy is None or duration <= 0 else energy / duration,
        "cores": host.cores,
        "average_process_cpu": _average(host.samples, "process_cpu"),
        "average_machine_cpu": _average(host.samples, "machine_cpu"),
        "peak_process_memory": max(memory, default=None),
        "reasons": reasons,
    }


def _per_token(
    energy: float | None, net: float | None, tokens: int | None, why: str, reasons: dict[str, str]
) -> dict[str, float | None]:
    """Joules a token and its relatives; what cannot be said goes to `reasons`."""
    figures: dict[str, float | None] = dict.fromkeys(
        ("tokens_per_joule", "joules_per_token", "tokens_per_kwh", "net_joules_per_token")
    )
    if energy is not None:
        if not tokens:
            why = "no tokens were generated"
        elif energy <= 0:
            why = "the counter did not move: the run was too short for it"
        else:
            figures["tokens_per_joule"] = tokens / energy
            figures["joules_per_token"] = energy / tokens
            figures["tokens_per_kwh"] = tokens / energy * 3.6e6
            figures["net_joules_per_token"] = None if net is None else net / tokens
            why = "idle power was not measured"
    reasons.update({name: why for name, value in figures.items() if value is None})
    return figures


def _values(gpus: Mapping[str, Mapping[str, Any]], name: str) -> list[float] | None:
    """The figure of every GPU; None if one of them has none, since a part is not the whole."""
    values = [gpu[name] for gpu in gpus.values()]
    return None if not values or any(value is None for value in values) else values


def _total(gpus: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    values = _values(gpus, name)
    return None if values is None else sum(values)


def _mean(gpus: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    values = _values(gpus, name)
    return None if values is None else sum(values) / len(values)


def _peak(gpus: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    values = _values(gpus, name)
    return None if values is None else max(values)


def _one_source(gpus: Mapping[str, Mapping[str, Any]]) -> str | None:
    sources = {gpu["energy_source"] for gpu in gpus.values()}
    if not sources or None in sources:
        return None
    return " and ".join(sorted(sources))


# The name of a figure of all GPUs -> the reading of one GPU that it is made of.
_READINGS = {
    "total_energy_all_gpus": "energy", "net_energy_all_gpus": "energy", "total_energy_consumed": "energy",
    "energy_source": "energy", "idle_power": "idle_power", "average_power": "power_w",
    "peak_power": "power_w",
    "average_utilization": "utilization", "average_memory_usage": "memory_used_mib",
    "peak_memory_usage": "memory_used_mib", "peak_temperature": "temperature_c",
}  # fmt: skip


def _first_reason(gpus: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    reading = _READINGS.get(name, name)
    for gpu in gpus.values():
        why = gpu["reasons"].get(reading)
        if why is None and name == "net_energy_all_gpus":
            why = gpu["reasons"].get("idle_power")
        if why is not None:
            return str(why)
    return None


def _average(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None
