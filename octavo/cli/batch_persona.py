"""`octavo batch persona`: samples for every item of every user of a persona dataset."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.batch import split_replicas
from octavo.cli.console import show_log
from octavo.cli.options import SectionCommand, batch_engine_options, engine_kwargs
from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.batch.persona.data import Scenario
    from octavo.batch.persona.job import PersonaOptions
    from octavo.batch.persona.run import Outcome

_LEVELS = ("debug", "info", "warning", "error")
_SHOWN_PROBLEMS = 10


@click.command(
    cls=SectionCommand,
    # --checkpoint_dir is --checkpoint-dir: both spellings are in use.
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)
@click.option("--checkpoint-dir", required=True, help="A folder, a .gguf file, a hub id, or an alias.")
@click.option("--dataset", required=True, help="Chameleons, DMSC, …; an unknown name shows the list.")
@click.option(
    "--ablation-config", required=True,
    help="What a prompt shows: profile_only, context_only, profile_and_history, …",
)  # fmt: skip
@click.option(
    "--output-dir", type=click.Path(path_type=Path), required=True, help="One file a user, and a summary."
)
@click.option("--scenario-path", help="Folder with test_leaderboard.json and train.json. [found by dataset]")
@click.option("--data-root", help="Where datasets lie. [$OCTAVO_DATA_ROOT, or ./data]")
@click.option("--num-samples", type=click.IntRange(min=1), default=5, show_default=True, help="Of each item.")
@click.option("--max-items", type=click.IntRange(min=1), help="Only the first so many items.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p", type=float, default=0.9, show_default=True, help="Keep the likeliest tokens of this share."
)
@click.option("--top-k", type=int, default=50, show_default=True, help="Keep this many tokens; 0 is off.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1),
    help="Longest answer. [512, or what the dataset's answers need if that is less]",
)  # fmt: skip
@click.option("--ignore-eos", is_flag=True, help="Go on to --max-tokens after the model's end token.")
@click.option(
    "--seed", type=int, default=42, show_default=True, help="With it, every sample has a seed of its own."
)
@click.option(
    "--engine", type=click.Choice(("octavo", "transformers")), default="octavo", show_default=True,
    help="Who makes the samples; transformers is the baseline.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True,
    help="Of --engine transformers: samples in a static batch; 1 is a loop over requests.",
)  # fmt: skip
@click.option("--clean", "cleans", is_flag=True, help="Add a text without labels and foreign turns to each.")
@click.option("--retry-failed", is_flag=True, help="Do again the samples that failed in earlier runs.")
@click.option("--overwrite", is_flag=True, help="Throw away the results that the output folder holds.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
@click.option("--log-level", type=click.Choice(_LEVELS), default="warning", show_default=True)
@batch_engine_options
def command(log_level: str, quiet: bool, **given: Any) -> int:
    """Make samples for every item of every user of a persona dataset.

    Interrupted, the same command goes on where it was: no sample that is there is made again. The exit
    code is 0 if every sample has its text and every record could be read, otherwise 1. Guide: docs/batch.md.
    """
    if given.get("engine_seed") is not None:
        raise click.UsageError("every sample has a seed of its own: use --seed, not --engine-seed.")
    if given["overwrite"] and given["retry_failed"]:
        raise click.UsageError("--overwrite throws everything away: leave --retry-failed out.")
    from octavo.batch.persona.data import read_scenario
    from octavo.batch.persona.datasets import find_scenario
    from octavo.batch.persona.run import run_persona, used_up
    from octavo.batch.run import exit_code, run_async

    show_log(getattr(logging, log_level.upper()))
    options = _options(quiet, given)
    root = given["data_root"] or os.environ.get("OCTAVO_DATA_ROOT") or "data"
    scenario = read_scenario(find_scenario(options.dataset, given["scenario_path"], root))

    def tell(text: str) -> None:
        if not quiet:
            click.echo(f"octavo: {text}", err=True)

    _tell_problems(scenario)
    remark = used_up(options.params, options.num_samples)
    if remark:
        tell(f"note: {remark}")
    outcome, ended_by = run_async(lambda stop: run_persona(options, scenario, stop, tell))
    _report(options, scenario, outcome, tell)
    if ended_by is not None and outcome.num_left:
        return exit_code(ended_by)
    return 1 if outcome.num_failed or outcome.num_left or scenario.problems else 0


def _options(quiet: bool, given: dict[str, Any]) -> PersonaOptions:
    """What the flags ask for, checked. Raises click.UsageError or ConfigError."""
    from octavo.batch.persona.datasets import ablation_named, dataset_named
    from octavo.batch.persona.engines import check_engine_options
    from octavo.batch.persona.job import PersonaOptions
    from octavo.config import EngineArgs
    from octavo.sampling_params import SamplingParams

    dataset = dataset_named(given["dataset"])
    names = ("temperature", "top_p", "top_k", "ignore_eos")
    try:
        params = SamplingParams(
            max_tokens=given["max_tokens"] or dataset.max_tokens, **{name: given[name] for name in names}
        )
    except RequestError as error:
        raise click.UsageError(str(error)) from None
    kwargs, num_replicas = split_replicas(engine_kwargs(None, given))
    EngineArgs.from_kwargs(model=given["checkpoint_dir"], **kwargs)  # refuses what is wrong, now
    options = PersonaOptions(
        checkpoint=given["checkpoint_dir"],
        dataset=dataset,
        ablation=ablation_named(given["ablation_config"]),
        output=given["output_dir"],
        params=params,
        seed=given["seed"],
        num_samples=given["num_samples"],
        max_items=given["max_items"],
        engine=given["engine"],
        engine_kwargs=kwargs,
        num_replicas=num_replicas,
        batch_size=given["batch_size"],
        cleans=given["cleans"],
        overwrite=given["overwrite"],
        retries_failed=given["retry_failed"],
        quiet=quiet,
    )
    check_engine_options(options)
    return options


def _tell_problems(scenario: Scenario) -> None:
    """What of the data cannot be used, whatever else is said: the result is not whole without it."""
    for problem in scenario.problems[:_SHOWN_PROBLEMS]:
        click.echo(f"octavo: left out: {problem}", err=True)
    rest = len(scenario.problems) - _SHOWN_PROBLEMS
    if rest > 0:
        click.echo(f"octavo: left out: {rest} more", err=True)


def _report(options: PersonaOptions, scenario: Scenario, outcome: Outcome, tell: Any) -> None:
    if outcome.summary is None:
        tell(f"stopped: {outcome.num_left:,} samples are left; the same command goes on from here")
        return
    summary = outcome.summary
    parts = [f"{summary['total_samples']:,} samples of {summary['num_items']:,} items in {options.output}"]
    if outcome.num_failed:
        parts.append(f"{outcome.num_failed:,} failed")
    for count, what in (
        (summary["skipped_items"], "skipped, having no context"),
        (summary["items_without_history"], "made without a history, their users having none"),
        (summary["truncated_prompts"], "cut to fit"),
        (len(scenario.problems), "left out, as said above"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    if outcome.run is None:
        parts.append("nothing was left to do")
    else:
        rate = summary["throughput_samples_per_sec"]
        parts.append(f"{rate:,.2f} samples/s ({summary['generated_tokens_per_sec']:,.0f} tok/s)")
    tell("; ".join(parts))
