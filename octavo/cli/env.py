"""`octavo env`: what this machine has, as Octavo sees it. Good to have in a bug report."""

from __future__ import annotations

import time
from typing import Any

import click

from octavo.cli.options import SectionCommand, engine_kwargs, engine_options
from octavo.config import EngineArgs


@click.command(cls=SectionCommand)
@click.option("--warm", "warm_model", metavar="MODEL", help="Compile the GPU kernels that MODEL needs")
@engine_options
def command(warm_model: str | None, **given: Any) -> None:
    """Show what this machine has: device, cores, memory, kernels, versions.

    With --warm, compile the kernels that a GPU runs for a model, on all cores and without loading its
    weights: so that the first start is as fast as every later one. Give the options that the engine will be
    started with, --speculative-config too.
    """
    from octavo import platform

    if warm_model is None:
        click.echo(platform.describe())
        return
    args = EngineArgs.from_kwargs(**engine_kwargs(warm_model, given))
    from octavo.engine.setup import resolve  # loads torch: after the options are known to be right
    from octavo.worker.compile_ahead import compile_ahead

    config = resolve(args)
    started = time.perf_counter()
    compile_ahead(config)
    click.echo(f"The kernels for {warm_model} are compiled ({time.perf_counter() - started:.0f} s).")
