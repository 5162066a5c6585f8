"""`octavo compare`: the same work through several engines and methods, and one report.

With result files instead of engines it compares what was measured before.
"""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.bench.options import BenchOptions
from octavo.cli.bench_options import BenchCommand, bench_options, options_from
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.bench.compare import Outcome

DEFAULT_OUTPUT = "comparison.json"
DEFAULT_METHODS = ("target_ar", "prompt_lookup")
_OWN = frozenset({"engine", "method", "url", "output", "report"})  # said in another way here


def _shared_options(function: Any) -> Any:
    """The flags of a run, less those that a comparison says in another way."""
    function = bench_options(function)
    function.__click_params__ = [p for p in function.__click_params__ if p.name not in _OWN]
    return function


@click.command(cls=BenchCommand)
@click.argument(
    "files", nargs=-1, type=click.Path(dir_okay=False, path_type=Path), metavar="[RESULT.json]..."
)
@click.option("--engine", "engines", multiple=True, metavar="ENGINE",
              help="octavo, octavo-served, transformers, vllm, url=http://…; may be repeated")  # fmt: skip
@click.option("--method", "methods", multiple=True, metavar="METHOD",
              help="target_ar, drafter_ar, speculative, prompt_lookup; may be repeated: every engine runs "
              "each [target_ar and prompt_lookup; speculative with --drafter]")  # fmt: skip
@click.option("--baseline", type=click.Path(dir_okay=False, path_type=Path),
              help="an earlier result file: what everything is compared with [the first run]")  # fmt: skip
@click.option("--output", default=DEFAULT_OUTPUT, show_default=True,
              help="summary; results and the report are written beside it")  # fmt: skip
@click.option("--require-equal", is_flag=True, help="exit code 1 unless all outputs are equal")
@click.option("--gaps/--no-gaps", default=True, help="ask the model how far apart differing tokens are [on]")
@click.option("--title", default="Octavo comparison", help="of the report")
@_shared_options
def command(
    files: tuple[Path, ...], engines: tuple[str, ...], methods: tuple[str, ...], baseline: Path | None,
    output: str, require_equal: bool, gaps: bool, title: str, quiet: bool, force: bool, **given: Any,
) -> int:  # fmt: skip
    """Run the same prompts through several engines and methods, check that they said the same, and write one
    HTML report with intervals. Each run is a process of its own.

    \b
    octavo compare --engine octavo --engine transformers --dtype float32
    octavo compare --engine octavo --engine url=http://127.0.0.1:8001 --concurrency 8
    octavo compare before.json after.json
    octavo compare --baseline last_week.json --engine octavo --method target_ar

    Unless told otherwise, 16 prompts are asked one after the other.
    """
    from octavo.bench import compare, record
    from octavo.bench.runner import prepare

    def tell(text: str) -> None:
        click.echo(f"octavo: {text}", err=True)

    place = Path(output)
    earlier = [record.load(path) for path in files]
    before = record.load(baseline) if baseline is not None else None
    only_files = bool(files or baseline) and not engines and not methods
    if only_files:
        unused = [name for name, value in given.items() if value not in (None, (), False)]
        if unused:
            flags = ", ".join(f"--{name.replace('engine_option_', '').replace('_', '-')}" for name in unused)
            raise click.UsageError(f"{flags}: nothing is run, so this does nothing; name an --engine to run")
        if len(earlier) + (before is not None) < 2:
            raise click.UsageError(
                "one result file is nothing to compare: name another, or an --engine to run"
            )
        for path in compare.files_beside(place):
            record.check_writable(path, force=force)
        comparisons = compare.compare_results(earlier, baseline=before)
        outcome = compare.Outcome(earlier, [str(path) for path in files], comparisons, baseline=before)
        return _finish(outcome, place, force, title, require_equal)

    base = _base(given)
    options = [replace(_fitting(base, engine, engines), method=method)
               for engine in engines or ("octavo",)
               for method in methods or _methods(base)]  # fmt: skip
    specs = [each.spec() for each in options]
    source = options[0].source()
    planned = compare.plan(specs, place, force=force)
    prompts = compare.choose_prompts(specs, source)
    for spec in specs:
        prepare(spec, prompts)  # everything that can be refused is refused before the first model is loaded
        if spec.engine == "url":
            from octavo.bench.targets.url import check_server

            asyncio.run(check_server(spec))
    for warning in dict.fromkeys([*prompts.warnings, *(w for spec in specs for w in spec.check())]):
        tell(f"WARNING: {warning}")
    results, paths, not_run = compare.run_all(planned, prompts, force=force, quiet=quiet, tell=tell)
    results, paths = [*earlier, *results], [*(str(path) for path in files), *paths]
    if not results:
        raise ConfigError(
            "not one run could be made: " + "; ".join(f"{name}: {why}" for name, why in not_run)
        )
    comparisons = compare.compare_results(
        results, baseline=before, prompts=prompts, spec=compare.gap_spec(specs) if gaps else None, tell=tell
    )
    outcome = compare.Outcome(results, paths, comparisons, not_run, before)
    return _finish(outcome, place, force, title, require_equal)


def _base(given: dict[str, Any]) -> BenchOptions:
    """The options that all runs share: unless a load was described, one request at a time."""
    options = options_from({name: value for name, value in given.items() if name not in _OWN})
    loads = ("arrival", "rate", "duration", "concurrency")
    if all(given.get(name) is None for name in loads):
        options = replace(options, arrival="closed")
    if given.get("num_prompts") is None and given.get("duration") is None:
        options = replace(options, num_prompts=16)
    return options


def _fitting(base: BenchOptions, engine: str, engines: tuple[str, ...]) -> BenchOptions:
    """The options of one engine: what only others of the comparison know is left out, and that is said."""
    from octavo.bench.spec import parse_engine

    options = replace(base, engine=engine)
    names = {name: _known(parse_engine(name)["engine"]) for name in engines or ("octavo",)}
    foreign = sorted(
        name
        for name in base.engine_options
        if name not in names[engine] and any(name in known for known in names.values())
    )
    if not foreign:
        return options  # what no engine knows is refused by the check of the run
    kept = {name: value for name, value in base.engine_options.items() if name not in foreign}
    notice = f"options that this engine does not have, and others of the comparison do: {', '.join(foreign)}"
    return replace(options, engine_options=kept, notices=(*options.notices, notice))


def _known(engine: str) -> frozenset[str]:
    if engine == "octavo":
        from octavo.config import EngineArgs

        return frozenset(field.name for field in fields(EngineArgs))
    if engine == "url":
        return frozenset()
    from octavo.bench.targets import known_options

    return frozenset(known_options(engine))


def _methods(base: BenchOptions) -> tuple[str, ...]:
    return ("target_ar", "speculative") if base.drafter else DEFAULT_METHODS


def _finish(outcome: Outcome, place: Path, force: bool, title: str, require_equal: bool) -> int:
    from octavo.bench import compare
    from octavo.bench.report.terminal import table

    page = compare.write_comparison(outcome, place, force=force, title=title)
    for line in table(outcome.results, outcome.baseline, outcome.comparisons):
        click.echo(line)
    for result in outcome.results:
        if not result.valid:
            reason = result.summary["client"]["reason"]
            click.echo(f"  INVALID: {result.engine} {result.method}: {reason}")
    for label, why in outcome.not_run:
        click.echo(f"  NOT MEASURED: {label}: {why}")
    click.echo(f"  Report: {page}")
    return outcome.exit_code(require_equal=require_equal)
