"""What chat, generate and demo share: load a model, stream an answer, measure its speed."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

import octavo

if TYPE_CHECKING:
    from octavo import LLM, RequestOutput, SamplingParams
    from octavo.cli.show_drafts import DraftPainter


def load_llm(kwargs: dict[str, Any], *, quiet: bool = False) -> LLM:
    """Make the engine; this is where torch is imported.

    What the engine has to say (the memory plan, slow paths taken) goes to stderr; `quiet` leaves
    only warnings.
    """
    from octavo import platform

    platform.prepare_environment()
    show_log(logging.WARNING if quiet else logging.INFO)
    return octavo.LLM(**kwargs)


def with_model_defaults(llm: LLM, params: SamplingParams | None) -> SamplingParams | None:
    """Flags that were not given come from the model's generation_config, as they do without flags.

    (In Python, a SamplingParams that was built by hand is taken as it is.)
    """
    return None if params is None else params.with_defaults(llm.generation_defaults)


def stdin_is_typed() -> bool:
    """True if nothing is piped in: stdin is a terminal, or closed."""
    return sys.stdin is None or sys.stdin.isatty()


def read_stdin() -> str:
    """All that is piped in, less the newline that ends it, which is not part of the text."""
    if sys.stdin is None:
        raise click.UsageError("stdin is closed: pipe a text in, or give it with --prompt.")
    return as_text(sys.stdin.buffer.read()).removesuffix("\n")


def as_text(raw: bytes, source: str = "stdin") -> str:
    """Bytes as text, with plain newlines. Raises RequestError if they are not UTF-8."""
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise octavo.errors.RequestError(
            f"{source} is not UTF-8 text: byte 0x{raw[error.start]:02x} in line {line}, at offset "
            f"{error.start:,}. Convert it first, say with: iconv -f LATIN1 -t UTF-8",
            "prompt",
        ) from error


class _ToStderr(logging.Handler):
    """Log records as plain lines on whatever stderr is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"octavo: {record.getMessage()}", err=True)


def show_log(level: int) -> None:
    """Show Octavo's own log from `level` on; called again, it only changes the level."""
    logger = logging.getLogger("octavo")
    logger.setLevel(level)
    if not any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        logger.addHandler(_ToStderr())
        logger.propagate = False


@dataclass
class Speed:
    """How fast an answer came, seen from outside: seconds since the request was made."""

    prompt_tokens: int = 0
    tokens: int = 0
    first: float | None = None  # time to first token
    last: float = 0.0

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first one; None for fewer than two tokens."""
        if self.first is None or self.tokens < 2 or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)

    def line(self) -> str:
        """One line for people."""
        if self.first is None:
            return f"[{self.prompt_tokens} prompt tokens, no answer]"
        parts = [
            f"{self.prompt_tokens} prompt tokens",
            f"{self.tokens} tokens in {self.last:.2f} s",
            f"first after {self.first:.2f} s",
        ]
        if self.decode_rate is not None:
            parts.append(f"then {self.decode_rate:.1f} tok/s")
        return f"[{', '.join(parts)}]"


class StopFlag:
    """Set by the first Ctrl-C while an answer is streamed."""

    def __init__(self) -> None:
        self.stopped = False


@contextmanager
def interrupt_stops() -> Iterator[StopFlag]:
    """Within it, Ctrl-C sets the flag instead of raising, so that the engine is never torn in the
    middle of a step. A second Ctrl-C raises KeyboardInterrupt after all."""
    flag = StopFlag()

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if flag.stopped:
            raise KeyboardInterrupt
        flag.stopped = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def stream_answer(
    stream: Iterable[RequestOutput], *, echo: bool = True, painter: DraftPainter | None = None
) -> tuple[str, Speed, bool]:
    """Print the first answer of one request as it comes; texts in `stream` are cumulative.

    `painter` shows what became of the drafts, in the text and in a line on stderr.

    Returns the text, its speed, and whether Ctrl-C cut it short (the request is then aborted by
    closing the stream). An answer that ended in an error raises RequestError.
    """
    speed, text = Speed(), ""
    start = time.perf_counter()
    error: str | None = None
    with interrupt_stops() as flag:
        for output in stream:
            answer = output.outputs[0]
            now = time.perf_counter() - start
            speed.prompt_tokens = len(output.prompt_token_ids)
            if len(answer.token_ids) > speed.tokens:
                speed.first = now if speed.first is None else speed.first
                speed.tokens, speed.last = len(answer.token_ids), now
            if painter is not None:
                click.echo(painter.paint(output), nl=False)
                sys.stdout.flush()
            elif echo and len(answer.text) > len(text):
                click.echo(answer.text[len(text) :], nl=False)
                sys.stdout.flush()
            text, error = answer.text, answer.error
            if flag.stopped:
                break
        close = getattr(stream, "close", None)
        if close is not None:  # a generator: closing it aborts the request
            close()
    if echo and text and not text.endswith("\n"):
        click.echo()
    if painter is not None:
        click.echo(painter.summary, err=True)
    if error is not None:
        raise octavo.errors.RequestError(error)
    return text, speed, flag.stopped
