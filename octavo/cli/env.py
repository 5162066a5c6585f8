"""`octavo env`: what this machine has, as Octavo sees it. Good to have in a bug report."""

from __future__ import annotations

import click


@click.command()
def command() -> None:
    """Show what this machine has: device, cores, memory, kernels, versions."""
    from octavo import platform

    click.echo(platform.describe())
