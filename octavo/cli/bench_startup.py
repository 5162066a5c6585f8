"""`octavo bench startup`: from the start of the process to the first token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from octavo.cli.bench_options import BenchCommand, bench_options, options_from, view_of


@click.command(cls=BenchCommand)
@bench_options
def command(report: bool, quiet: bool, **given: Any) -> int:
    """Measure fresh starts (3 of them, unless --repeat): interpreter, model, first token.

    With --engine octavo-served or vllm-served the server's start is measured.
    """
    from octavo.bench.record import check_writable, result_path, save
    from octavo.bench.startup import STAGES, measure_startup

    options = options_from(given)
    if given.get("repeat") is None:
        options = replace(options, repeat=3)
    spec = options.spec()
    spec.check()
    path = result_path(options.output, f"startup_{spec.method}", spec.engine)
    check_writable(path, force=options.force)
    result = measure_startup(spec, view_of(quiet))
    save(result, path, force=options.force)
    for name in STAGES:
        values = result.summary["startup"][name]
        if values["mean"] is not None:
            click.echo(f"{name.replace('_', ' '):<12} p50 {values['p50']:.2f} s, mean {values['mean']:.2f} s")
    for record in result.failures:
        click.echo(f"FAILED: {record.error}")
    click.echo(f"  Result: {path}")
    return result.exit_code
