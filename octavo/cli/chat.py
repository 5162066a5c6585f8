"""`octavo chat`: talk to a model in the terminal.

A conversation is a list of messages that grows; the engine's prefix cache makes sure that only
the new part is computed. Ctrl-C stops the present answer and keeps what there is of it.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.console import (
    Speed,
    as_text,
    load_llm,
    read_stdin,
    stdin_is_typed,
    stream_answer,
    with_model_defaults,
)
from octavo.cli.options import (
    SectionCommand,
    engine_kwargs,
    engine_options,
    sampling_options,
    sampling_params,
)
from octavo.cli.show_drafts import DraftPainter, wants_colour
from octavo.errors import NotInThisVersionError, RequestError

if TYPE_CHECKING:
    from octavo import LLM, SamplingParams

CHAT_SAMPLING = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop",
        "presence_penalty", "frequency_penalty", "repetition_penalty", "structured_outputs",
    }
)  # fmt: skip

HELP = """\
/reset           forget the conversation
/system TEXT     set the system message and start anew (no TEXT: remove it)
/exit            leave (also Ctrl-D)
/help            this list
Ctrl-C stops the present answer."""


@click.command(cls=SectionCommand)
@click.argument("model", default="smollm2")
@click.option("--prompt", help="Answer this one message and leave; - reads it from stdin.")
@click.option("--system", help="System message.")
@click.option("--url", help="Talk to a server instead (not in this version).")
@click.option("--show-drafts", is_flag=True, help="Colour accepted, rejected and bonus tokens.")
@click.option("-q", "--quiet", is_flag=True, help="No memory plan, only warnings.")
@sampling_options(only=CHAT_SAMPLING)
@engine_options
def command(
    model: str,
    prompt: str | None,
    system: str | None,
    url: str | None,
    show_drafts: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Talk to MODEL (default: smollm2), a folder, a .gguf file, a hub id, or an alias.

    The speed of each answer goes to stderr.
    """
    if url is not None:
        raise NotInThisVersionError("octavo chat --url")
    params = sampling_params(given)
    if prompt == "-":
        prompt = read_stdin()
    engine = engine_kwargs(model, given)
    if show_drafts and engine.get("speculative") is None:
        raise click.UsageError(
            "--show-drafts needs a drafter: add --speculative-method prompt_lookup, or --draft MODEL"
        )
    llm = load_llm(engine, quiet=quiet)
    try:
        chat = Chat(llm, with_model_defaults(llm, params), system, show_drafts=show_drafts)
        if prompt is None:
            _converse(chat)
        elif chat.answer(prompt):  # interrupted
            raise KeyboardInterrupt
    finally:
        llm.shutdown()


class Chat:
    """One conversation: its messages so far, and how the next answer is made."""

    def __init__(
        self, llm: LLM, params: SamplingParams | None, system: str | None = None, *, show_drafts: bool = False
    ) -> None:
        self._llm = llm
        self._params = _traced(llm, params) if show_drafts else params
        self._show_drafts = show_drafts
        self._legend_shown = False
        self.messages: list[dict[str, str]] = []
        self.last_speed = Speed()
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget everything but a system message."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first is not None and first["role"] == "system" else None

    def answer(self, text: str) -> bool:
        """Stream the answer to `text` and remember both; True if it was interrupted.

        Raises RequestError if there is no answer; the conversation is then as it was before.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            stream = self._llm.chat(self.messages, self._params, stream=True)
            reply, self.last_speed, stopped = stream_answer(stream, painter=self._painter())
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": reply})
        click.echo(self.last_speed.line(), err=True)
        return stopped

    def _painter(self) -> DraftPainter | None:
        tokenizer = self._llm._engine_parts().engine.tokenizer if self._show_drafts else None
        if tokenizer is None:
            return None
        painter = DraftPainter(tokenizer, colour=wants_colour())
        if not self._legend_shown:
            click.echo(f"[{painter.legend()}]", err=True, color=wants_colour() or None)
            self._legend_shown = True
        return painter


def _traced(llm: LLM, params: SamplingParams | None) -> SamplingParams:
    """The parameters, with a record of every verification."""
    from octavo import SamplingParams

    if params is None:
        params = SamplingParams().with_defaults(llm.generation_defaults)
    return params.replace(trace=True)


def _converse(chat: Chat) -> None:
    """Read lines until /exit or the end of input."""
    interactive = stdin_is_typed()
    if interactive:
        with contextlib.suppress(ImportError):  # line editing and history, where Python has it
            import readline  # noqa: F401
        click.echo("Type a message; /help lists the commands, /exit leaves.", err=True)
    while True:
        try:
            line = _read_line(interactive).strip()
        except EOFError:
            if interactive:
                click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\n(/exit or Ctrl-D leaves)", err=True)
            continue
        except RequestError as error:
            click.echo(f"octavo: error: {error}", err=True)
            continue
        if not line:
            continue
        if line.startswith("/"):
            if _obey(chat, line):
                return
            continue
        try:
            chat.answer(line)
        except RequestError as error:  # too long a conversation, say; the engine is fine
            click.echo(f"octavo: error: {error}", err=True)


def _read_line(interactive: bool) -> str:
    """What is typed or piped in next. Raises EOFError at the end, RequestError if it is not UTF-8."""
    if not interactive:
        raw = sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        return as_text(raw)
    if sys.stdin is None:
        raise EOFError
    try:
        return input("> ")
    except UnicodeDecodeError as error:
        raise RequestError("that line is not UTF-8 text; set the terminal to UTF-8") from error


def _obey(chat: Chat, line: str) -> bool:
    """Carry out a command of the conversation; True to leave."""
    name, _, rest = line.partition(" ")
    if name in ("/exit", "/quit"):
        return True
    if name == "/reset":
        chat.reset(chat.system)
        click.echo("(forgotten)", err=True)
    elif name == "/system":
        chat.reset(rest.strip() or None)
        click.echo("(new conversation)", err=True)
    elif name == "/help":
        click.echo(HELP, err=True)
    else:
        click.echo(f"{name} is not a command; /help lists them", err=True)
    return False
