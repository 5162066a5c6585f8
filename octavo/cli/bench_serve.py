"""`octavo bench serve`: requests over HTTP, at a rate or by concurrency."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from octavo.cli.bench_options import BenchCommand, bench_options, named_for, options_from, run_and_write


@click.command(cls=BenchCommand)
@click.option("--in-process", is_flag=True, help="Leave HTTP out: the engine runs in this process.")
@bench_options
def command(in_process: bool, report: bool, quiet: bool, **given: Any) -> int:
    """Measure a server under load.

    With --url it is one that runs already. Otherwise `octavo serve` (or `vllm serve`) is started for the run
    and ended with it. Requests come at --rate (Poisson), or --concurrency are kept open; latencies count from
    the moment a request was due.
    """
    options = named_for("serve", options_from(given), given)
    if given.get("num_prompts") is None and given.get("duration") is None:
        options = replace(options, num_prompts=64)
    if not in_process and options.engine in ("octavo", "vllm"):
        options = replace(options, served=True)
    return run_and_write(options, report=report, quiet=quiet)
