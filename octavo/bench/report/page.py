"""From results to the report: names of the runs, tables, verdicts; the template only lays them out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

import octavo
from octavo.bench.equality import Comparison, compare_outputs
from octavo.bench.record import RunResult, write_whole
from octavo.bench.report import tables
from octavo.bench.report.figures import Run, figures, interval, number, speed_up, times
from octavo.bench.report.svg import sketch
from octavo.errors import ConfigError

_SHOWN_DIFFERENCES = 6  # of each run


def write_report(
    results: Sequence[RunResult],
    path: str | Path,
    *,
    baseline: RunResult | None = None,
    comparisons: Sequence[Comparison] | None = None,
    not_run: Sequence[tuple[str, str]] = (),
    title: str = "Octavo benchmark",
    sources: Sequence[str] = (),
) -> Path:
    """Write one HTML file that needs nothing else. `baseline`, or the first result, is what the others are
    compared with; `comparisons` are made here (without logit gaps) if they are not given; `not_run` are runs
    that could not be made, with the reason."""
    page = build(
        results, baseline=baseline, comparisons=comparisons, not_run=not_run, title=title, sources=sources
    )
    path = Path(path)
    try:
        write_whole(path, page)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {path}: {error}") from error
    return path


def build(
    results: Sequence[RunResult],
    *,
    baseline: RunResult | None = None,
    comparisons: Sequence[Comparison] | None = None,
    not_run: Sequence[tuple[str, str]] = (),
    title: str = "Octavo benchmark",
    sources: Sequence[str] = (),
) -> str:
    """The report's HTML."""
    if not results:
        raise ConfigError("a report needs at least one result")
    runs = name_runs(results, baseline)
    reference = runs[0]
    if comparisons is None:
        comparisons = compare_runs(runs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("octavo.bench.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    context = {
        "title": title,
        "version": octavo.__version__,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": runs,
        "reference": reference,
        "headline": headline(runs, reference, comparisons),
        "facts": facts(runs),
        "columns": tables.COLUMNS,
        "rows": [(run, tables.row(run, reference, comparisons)) for run in runs],
        "against_columns": tables.AGAINST,
        "against": [(run, tables.against(run, reference)) for run in runs[1:]],
        "figures": figures(runs, reference),
        "comparisons": comparisons,
        "shown_differences": _SHOWN_DIFFERENCES,
        "warnings": [(run, run.result.warnings) for run in runs if run.result.warnings],
        "failures": [(run, tables.failures(run)) for run in runs if run.result.failures],
        "invalid": [run for run in runs if not run.result.valid],
        "configuration": configuration(runs),
        "energy": [(run, tables.energy_rows(run.result)) for run in runs],
        "not_run": not_run,
        "sources": sources,
        "sketch": sketch,
    }
    return environment.get_template("report.html.jinja").render(context)


def name_runs(results: Sequence[RunResult], baseline: RunResult | None = None) -> list[Run]:
    """The baseline first; names are engine and method, and what else sets two runs apart."""
    names = [_name(result) for result in results]
    labels: list[str] = []
    for index, (name, result) in enumerate(zip(names, results, strict=True)):
        label = name
        if names.count(name) > 1:
            others = [other for i, other in enumerate(results) if names[i] == name and i != index]
            label = f"{name} · {_apart(result, others) or f'run {index + 1}'}"
            if label in labels:
                label = f"{label} · run {index + 1}"
        labels.append(label)
    every = list(results)
    if baseline is not None:
        labels.insert(0, f"{_name(baseline)} (baseline)")
        every.insert(0, baseline)
    return [
        Run(label, index, result, baseline is not None and index == 0)
        for index, (label, result) in enumerate(zip(labels, every, strict=True))
    ]


def _name(result: RunResult) -> str:
    served = " (served)" if result.effective_config.get("served") else ""
    return f"{result.engine}{served} {result.method}"


def _apart(result: RunResult, others: Sequence[RunResult]) -> str:
    """What of the configuration sets a run apart from those of its name: at most two settings, or nothing."""
    own = dict(_flat(result.effective_config))
    flat = [dict(_flat(other.effective_config)) for other in others]
    keys = [
        key for key, value in own.items() if _is_setting(key) and any(each.get(key) != value for each in flat)
    ]
    return ", ".join(f"{key.rpartition('.')[2]}={own[key]}" for key in keys[:2])


def compare_runs(runs: Sequence[Run]) -> list[Comparison]:
    """Every run's outputs against the first one's, without logit gaps."""
    first = runs[0]
    return [compare_outputs(first.result, run.result, (first.label, run.label)) for run in runs[1:]]


# ---------------------------------------------------------------------- words


def headline(runs: Sequence[Run], reference: Run, comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader in a hurry must know, in two or three sentences."""
    said = []
    if len(runs) == 1:
        rate = reference.result.summary.get("overall_throughput")
        said.append(f"{reference.label}: {number(rate)} generated tokens a second.")
    else:
        ratios = [(run, speed_up(run, reference)) for run in runs[1:] if run.result.valid]
        known = [(run, ratio) for run, ratio in ratios if ratio is not None]
        if known:
            best, ratio = max(known, key=lambda pair: pair[1].value)
            sure = interval(ratio, times)
            if ratio.value >= 1:
                many = f"{best.label} generates {times(ratio.value)} as many tokens a second as"
                said.append(f"{many} {reference.label}" + (f" (95%: {sure})." if sure else "."))
            else:
                said.append(f"No run is faster than {reference.label}; {best.label} comes nearest with "
                            f"{times(ratio.value)}.")  # fmt: skip
    counted = [c for c in comparisons if c.compared]
    if counted:
        differing = [c for c in counted if c.compared != c.equal]
        if not differing:
            tokens = sum(c.tokens for c in counted if c.unit == "tokens")
            said.append(
                "All outputs are equal" + (f", token for token ({tokens:,} compared)." if tokens else ".")
            )
        else:
            said.append("; ".join(f"{c.label}: {c.verdict}" for c in differing) + f" from {reference.label}.")
    failed = sum(len(run.result.failures) for run in runs)
    if failed:
        said.append(f"{failed} requests failed.")
    return said


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The line under the title: model, machine, work."""
    result = runs[0].result
    environment = result.environment
    config = result.effective_config
    prompts = config.get("prompts") or {}
    model = str(config.get("model") or config.get("served_model") or "–")
    found = [("model", Path(model).name if "/" in model else model)]
    device = environment.get("gpus") or environment.get("cpu") or environment.get("device")
    if device:
        found.append(("machine", _plain(device)))
    if prompts.get("source"):
        found.append(
            ("prompts", f"{prompts.get('counts', {}).get('used', '')} from {prompts['source']}".strip())
        )
    sampling = result.effective_config.get("sampling") or {}
    if sampling:
        how = "greedy" if not sampling.get("temperature") else f"temperature {sampling['temperature']:g}"
        found.append(("sampling", f"{how}, at most {sampling.get('max_tokens')} tokens"))
    if environment.get("started_at"):
        found.append(("measured", str(environment["started_at"])))
    return found


# ---------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Configuration:
    """Settings that differ between runs (one value a run), and those that are the same for all."""

    differing: list[tuple[str, list[str]]]
    same: list[tuple[str, str]]


def configuration(runs: Sequence[Run]) -> Configuration:
    """Everything that was set or found out, flattened to dotted names."""
    flat = []
    for run in runs:
        parts = {**run.result.effective_config, "environment": run.result.environment}
        flat.append(dict(_flat(parts)))
    keys = list(dict.fromkeys(key for each in flat for key in each))
    differing, same = [], []
    for key in keys:
        values = [_plain(each[key]) if key in each else "–" for each in flat]
        if len(set(values)) > 1:
            differing.append((key, values))
        else:
            same.append((key, values[0]))
    return Configuration(differing, same)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, each in value.items():
        name = f"{prefix}{key}"
        if isinstance(each, Mapping) and each:
            yield from _flat(each, f"{name}.")
        else:
            yield name, each


def _is_setting(key: str) -> bool:
    """False for what was found out and not set: it differs from run to run anyway."""
    return not key.startswith(("prompts.", "load_seconds", "environment."))


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False, default=str)
