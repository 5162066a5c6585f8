"""Command groups whose commands are imported when they are called, and the option all of them share.

`octavo --help` and `octavo bench --help` show what there is from a table and import nothing of it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click


@dataclass
class Session:
    """What the groups and their commands share with `main`, which handles their errors."""

    debug: bool = False


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        session = context.find_object(Session)
        if session is not None:
            session.debug = True


def debug_option() -> click.Option:
    """`--debug`, accepted before and after the verb."""
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Show the traceback of an error.",
    )


class LazyGroup(click.Group):
    """Commands by table: name -> (module with a click command named `command`, one line of help).

    `word` is what one of them is called ("verb"), in errors and as the heading of the help.
    """

    def __init__(self, name: str, table: Mapping[str, tuple[str, str]], word: str, **kwargs: Any) -> None:
        super().__init__(name, subcommand_metavar=f"{word.upper()} [ARGS]...", **kwargs)
        self.table = table
        self.word = word

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one; None if there is none of this name."""
        if cmd_name not in self.table:
            return None
        command = importlib.import_module(self.table[cmd_name][0]).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.table[cmd_name][0]}.command is not a click command")
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(debug_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with an error that suggests."""
        name = args[0]
        if not name.startswith("-") and name not in self.list_commands(ctx):
            raise click.UsageError(f"No such {self.word} {name!r}. {self.hint(name)}", ctx)
        return super().resolve_command(ctx, args)

    def hint(self, name: str) -> str:
        """What to type instead of a name that does not exist."""
        near = difflib.get_close_matches(name, self.list_commands(click.get_current_context()), n=1)
        return f"Did you mean {near[0]}?" if near else f"There are: {', '.join(self.table)}."

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table."""
        with formatter.section(f"{self.word.capitalize()}s"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])
