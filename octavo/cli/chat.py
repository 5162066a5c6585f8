"""`octavo chat`: talk to a model in the terminal.

A conversation is a list of messages that grows; the engine's prefix cache makes sure that only
the new part is computed. Ctrl-C stops the present answer and keeps what there is of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

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
from octavo.cli.layers import current_environment
from octavo.cli.options import (
    SectionCommand,
    engine_kwargs,
    engine_options,
    sampling_options,
    sampling_params,
)
from octavo.cli.remote import RemoteModel
from octavo.cli.show_drafts import DraftPainter, wants_colour
from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo import LLM, SamplingParams

DEFAULT_MODEL = "smollm2"
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
@click.argument("model", required=False)
@click.option("--prompt", help="Answer this one message and leave; - reads it from stdin.")
@click.option("--system", help="System message.")
@click.option("--url", help="Talk to a server, such as http://127.0.0.1:8000; MODEL is its name there.")
@click.option("--show-drafts", is_flag=True, help="Colour accepted, rejected and bonus tokens.")
@click.option("-q", "--quiet", is_flag=True, help="No memory plan, only warnings.")
@sampling_options(only=CHAT_SAMPLING)
@engine_options
def command(
    model: str | None,
    prompt: str | None,
    system: str | None,
    url: str | None,
    show_drafts: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Talk to MODEL (default: smollm2), a folder, a .gguf file, a hub id, or an alias; or with --url to a
    server that speaks OpenAI's protocol (default: the first model it names; the key is $OPENAI_API_KEY).

    The speed of each answer goes to stderr.
    """
    params = sampling_params(given)
    engine = engine_kwargs(None, given)
    if url is not None:
        _refuse_engine_options([*engine, *(["show_drafts"] if show_drafts else [])])
        remote = RemoteModel(url, model, current_environment().get("OPENAI_API_KEY"), _fields(params))
        _talk(Chat(remote, system), prompt)
        return
    if show_drafts and engine.get("speculative") is None:
        raise click.UsageError(
            "--show-drafts needs a drafter: add --speculative-method prompt_lookup, or --draft MODEL"
        )
    if prompt == "-":
        prompt = read_stdin()  # before a model is loaded for nothing
    llm = load_llm({"model": model or DEFAULT_MODEL, **engine}, quiet=quiet)
    try:
        llm.check_chat()  # rather than after the first message was typed
        local = LocalModel(llm, with_model_defaults(llm, params), show_drafts=show_drafts)
        _talk(Chat(local, system), prompt)
    finally:
        llm.shutdown()


def _refuse_engine_options(given: list[str]) -> None:
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"with --url there is no engine here to be told {names}; leave it out.")


def _fields(params: SamplingParams | None) -> dict[str, Any]:
    """The flags that were given, as fields of a request."""
    return {} if params is None else {name: getattr(params, name) for name in sorted(params.set_fields)}


def _talk(chat: Chat, prompt: str | None) -> None:
    """Answer one prompt, or converse where there is none."""
    if prompt is None:
        _converse(chat)
    elif chat.answer(read_stdin() if prompt == "-" else prompt):  # interrupted
        raise KeyboardInterrupt


class Model(Protocol):
    """Whoever answers."""

    def answer(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Speed, bool]:
        """Print an answer as it comes. Returns it, its speed, and whether Ctrl-C cut it short."""


class LocalModel:
    """An engine in this process."""

    def __init__(self, llm: LLM, params: SamplingParams | None, *, show_drafts: bool = False) -> None:
        self._llm = llm
        self._params = _traced(llm, params) if show_drafts else params
        self._show_drafts = show_drafts
        self._legend_shown = False

    def answer(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Speed, bool]:
        """See `Model`. Raises RequestError if there is no answer."""
        return stream_answer(self._llm.chat(messages, self._params, stream=True), painter=self._painter())

    def _painter(self) -> DraftPainter | None:
        tokenizer = self._llm._engine_parts().engine.tokenizer if self._show_drafts else None
        if tokenizer is None:
            return None
        painter = DraftPainter(tokenizer, colour=wants_colour())
        if not self._legend_shown:
            click.echo(f"[{painter.legend()}]", err=True, color=wants_colour() or None)
            self._legend_shown = True
        return painter


class Chat:
    """One conversation: its messages so far, and who answers."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
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

    @property
    def has_begun(self) -> bool:
        """True if there is something to forget."""
        return len(self.messages) > (self.system is not None)

    def answer(self, text: str) -> bool:
        """Stream the answer to `text` and remember both; True if it was interrupted.

        Raises RequestError if there is no answer; the conversation is then as it was before.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            reply, self.last_speed, stopped = self._model.answer(self.messages)
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": reply})
        click.echo(self.last_speed.line(), err=True)
        return stopped


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
            if error.param == "prompt" and chat.has_begun:
                click.echo("(/reset forgets the conversation so far)", err=True)


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
