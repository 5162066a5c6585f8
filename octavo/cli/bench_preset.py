"""`octavo bench preset NAME`: what a preset sets, as lines for a shell."""

from __future__ import annotations

import click

from octavo.bench.variables import PRESETS, preset_lines


@click.command()
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """Print the shell lines of preset NAME, which leave alone what the caller has set.

    Without NAME: what presets there are.
    """
    for line in PRESETS if name is None else preset_lines(name):
        click.echo(line)
