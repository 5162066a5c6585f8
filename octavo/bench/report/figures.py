"""The report's charts: what is drawn of a set of runs, and what is said where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from octavo.bench.record import RequestRecord, RunResult
from octavo.bench.report.intervals import Estimate, by_prompt, over_repeats, paired_ratio, ratio_over_repeats
from octavo.bench.report.svg import (
    Axis,
    Bar,
    Dot,
    Series,
    bar_chart,
    line_chart,
    marked_lines,
    scatter,
)
from octavo.bench.spec import SPECULATIVE_METHODS

_WIDE = 30.0  # largest ÷ smallest from which an axis of latencies is logarithmic
_MOST_BINS, _LEAST_BINS = 60, 10


@dataclass(frozen=True)
class Run:
    """One run as the report names it; `style` is its colour and dash everywhere."""

    label: str
    style: int
    result: RunResult
    is_baseline: bool = False


@dataclass(frozen=True)
class Figure:
    """One card: a chart, or the reasons why there is none. `runs` are those in the legend."""

    key: str
    title: str
    note: str
    chart: Markup | None
    runs: tuple[Run, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()  # (run, why it is not drawn)

    @property
    def reasons(self) -> list[str]:
        """One line for each reason: "a, b: why"; without names where it holds for all that could be drawn."""
        by_reason: dict[str, list[str]] = {}
        for run, why in self.missing:
            by_reason.setdefault(why, []).append(run)
        if self.chart is None and len(by_reason) == 1:
            return list(by_reason)
        return [f"{', '.join(names)}: {why}" if all(names) else why for why, names in by_reason.items()]


def figures(runs: Sequence[Run], reference: Run) -> list[Figure]:
    """Every chart of the report, in the order in which they are shown."""
    return [
        throughput(runs),
        speed_and_energy(runs, reference),
        _distribution(runs, "ttft", "Time to first token", lambda r: [r.ttft]),
        _distribution(runs, "tpot", "Time per output token", lambda r: [r.tpot]),
        _distribution(runs, "e2el", "End-to-end latency", lambda r: [r.latency]),
        tokens_over_time(runs),
        acceptance(runs),
        power(runs),
    ]


# ---------------------------------------------------------------------- numbers as text


def seconds(value: float | None) -> str:
    """ "1.23 s", "45.6 ms"."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f} s"
    if abs(value) >= 10:
        return f"{value:.1f} s"
    if abs(value) >= 1:
        return f"{value:.2f} s"
    scaled = value * 1e3
    return (
        f"{scaled:.0f} ms"
        if abs(scaled) >= 100
        else f"{scaled:.1f} ms"
        if scaled >= 1
        else f"{scaled:.2f} ms"
    )


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands separated."""
    if value is None:
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def times(value: float | None) -> str:
    """ "1.84×"."""
    return "–" if value is None else f"{value:.2f}×"


def _tick(value: float) -> str:
    return f"{value:g}×"


def interval(estimate: Estimate | None, show: Callable[[float | None], str]) -> str:
    """ "1.2 – 1.4", empty without an interval."""
    if estimate is None or not estimate.has_interval:
        return ""
    return f"{show(estimate.low)} – {show(estimate.high)}"


# ---------------------------------------------------------------------- figures over runs


def repeated(result: RunResult, name: str) -> list[float]:
    """A total of every repetition, or of the one run."""
    each = result.summary.get("repeats", {}).get("each", [])
    values = [one[name] for one in each if one.get(name) is not None]
    if values:
        return values
    whole = result.summary.get(name)
    return [] if whole is None else [whole]


def joules_per_token(result: RunResult) -> float | None:
    """Energy a generated token, of whatever was measured."""
    value = result.gpu_monitoring.get("joules_per_token")
    return None if value is None else float(value)


def speed_up(run: Run, reference: Run) -> Estimate | None:
    """Throughput ÷ the reference's."""
    return ratio_over_repeats(
        repeated(run.result, "overall_throughput"), repeated(reference.result, "overall_throughput")
    )


def latency_ratio(
    run: Run, reference: Run, figure: Callable[[RequestRecord], float | None]
) -> Estimate | None:
    """The reference's time ÷ the run's, over the prompts that both answered: above 1 is faster."""
    return paired_ratio(by_prompt(reference.result, figure), by_prompt(run.result, figure))


def throughput(runs: Sequence[Run]) -> Figure:
    """Generated tokens a second, as bars."""
    bars, missing = [], []
    for run in runs:
        estimate = over_repeats(repeated(run.result, "overall_throughput"))
        if estimate is None:
            missing.append((run.label, "nothing was generated"))
            continue
        bars.append(
            Bar(
                run.label,
                run.style,
                estimate.value,
                estimate.low,
                estimate.high,
                f"{number(estimate.value)} tok/s",
            )
        )
    chart = bar_chart(bars, Axis("generated tokens a second", number)) if bars else None
    with_intervals = any(bar.low is not None for bar in bars)
    note = (
        "Mean of the repetitions; whiskers: 95% t interval."
        if with_intervals
        else "One repetition each, so without an interval; --repeat 3 gives one."
    )
    return Figure("throughput", "Throughput", note, chart, missing=tuple(missing))


def _distribution(
    runs: Sequence[Run], key: str, title: str, values_of: Callable[[RequestRecord], list[float | None]]
) -> Figure:
    """Share of requests that took at most so long."""
    series, shown, missing = [], [], []
    for run in runs:
        values = sorted(
            value
            for record in run.result.requests
            if record.ok
            for value in values_of(record)
            if value is not None
        )
        if not values:
            missing.append((run.label, "not one request has it"))
            continue
        count = len(values)
        points = [(values[0], 0.0), *((value, (i + 1) / count) for i, value in enumerate(values))]
        series.append(Series(run.label, run.style, points, f"{run.label}, {count} requests"))
        shown.append(run)
    chart = None
    if series:
        low = min(each.points[0][0] for each in series)
        high = max(each.points[-1][0] for each in series)
        log = low > 0 and high / low > _WIDE
        x = Axis(
            f"{title.lower()}{' (logarithmic)' if log else ''}", seconds, None if log else 0.0, None, log
        )
        y = Axis("share of requests", lambda value: f"{value:.0%}", 0.0, 1.0)
        chart = line_chart(series, x, y, steps=True)
    return Figure(key, title, "Share of requests that took at most so long; further left is better.",
                  chart, tuple(shown), tuple(missing))  # fmt: skip


def tokens_over_time(runs: Sequence[Run]) -> Figure:
    """Tokens a second in short bins since the start of the measured part."""
    series, shown, missing = [], [], []
    for run in runs:
        arrivals = [a for record in run.result.requests for a in record.arrivals]
        last = max((moment for moment, _ in arrivals), default=0.0)
        if last <= 0:
            missing.append((run.label, "no arrivals were kept"))
            continue
        count = min(max(int(last), _LEAST_BINS), _MOST_BINS)
        width = last / count
        bins = [0.0] * count
        for moment, tokens in arrivals:
            bins[min(max(int(moment / width), 0), count - 1)] += tokens
        points = [((i + 0.5) * width, tokens / width) for i, tokens in enumerate(bins)]
        series.append(Series(run.label, run.style, points))
        shown.append(run)
    chart = None
    if series:
        chart = line_chart(
            series, Axis("time since the start", seconds, 0.0), Axis("tokens a second", number, 0.0)
        )
    return Figure("tokens", "Tokens over time", "Tokens that arrived, in bins of a second or more.",
                  chart, tuple(shown), tuple(missing))  # fmt: skip


def acceptance(runs: Sequence[Run]) -> Figure:
    """Share of drafts accepted at each position."""
    series, shown, missing = [], [], []
    for run in runs:
        rates = run.result.summary.get("acceptance_by_position") or []
        if rates:
            points = [(float(i + 1), rate) for i, rate in enumerate(rates)]
            series.append(Series(run.label, run.style, points))
            shown.append(run)
        elif run.result.method in SPECULATIVE_METHODS:
            total = run.result.summary.get("total_drafted")
            why = "nothing was drafted" if total == 0 else "the engine does not tell it by position"
            missing.append((run.label, why))
    chart = None
    if series:
        longest = max(len(each.points) for each in series)
        x = Axis(
            "position of the draft", lambda value: f"{value:.0f}", 1.0, float(max(longest, 2)), whole=True
        )
        chart = marked_lines(series, x, Axis("accepted", lambda value: f"{value:.0%}", 0.0, 1.0))
    note = "Of all drafts at a position, the share that was accepted."
    if not series and not missing:
        missing.append(("", "none of the runs speculated"))
    return Figure("acceptance", "Acceptance by position", note, chart, tuple(shown), tuple(missing))


def power(runs: Sequence[Run]) -> Figure:
    """Watts over time: of the GPUs together, or of the processor where no GPU was used."""
    series, shown, missing, idle = [], [], [], []
    for run in runs:
        monitoring = run.result.gpu_monitoring
        points = _watts(monitoring)
        if not points:
            missing.append((run.label, why_no_energy(run.result)))
            continue
        drawn = monitoring.get("idle_power")
        if drawn is not None:
            idle.append(float(drawn))
        series.append(Series(run.label, run.style, points))
        shown.append(run)
    chart = None
    if series:
        chart = line_chart(series, Axis("time since the start", seconds, 0.0), Axis("watts", number, 0.0))
    note = "GPUs together (of a CPU run: the processor package)."
    if idle:
        low, high = min(idle), max(idle)
        note += (
            f" Idle: {number(low)} W."
            if number(low) == number(high)
            else (f" Idle: {number(low)} to {number(high)} W.")
        )
    return Figure("power", "Power over time", note, chart, tuple(shown), tuple(missing))


def speed_and_energy(runs: Sequence[Run], reference: Run) -> Figure:
    """Speed-up against energy a token, both relative to the reference; bars of the speed-up alone where no
    energy was measured."""
    base = joules_per_token(reference.result)
    dots, bars, missing = [], [], []
    for run in runs:
        faster = speed_up(run, reference)
        if faster is None:
            missing.append((run.label, "no throughput to compare"))
            continue
        joules = joules_per_token(run.result)
        if base is not None and joules is not None:
            around = (faster.low, faster.high) if faster.low is not None and faster.high is not None else None
            dots.append(Dot(run.label, run.style, joules / base, faster.value, None, around))
        else:
            missing.append((run.label, f"no energy ({why_no_energy(run.result)})"))
        bars.append(Bar(run.label, run.style, faster.value, faster.low, faster.high, times(faster.value)))
    title = "Speed-up against energy"
    if len(dots) > 1:
        x, y = Axis("energy a token, relative", _tick, 0.0), Axis("throughput, relative", _tick, 0.0)
        note = f"Relative to {reference.label}; up and to the left is better."
        return Figure("energy", title, note, scatter(dots, x, y), missing=tuple(missing))
    note = f"Relative to {reference.label}. No energy was measured, so the speed-up stands alone."
    chart = bar_chart(bars, Axis("throughput, relative", _tick)) if bars else None
    return Figure("energy", title, note, chart, missing=tuple(dict.fromkeys(missing)))


def why_no_energy(result: RunResult) -> str:
    """The monitor's own reason."""
    monitoring = result.gpu_monitoring
    reasons = monitoring.get("reasons") or {}
    if not monitoring:
        return "the monitor did not run"
    return str(reasons.get("joules_per_token") or reasons.get("total_energy_all_gpus") or "not measured")


def _watts(monitoring: dict[str, object]) -> list[tuple[float, float]]:
    """(seconds, watts) of the snapshots: of the GPUs' own readings, else from the counters."""
    points = []
    snapshots = monitoring.get("snapshots")
    for snapshot in snapshots if isinstance(snapshots, list) else []:
        gpus = snapshot.get("gpus") or {}
        watts = [reading["power_w"] for reading in gpus.values() if "power_w" in reading]
        counted = snapshot.get("power_from_counter_w") or {}
        kind = "gpu:" if gpus else "package:"
        from_counter = [value for name, value in counted.items() if name.startswith(kind)]
        if watts and len(watts) == len(gpus):
            points.append((max(snapshot["t"], 0.0), sum(watts)))
        elif from_counter:
            points.append((max(snapshot["t"], 0.0), sum(from_counter)))
    return points
