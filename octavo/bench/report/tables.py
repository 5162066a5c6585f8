"""The report's tables: one row a run, every figure with how sure it is and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.bench.equality import Comparison
from octavo.bench.record import RunResult
from octavo.bench.report import figures as fig
from octavo.bench.report.figures import Run, interval, latency_ratio, number, seconds, speed_up, times
from octavo.bench.report.intervals import Estimate, bootstrap, by_prompt, median, over_repeats, quantile95

_SHOWN_FAILURES = 5


@dataclass(frozen=True)
class Cell:
    """One figure of a table; `sub` is smaller and stands below it, `tip` says how it was made."""

    text: str
    sub: str = ""
    tip: str = ""
    kind: str = ""  # "" | good | bad | muted


COLUMNS = (
    "run", "requests", "throughput", "time to first token", "time per output token", "latency",
    "accepted drafts", "energy a token", "outputs",
)  # fmt: skip
AGAINST = (
    "run", "throughput", "latency, prompt by prompt", "time per output token, prompt by prompt",
    "tokens a joule",
)  # fmt: skip


def row(run: Run, reference: Run, comparisons: Sequence[Comparison]) -> list[Cell]:
    result, summary = run.result, run.result.summary
    failed = len(result.failures)
    rate = over_repeats(fig.repeated(result, "overall_throughput"))
    count = summary.get("repeats", {}).get("count", 1)
    cells = [
        Cell(
            f"{summary.get('total_requests', len(result.requests)):,}",
            f"{failed} failed" if failed else (f"{count} repetitions" if count > 1 else ""),
            kind="bad" if failed else "",
        ),
        Cell(
            "–" if rate is None else f"{number(rate.value)} tok/s",
            interval(rate, number),
            rate.method if rate else "",
        ),
    ]
    for figure in ("ttft", "tpot", "latency"):
        values = list(by_prompt(result, lambda record, name=figure: getattr(record, name)).values())  # type: ignore[misc]
        middle, tail = bootstrap(values, median), bootstrap(values, quantile95)
        cells.append(
            Cell(
                seconds(middle.value if middle else None),
                f"{interval(middle, seconds)}\n" + (f"p95 {seconds(tail.value)}" if tail else ""),
                f"median over prompts; {middle.method}"
                if middle and middle.method
                else "median over prompts",
            )
        )
    cells += [_accepted(summary), _energy(result), _outputs(run, reference, comparisons)]
    return cells


def _accepted(summary: Mapping[str, Any]) -> Cell:
    rate, length = summary.get("avg_acceptance_rate"), summary.get("mean_acceptance_length")
    if rate is None:
        return Cell("–", "", "no drafts, or the engine does not tell", "muted")
    drafted, accepted = summary.get("total_drafted"), summary.get("total_accepted")
    tip = f"{accepted:,} of {drafted:,} drafts" if drafted is not None and accepted is not None else ""
    return Cell(f"{rate:.0%}", f"{length:.2f} tokens a step" if length else "", tip)


def _energy(result: RunResult) -> Cell:
    joules = fig.joules_per_token(result)
    if joules is None:
        return Cell("not measured", "", fig.why_no_energy(result), "muted")
    net = result.gpu_monitoring.get("net_joules_per_token")
    source = result.gpu_monitoring.get("energy_source") or "counter"
    return Cell(
        f"{number(joules)} J", f"{number(net)} J above idle" if net is not None else "",
        f"of the {result.gpu_monitoring.get('energy_of')}, {source}",
    )  # fmt: skip


def _outputs(run: Run, reference: Run, comparisons: Sequence[Comparison]) -> Cell:
    if run is reference:
        return Cell("reference", "", "", "muted")
    for comparison in comparisons:
        if comparison.label == run.label:
            good = comparison.compared > 0 and comparison.compared == comparison.equal
            near = comparison.compared > 0 and all(d.is_near_tie for d in comparison.differences)
            kind = "good" if good else "" if near else "muted" if not comparison.compared else "bad"
            first, _, rest = comparison.verdict.partition(", ")
            return Cell(first, rest, "", kind)
    return Cell("not compared", "", "", "muted")


def against(run: Run, reference: Run) -> list[Cell]:
    cells = [_ratio(speed_up(run, reference))]
    cells.append(_ratio(latency_ratio(run, reference, lambda record: record.latency)))
    cells.append(_ratio(latency_ratio(run, reference, lambda record: record.tpot)))
    ours, theirs = fig.joules_per_token(run.result), fig.joules_per_token(reference.result)
    if ours is None or theirs is None:
        why = fig.why_no_energy(run.result if ours is None else reference.result)
        cells.append(Cell("not measured", "", why, "muted"))
    else:
        cells.append(_ratio(Estimate(theirs / ours)))
    return cells


def _ratio(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell("–", "", "nothing to compare", "muted")
    kind = ""
    if estimate.low is not None and estimate.high is not None:
        kind = "good" if estimate.low > 1 else "bad" if estimate.high < 1 else ""
    return Cell(times(estimate.value), interval(estimate, times), estimate.method or "no interval", kind)


def failures(run: Run) -> list[tuple[str, int, str]]:
    """(kind, how many, an example) of a run's failed requests."""
    kinds: dict[str, list[str]] = {}
    for record in run.result.failures:
        error = record.error or ""
        kinds.setdefault(error.partition(":")[0], []).append(error)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return [(kind, len(errors), errors[0]) for kind, errors in ordered[:_SHOWN_FAILURES]]


def energy_rows(result: RunResult) -> list[tuple[str, str]]:
    """The monitor's figures of one run, with the reason for each that is missing."""
    monitoring = result.gpu_monitoring
    if not monitoring:
        return [("monitor", "did not run")]
    reasons = monitoring.get("reasons") or {}
    shown = (
        ("energy of all GPUs", "total_energy_all_gpus", "J"), ("above idle", "net_energy_all_gpus", "J"),
        ("idle power", "idle_power", "W"), ("average power", "average_power", "W"),
        ("peak power", "peak_power", "W"), ("average utilisation", "average_utilization", "%"),
        ("average memory", "average_memory_usage", "MiB"), ("peak temperature", "peak_temperature", "°C"),
        ("tokens a joule", "tokens_per_joule", ""), ("tokens a kWh", "tokens_per_kwh", ""),
    )  # fmt: skip
    rows = []
    if monitoring.get("gpu_ids"):
        for title, key, unit in shown:
            value = monitoring.get(key)
            rows.append((title, f"{number(value, 4)} {unit}".strip() if value is not None
                         else f"not measured: {reasons.get(key, 'no reason given')}"))  # fmt: skip
        for gpu in (monitoring.get("gpus") or {}).values():
            for why, share in (gpu.get("throttled") or {}).items():
                rows.append((f"{gpu['name']} slowed by {why}", f"{share:.0%} of the samples"))
    else:
        rows.append(("GPUs", str(reasons.get("gpus", "none"))))
    cpu = monitoring.get("cpu") or {}
    if cpu:
        why = cpu.get("reasons", {})
        for title, key, unit in (
            ("processor energy", "energy", "J"), ("processor above idle", "net_energy", "J"),
            ("load of the processes", "average_process_cpu", "% of a core"),
            ("load of the machine", "average_machine_cpu", "% of a core"),
            ("peak memory of the processes", "peak_process_memory", "MiB"),
        ):  # fmt: skip
            value = cpu.get(key)
            if value is None and key == "net_energy" and cpu.get("energy") is None:
                continue  # said already
            missing = why.get(key) or why.get("energy") if "energy" in key else why.get("load")
            text = (
                f"{number(value, 4)} {unit}"
                if value is not None
                else f"not measured: {missing or 'too short'}"
            )
            rows.append((title, text))
    sampler = monitoring.get("sampler") or {}
    if sampler.get("share_of_core") is not None:
        rows.append(("the monitor itself", f"{sampler['share_of_core']:.2%} of a core"))
    if sampler.get("error"):
        rows.append(("the monitor failed", str(sampler["error"])))
    return rows
