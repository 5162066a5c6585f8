"""`octavo bench run`: the run that the environment variables of `run_benchmark.sh` describe."""

from __future__ import annotations

import os
from typing import Any

import click

from octavo.bench.variables import read_variables
from octavo.cli.bench_options import BenchCommand, bench_options, options_from, run_and_write


@click.command(cls=BenchCommand)
@bench_options
def command(report: bool, quiet: bool, **given: Any) -> int:
    """Measure one engine as the environment says (INFERENCE_ENGINE, TARGET_MODEL, AUTO_RATE, ...).

    Flags win over variables; docs/benchmark.md lists the variables.
    """
    from octavo.bench.context import fit_context

    environment = dict(os.environ)
    if given.get("url") or given.get("engine"):  # which variables count is the engine's affair
        environment["INFERENCE_ENGINE"] = given.get("engine") or f"url={given['url']}"
    options = options_from(given, read_variables(environment))
    options.spec().check()  # before the model is looked for
    return run_and_write(fit_context(options), report=report, quiet=quiet)
