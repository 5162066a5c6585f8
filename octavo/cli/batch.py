"""`octavo batch`: offline jobs. One module for each of its verbs, imported when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from octavo.cli.lazy import LazyGroup

# verb -> (module with a click command named `command`, one line of help)
JOBS = {
    "openai": ("octavo.cli.batch_openai", "Answer the requests of an OpenAI batch file."),
    "persona": ("octavo.cli.batch_persona", "Make samples for every user of a persona dataset."),
    "check": ("octavo.cli.batch_check", "Are two results the same, and where not, why?"),
}

command = LazyGroup(
    "batch",
    JOBS,
    "job",
    help="Offline jobs: many requests from a file or a dataset. A job that was interrupted goes on where it "
    "was when the same command is given again.",
)


def split_replicas(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """(options of each engine, number of replicas), from what --data-parallel-size and others gave."""
    given = dict(kwargs)
    count = given.pop("data_parallel_size", 1)
    if count < 1:
        raise click.UsageError(f"--data-parallel-size must be at least 1, not {count}")
    return given, count
