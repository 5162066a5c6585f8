"""The command line with FakeLLM in LLM's place, called as a program would be."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

import octavo
from octavo.cli.main import main
from tests.cli.fakes import FakeLLM


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """A fresh subclass of FakeLLM, so that a test may change its answer."""
    fake = type("Fake", (FakeLLM,), {"made": [], "errors": []})
    monkeypatch.setitem(vars(octavo), "LLM", fake)
    return fake


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `octavo …`; `stdin` is what is piped in, None stands for a terminal."""

    def call(*arguments: str, stdin: str | bytes | None = None) -> Result:
        class Stdin(io.TextIOWrapper):
            def isatty(self) -> bool:
                return stdin is None

        raw = stdin if isinstance(stdin, bytes) else (stdin or "").encode()
        monkeypatch.setattr(sys, "stdin", Stdin(io.BytesIO(raw), encoding="utf-8"))
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call
