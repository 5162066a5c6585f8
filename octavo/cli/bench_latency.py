"""`octavo bench latency`: a fixed number of requests at a time, nobody waiting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from octavo.cli.bench_options import BenchCommand, bench_options, named_for, options_from, run_and_write


@click.command(cls=BenchCommand)
@bench_options
def command(report: bool, quiet: bool, **given: Any) -> int:
    """Measure latency with --concurrency requests open at a time (1, unless it says otherwise)."""
    options = named_for("latency", options_from(given), given)
    if given.get("rate") is not None or options.arrival not in ("poisson", "closed"):
        raise click.UsageError(
            "latency is a closed loop, without --rate or --arrival: see octavo bench serve for those"
        )
    options = replace(options, arrival="closed")
    if given.get("num_prompts") is None and given.get("duration") is None:
        options = replace(options, num_prompts=16)
    return run_and_write(options, report=report, quiet=quiet)
