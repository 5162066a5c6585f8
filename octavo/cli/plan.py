"""`octavo plan`: the memory plan of a model, made from its config without loading its weights."""

from __future__ import annotations

from typing import Any

import click

from octavo.cli.options import SectionCommand, engine_kwargs, engine_options
from octavo.config import EngineArgs


@click.command(cls=SectionCommand)
@click.argument("model")
@engine_options
def command(model: str, **given: Any) -> None:
    """Show whether MODEL fits here, with what context and concurrency, without loading it."""
    args = EngineArgs.from_kwargs(**engine_kwargs(model, given))
    from octavo.engine.setup import plan  # loads torch: after the options are known to be right

    click.echo(plan(args))
