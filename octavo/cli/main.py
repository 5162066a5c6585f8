"""The `octavo` command: which verbs there are, and how it ends.

A verb's module is imported when the verb is called, never for `octavo --help`: the table below
holds all that the overview needs. Errors raised on purpose are printed as one block without a
traceback; `--debug` shows it.

Exit codes: 0 done, 1 failed, 2 wrong usage; as a shell has them, 130 interrupted, 141 nobody reads the
output any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from octavo import __version__, other_names
from octavo.cli.lazy import LazyGroup, Session, debug_option
from octavo.errors import NotInThisVersionError, OctavoError

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + the signal's number, as shells count
COMPLETION = "_OCTAVO_COMPLETE"  # click's name for it
# Errors of the system that are no defect of ours, wherever they come up.
_OF_THE_MACHINE = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
    }
)  # fmt: skip

# verb -> (module with a click command named `command`, one line of help)
VERBS = {
    "serve": ("octavo.cli.serve", "OpenAI-compatible server."),
    "chat": ("octavo.cli.chat", "Talk to a model in the terminal."),
    "generate": ("octavo.cli.generate", "Continue one or more prompts."),
    "models": ("octavo.cli.models", "List what is supported and what is in the cache."),
    "env": ("octavo.cli.env", "Show what this machine has."),
    "plan": ("octavo.cli.plan", "Show whether a model fits here, and what speculation should bring."),
    "bench": ("octavo.cli.bench", "Measure one engine: load, latency, throughput, start, saturation."),
    "compare": ("octavo.cli.compare", "Run the same work through several engines; one report."),
    "batch": ("octavo.cli.batch", "Offline jobs: OpenAI batch files, persona datasets."),
    "verify": ("octavo.cli.verify", "Prove that speculation and batching change no token."),
}
VERBS_TO_COME = {
    "quantize": "Make 4-bit checkpoints.",
}


class VerbGroup(LazyGroup):
    """The verbs, with those that are known but not built yet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.table, *VERBS_TO_COME]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in VERBS_TO_COME:
            return _refusing_command(cmd_name)
        return super().get_command(ctx, cmd_name)

    def hint(self, name: str) -> str:
        if name in other_names.VERBS:
            return f"Here it is called {other_names.VERBS[name]}."
        if name in other_names.VERBS_ADVICE:
            return other_names.VERBS_ADVICE[name]
        return super().hint(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_commands(ctx, formatter)
        with formatter.section("Not in this version"):
            formatter.write_dl(list(VERBS_TO_COME.items()))


def _refusing_command(verb: str) -> click.Command:
    """A verb that is known but not built yet: whatever follows it, it is refused in one line."""

    def refuse(rest: tuple[str, ...]) -> None:
        raise NotInThisVersionError(f"octavo {verb}")

    return click.Command(
        verb,
        callback=refuse,
        params=[click.Argument(["rest"], nargs=-1, type=click.UNPROCESSED), debug_option()],
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
    )


cli = VerbGroup(
    "octavo",
    VERBS,
    "verb",
    help="Octavo: a paged LLM inference engine. `octavo VERB --help` explains a verb.",
    params=[
        debug_option(),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            help="Show the version and exit.",
            callback=lambda context, _, value: _show_version(context) if value else None,
        ),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _show_version(context: click.Context) -> None:
    click.echo(f"octavo {__version__}")
    context.exit()


def main(arguments: Sequence[str] | None = None, command: click.Command = cli) -> int:
    """Run the command line (or one command of it) and return its exit code; nothing is raised."""
    session = Session()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # Not command.main(), which has its own mind about closed pipes and exit codes.
        with command.make_context(command.name, given, obj=session) as context:
            from octavo.platform.byte_code import kept_byte_code  # not for `octavo --help`

            with kept_byte_code():
                result = command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except click.ClickException as error:  # wrong usage; click words it and suggests
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)  # the terminal shows ^C without ending the line
        return INTERRUPTED
    except BrokenPipeError:
        return _nobody_reads()
    except OctavoError as error:
        _show_error(str(error), session)
        return error.exit_code
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            return _defect(error, session)
        where = f": {error.filename}" if error.filename is not None else ""
        _show_error(f"{error.strerror}{where}", session)
        return 1
    except Exception as error:
        return _defect(error, session)
    return result if isinstance(result, int) else 0


def _defect(error: Exception, session: Session) -> int:
    """An error that nobody thought of: still one block."""
    _show_error(f"internal error: {type(error).__name__}: {error}", session)
    if not session.debug:
        click.echo("This is a defect in Octavo; --debug shows the traceback.", err=True)
    return 1


def _nobody_reads() -> int:
    """Whoever read our output went away (`octavo models | head`): end quietly, as other programs do.

    Python flushes what is left at exit, which must not fail loudly.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stdout may be anything by now
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


def _show_error(message: str, session: Session) -> None:
    if session.debug:
        traceback.print_exc()
    click.echo(f"octavo: error: {message}", err=True)


def run() -> NoReturn:
    """Entry point of the console script; also of the shell completion that it prints itself."""
    instruction = os.environ.get(COMPLETION)
    if instruction:  # eval "$(_OCTAVO_COMPLETE=bash_source octavo)"
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(cli, {}, "octavo", COMPLETION, instruction))
    sys.exit(main())
