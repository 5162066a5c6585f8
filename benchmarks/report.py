"""What the runs of one row come to, and the table at the end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.engines.job import Metrics

# Cores that others may keep busy before a run is called disturbed.
DISTURBED = 0.1

Key = tuple[str, str, str]  # row, variant, engine


@dataclass
class Run:
    """One repetition of one row by one engine."""

    metrics: Metrics
    foreign_cores: float | None

    @property
    def disturbed(self) -> bool:
        """Whether others took enough of the machine to doubt the figures."""
        return self.foreign_cores is not None and self.foreign_cores > DISTURBED


@dataclass
class Result:
    """All repetitions of one row by one engine; figures are of the undisturbed ones if there are any."""

    row: str
    variant: str
    engine: str
    version: str = ""
    runs: list[Run] = field(default_factory=list)
    error: str | None = None

    @property
    def counted(self) -> list[Run]:
        """The runs that the figures are made of."""
        return [run for run in self.runs if not run.disturbed] or self.runs

    @property
    def disturbed(self) -> bool:
        """True if no run was quiet."""
        return bool(self.runs) and all(run.disturbed for run in self.runs)

    @property
    def foreign_cores(self) -> float | None:
        """The most that others took during a run that counts."""
        return max((run.foreign_cores for run in self.counted if run.foreign_cores is not None), default=None)

    def median(self, metric: str) -> float | None:
        """None if it was not measured."""
        values = self._values(metric)
        return statistics.median(values) if values else None

    def spread(self, metric: str) -> tuple[float, float] | None:
        """Smallest and largest."""
        values = self._values(metric)
        return (min(values), max(values)) if values else None

    def _values(self, metric: str) -> list[float]:
        return [run.metrics[metric] for run in self.counted if metric in run.metrics]

    def record(self) -> dict[str, object]:
        """The JSON line."""
        names = self.runs[0].metrics if self.runs else {}
        return {
            "row": self.row,
            "variant": self.variant,
            "engine": self.engine,
            "version": self.version,
            "median": {name: _rounded(self.median(name)) for name in names},
            "spread": {name: [_rounded(value) for value in self.spread(name) or ()] for name in names},
            "foreign_cores": self.foreign_cores,
            "disturbed": self.disturbed,
            "runs": [asdict(run) for run in self.runs],
            "error": self.error,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


@dataclass(frozen=True)
class Line:
    """One line of the table: which figure of which row; `peers` names other engines' variants."""

    text: str
    row: str
    metric: str
    variant: str = ""
    peers: Mapping[str, str] = field(default_factory=dict)
    limit: str | None = None
    only_with: str = ""  # an engine without which the line says nothing

    def variant_of(self, engine: str) -> str:
        """Which of the row's variants this engine's cell shows."""
        return self.variant if engine == "octavo" else self.peers.get(engine, self.variant)


_STATIC = {"transformers": "static_16"}
_ONE_BY_ONE = {"transformers": "one_by_one"}
LINES = (
    Line("single stream, decode tok/s", "single", "decode_tok_s", limit="stream"),
    Line("single stream, first token ms", "single", "ttft_ms", limit="first_token"),
    Line("batch, output tok/s", "batch", "output_tok_s", peers=_STATIC, limit="batch"),
    Line(
        "batch, peer one by one, tok/s", "batch", "output_tok_s", peers=_ONE_BY_ONE, only_with="transformers"
    ),
    Line("shared prefix, output tok/s", "prefix", "output_tok_s", peers=_STATIC, limit="prefix"),
    Line("rewrite, output tok/s", "rewrite", "output_tok_s", limit="stream"),
    Line("start to first token, warm, s", "startup", "seconds", "warm"),
    Line("start to first token, first, s", "startup", "seconds", "first"),
    Line("peak memory with the command, MB", "startup", "peak_mb", "warm"),
    Line("peak memory, 256 MB of KV, single, MB", "memory", "peak_mb", "single", limit="weights_mb"),
    Line("peak memory, 256 MB of KV, batch, MB", "memory", "peak_mb", "batch", _STATIC, "weights_mb"),
    Line("step beside a busy thread / quiet, p50", "foreign", "ratio_p50"),
    Line("step beside a busy thread / quiet, mean", "foreign", "ratio_mean"),
    Line("step alone, p50 ms", "foreign", "step_p50_ms"),
    Line("schedule + update, ms a step", "brain", "step_ms"),
    Line("schedule + update, blocked queue, ms a step", "brain", "blocked_ms"),
)


def table(results: Sequence[Result], engines: Sequence[str], limits: Mapping[str, float]) -> str:
    """Medians with their spread, the limit, and the ratio of Octavo to each peer; Markdown.

    `*` marks a figure of which no run was undisturbed.
    """
    found: dict[Key, Result] = {(each.row, each.variant, each.engine): each for each in results}
    peers = [engine for engine in engines if engine != "octavo"]
    rows = [["", *engines, *(f"octavo / {peer}" for peer in peers), "limit", "of limit", "foreign"]]
    for line in LINES:
        cells = {engine: found.get((line.row, line.variant_of(engine), engine)) for engine in engines}
        medians = {engine: cell.median(line.metric) if cell else None for engine, cell in cells.items()}
        needed = medians.get(line.only_with) if line.only_with else next(filter(None, medians.values()), None)
        if needed is None:
            continue
        mine = medians.get("octavo")
        limit = limits.get(line.limit) if line.limit is not None else None
        foreign = [cell.foreign_cores for cell in cells.values() if cell and cell.foreign_cores is not None]
        rows.append(
            [
                line.text,
                *(_cell(cells[engine], line.metric) for engine in engines),
                *(_show(_ratio(mine, medians[peer]), "{:.2f}") for peer in peers),
                _show(limit),
                _show(_share(mine, limit, line.metric), "{:.0%}"),
                _show(max(foreign, default=None), "{:.2f}"),
            ]
        )
    return _markdown(rows)


def _cell(result: Result | None, metric: str) -> str:
    if result is None:
        return "–"
    if result.error is not None and not result.runs:
        return "failed"
    spread = result.spread(metric)
    if spread is None:
        return "–"
    low, high = (_show(value) for value in spread)
    shown = _show(result.median(metric))
    return f"{shown}{f' ({low}–{high})' if low != high else ''}{'*' if result.disturbed else ''}"


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def _share(value: float | None, limit: float | None, metric: str) -> float | None:
    """How much of the limit was reached; of a rate, value / limit, of anything else the inverse."""
    return _ratio(value, limit) if metric.endswith("tok_s") else _ratio(limit, value)


def _show(value: float | None, form: str | None = None) -> str:
    if value is None:
        return "–"
    if form is not None:
        return form.format(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def aligned(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([aligned(rows[0]), rule, *map(aligned, rows[1:])])
