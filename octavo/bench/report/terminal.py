"""The comparison as a table of plain text, for the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.bench.equality import Comparison
from octavo.bench.record import RunResult
from octavo.bench.report.figures import interval, number, speed_up, times
from octavo.bench.report.page import name_runs
from octavo.bench.report.tables import row


def table(
    results: Sequence[RunResult], baseline: RunResult | None, comparisons: Sequence[Comparison]
) -> list[str]:
    """One line a run: throughput, speed-up, median latencies, acceptance, energy, outputs."""
    runs = name_runs(results, baseline)
    reference = runs[0]
    head = ("run", "tok/s", "speed-up", "TTFT", "TPOT", "latency", "accepted", "J/token", "outputs")
    rows = [head]
    for run in runs:
        ratio = speed_up(run, reference) if run is not reference else None
        sure = interval(ratio, times)
        cells = row(run, reference, comparisons)
        rows.append(
            (
                run.label,
                number(run.result.summary.get("overall_throughput")),
                "reference"
                if run is reference
                else times(ratio.value if ratio else None) + (f" ({sure})" if sure else ""),
                cells[2].text,
                cells[3].text,
                cells[4].text,
                cells[5].text,
                cells[6].text,
                "" if run is reference else cells[7].text + (f", {cells[7].sub}" if cells[7].sub else ""),
            )
        )
    widths = [max(len(line[i]) for line in rows) for i in range(len(head))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in rows
    ]
    return ["", lines[0], "-" * len(lines[0]), *lines[1:], ""]
