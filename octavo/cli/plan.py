"""`octavo plan`: the memory plan of a model, made from its config without loading its weights, and what
speculation should bring."""

from __future__ import annotations

from typing import Any

import click

from octavo.cli.options import SectionCommand, engine_kwargs, engine_options
from octavo.config import EngineArgs


@click.command(cls=SectionCommand)
@click.argument("model")
@click.option(
    "--measure/--no-measure", default=True, help="With a drafter, time steps to see what it brings [on]"
)
@engine_options
def command(model: str, measure: bool, **given: Any) -> None:
    """Show whether MODEL fits here, with what context and concurrency, without loading it.

    With a drafter (--draft, --speculative-method) also what speculation should bring: for that a model
    of the same shape is made with random weights, and some steps are timed.
    """
    args = EngineArgs.from_kwargs(**engine_kwargs(model, given))
    from octavo.engine.setup import plan  # loads torch: after the options are known to be right

    click.echo(plan(args))
    if measure and args.speculative is not None:
        from octavo.engine.outlook import speculation_outlook

        click.echo(speculation_outlook(args))
