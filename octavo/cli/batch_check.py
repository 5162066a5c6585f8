"""`octavo batch check`: are two results of the same work equal, and where not, why."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.console import show_log
from octavo.cli.options import SectionCommand, engine_kwargs, engine_options
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.batch.compare.check import Comparison
    from octavo.batch.compare.entries import ResultSet
    from octavo.batch.compare.explain import Origins
    from octavo.batch.workers import EngineWorkers


@click.command(cls=SectionCommand)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--model", help="Score the tokens where two texts part with this model.")
@click.option(
    "--input-file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Requests that A was made from. [as A's job has noted it]",
)  # fmt: skip
@click.option(
    "--show", type=click.IntRange(min=0), default=20, show_default=True, help="Differences to explain."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@engine_options
def command(
    a: Path, b: Path, model: str | None, input_file: Path | None, show: int, as_json: bool, **given: Any
) -> int:
    """Compare two outputs of octavo batch: answer files, or folders of persona samples.

    Ids, times and the order of lines do not count. Exit code 0: they are the same; 1: they are not.
    """
    kwargs = engine_kwargs(model, given)
    if kwargs and model is None:
        raise click.UsageError(f"--{next(iter(kwargs)).replace('_', '-')} is for the engine: give --model.")
    from octavo.batch.compare.check import compare
    from octavo.batch.compare.entries import open_results

    show_log(logging.WARNING)
    one, other = open_results(a), open_results(b)
    if type(one) is not type(other):
        raise click.UsageError(f"{a} and {b} are results of different kinds of jobs.")
    found = compare(one, other, max_shown=show)
    if found.is_same and not found.num_pairs:
        raise ConfigError(f"{a} and {b} hold no results: there is nothing to compare")
    if any(difference.text is not None for difference in found.shown):
        asyncio.run(_explain(found, one, input_file, kwargs))
    if as_json:
        click.echo(json.dumps(_as_data(found), ensure_ascii=False))
    else:
        _print(found, a, b)
    return 0 if found.is_same else 1


async def _explain(
    found: Comparison, results: ResultSet, input_file: Path | None, kwargs: dict[str, Any]
) -> None:
    from octavo.batch.compare.explain import Scorer, explain

    if "model" not in kwargs:
        await explain(found, _origins(results, input_file, None), None)
        return
    from octavo.batch.workers import EngineWorkers

    workers = await EngineWorkers.open(kwargs)
    try:
        if workers.tokenizer is None:
            raise ConfigError(f"{kwargs['model']} has no tokenizer; name one with --tokenizer")
        await explain(found, _origins(results, input_file, workers), Scorer(workers, workers.tokenizer))
    finally:
        await workers.close()


def _origins(results: ResultSet, input_file: Path | None, workers: EngineWorkers | None) -> Origins | None:
    from octavo.batch.compare.entries import AnswerFile, PersonaFolder
    from octavo.batch.compare.origins import PersonaItems, RequestFile

    if isinstance(results, AnswerFile):
        return RequestFile.of(results, input_file, workers)
    return PersonaItems(results, workers) if isinstance(results, PersonaFolder) else None


def _print(found: Comparison, a: Path, b: Path) -> None:
    click.echo(f"A is {a}, B is {b}")
    for line in found.settings:
        click.echo(f"  setting {line}")
    for difference in found.shown:
        click.echo(f"{difference.name}: {difference.what}")
        if difference.why:
            click.echo(f"  {difference.why}")
    hidden = found.num_different - len(found.shown)
    if hidden:
        click.echo(f"and {hidden:,} more (--show)")
    counts = ", ".join(f"{count:,} {_WORDS[kind]}" for kind, count in sorted(found.counts.items()))
    same = "the same" if found.is_same else "not the same"
    click.echo(
        f"{same}: {found.num_equal:,} of {found.num_pairs:,} pairs are equal" + (counts and f"; {counts}")
    )


_WORDS = {
    "missing": "on one side only",
    "error": "failed on one side or otherwise",
    "seed": "with another seed",
    "text": "with another text",
    "end": "with another end",
    "other": "that differ beside the text",
}


def _as_data(found: Comparison) -> dict[str, Any]:
    return {
        "same": found.is_same,
        "num_pairs": found.num_pairs,
        "num_equal": found.num_equal,
        "counts": dict(found.counts),
        "differing_settings": found.settings,
        "differences": [
            {"name": d.name, "kind": d.kind, "what": d.what, "why": d.why or None} for d in found.shown
        ],
    }
