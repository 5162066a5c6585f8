"""`octavo batch openai`: an OpenAI batch file in, its answers out."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import click

from octavo.cli.batch import split_replicas
from octavo.cli.console import show_log
from octavo.cli.options import SectionCommand, batch_engine_options, engine_kwargs
from octavo.server.settings import REASONING_PARSERS, TOOL_PARSERS

_LEVELS = ("debug", "info", "warning", "error")


@click.command(cls=SectionCommand)
@click.option(
    "-i", "--input-file", type=click.Path(path_type=Path), required=True,
    help="JSON lines: custom_id, method, url, body.",
)  # fmt: skip
@click.option(
    "-o", "--output-file", type=click.Path(path_type=Path), required=True,
    help="Where results are appended as they finish.",
)  # fmt: skip
@click.option("--model", help="A folder, a .gguf file, a hub id, or an alias. [smollm2]")
@click.option(
    "--served-model-name", multiple=True, help="Name of the model in requests [--model]; may be repeated."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seeds requests that bring none.")
@click.option(
    "--max-retries", type=click.IntRange(min=0), default=2, show_default=True,
    help="Attempts after an engine's failure.",
)  # fmt: skip
@click.option("--retry-failed", is_flag=True, help="Do again what an engine's failure ended in earlier runs.")
@click.option("--overwrite", is_flag=True, help="Throw away what the output file holds.")
@click.option(
    "--tool-parser", type=click.Choice(TOOL_PARSERS), default="auto", show_default=True,
    help="How the model writes tool calls.",
)  # fmt: skip
@click.option(
    "--reasoning-parser", type=click.Choice(REASONING_PARSERS), default="auto", show_default=True,
    help="How it marks its reasoning, or none.",
)  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option(
    "--log-level",
    type=click.Choice(_LEVELS),
    help="What goes to stderr beside progress. [info; quiet: warning]",
)
@batch_engine_options
def command(
    input_file: Path,
    output_file: Path,
    model: str | None,
    served_model_name: tuple[str, ...],
    seed: int,
    max_retries: int,
    retry_failed: bool,
    overwrite: bool,
    tool_parser: str,
    reasoning_parser: str,
    quiet: bool,
    log_level: str | None,
    **given: Any,
) -> int:
    """Answer every request of an OpenAI batch file: /v1/chat/completions and /v1/completions.

    Interrupted, the same command goes on where it was; results that are there are not made again. The
    exit code is 0 if every line has its answer, 1 if any failed. Guide: docs/batch.md.
    """
    if given.get("engine_seed") is not None:
        raise click.UsageError("every request here has a seed of its own: use --seed, not --engine-seed.")
    if overwrite and retry_failed:
        raise click.UsageError("--overwrite throws everything away: leave --retry-failed out.")
    kwargs, count = split_replicas(engine_kwargs(model, given))
    from octavo import hub, platform
    from octavo.batch.checkpoint import fingerprint
    from octavo.batch.openai.job import OpenAIJob, run_openai_job
    from octavo.batch.openai.lines import check_readable
    from octavo.batch.run import exit_code, in_thread, leave, run_async
    from octavo.batch.work import shaping_options
    from octavo.config import EngineArgs

    platform.prepare_environment()  # before torch is imported
    level = log_level or ("warning" if quiet else "info")
    show_log(getattr(logging, level.upper()))
    args = EngineArgs.from_kwargs(**kwargs)
    shaping = shaping_options(args)
    del shaping["model"]  # wherever it lies: its contents are looked at
    check_readable(input_file)  # before a model is fetched for it
    model_path = hub.resolve(args.model, trust_remote_code=args.trust_remote_code)
    job = OpenAIJob(
        input_file=input_file,
        output_file=output_file,
        names=served_model_name or (args.model,),
        shaping={"checkpoint_sha256": fingerprint(model_path), **shaping},
        seed=seed,
        max_retries=max_retries,
        overwrite=overwrite,
        retry_failed=retry_failed,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        quiet=quiet,
    )

    async def open_workers() -> Any:
        # Imports torch, which takes its time: a signal is heard meanwhile.
        workers = await in_thread(lambda: importlib.import_module("octavo.batch.workers"))
        return await workers.open_workers(kwargs, data_parallel_size=count, log_level=level)

    summary, ended_by = run_async(lambda stop: run_openai_job(job, open_workers, stop))
    if not quiet:
        _report(job.output_file, summary)
    if ended_by is not None and summary.num_done < summary.total:
        return leave(exit_code(ended_by))
    return 0 if summary.all_succeeded else 1


def _report(output_file: Path, summary: Any) -> None:
    run = summary.run
    parts = [f"{summary.num_done:,} of {summary.total:,} requests have their result in {output_file}"]
    if summary.num_failed:
        parts.append(f"{summary.num_failed:,} of them failed")
    if run["items"]:
        parts.append(
            f"this run: {run['items']:,} in {run['seconds']:.1f} s, {run['tokens_per_second']:,.0f} tok/s"
        )
        joules = run["energy"]["joules"]
        if joules is not None:
            parts.append(f"{joules:,.0f} J")
    if summary.was_stopped and summary.num_done < summary.total:
        parts.append("stopped: the same command goes on from here")
    click.echo("; ".join(parts), err=True)
