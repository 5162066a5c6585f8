"""`octavo bench throughput`: everything at once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import click

from octavo.cli.bench_options import BenchCommand, bench_options, named_for, options_from, run_and_write


@click.command(cls=BenchCommand)
@bench_options
def command(report: bool, quiet: bool, **given: Any) -> int:
    """Measure tokens a second with all requests there from the start (64 of them, unless --num-prompts)."""
    options = named_for("throughput", options_from(given), given)
    if given.get("rate") is None and options.arrival == "poisson":
        options = replace(options, rate=math.inf)
    if given.get("num_prompts") is None:
        options = replace(options, num_prompts=64)
    return run_and_write(options, report=report, quiet=quiet)
