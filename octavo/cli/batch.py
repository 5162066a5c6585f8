"""`octavo batch`: offline jobs. One module for each of its verbs, imported when it is called."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import click

from octavo.cli.main import debug_option

# verb -> (module with a click command named `command`, one line of help)
JOBS = {
    "openai": ("octavo.cli.batch_openai", "Answer the requests of an OpenAI batch file."),
    "persona": ("octavo.cli.batch_persona", "Make samples for every user of a persona dataset."),
    "check": ("octavo.cli.batch_check", "Are two results the same, and where not, why?"),
}


class JobGroup(click.Group):
    """Jobs by table, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(JOBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in JOBS:
            return None
        command = importlib.import_module(JOBS[cmd_name][0]).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{JOBS[cmd_name][0]}.command is not a click command")
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(debug_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        job = args[0]
        if not job.startswith("-") and job not in JOBS:
            near = difflib.get_close_matches(job, JOBS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(JOBS)}."
            raise click.UsageError(f"No such job {job!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Jobs"):
            formatter.write_dl([(job, text) for job, (_, text) in JOBS.items()])


command = JobGroup(
    "batch",
    help="Offline jobs: many requests from a file or a dataset. A job that was interrupted goes on where it "
    "was when the same command is given again.",
    subcommand_metavar="JOB [ARGS]...",
)


def split_replicas(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """(options of each engine, number of replicas), from what --data-parallel-size and others gave."""
    given = dict(kwargs)
    count = given.pop("data_parallel_size", 1)
    if count < 1:
        raise click.UsageError(f"--data-parallel-size must be at least 1, not {count}")
    return given, count
