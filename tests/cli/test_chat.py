"""`octavo chat` with a fake engine: one answer, a conversation, and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from octavo import RequestOutput
from octavo.errors import RequestError
from tests.cli.conftest import Cli
from tests.cli.fakes import FakeLLM


def test_one_answer(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("chat", "--prompt", "hi", "--system", "be brief", "--temperature", "0")
    assert (result.code, result.out) == (0, "one two three\n")
    assert "2 prompt tokens, 3 tokens in" in result.err
    (llm,) = fake_llm.made
    assert llm.kwargs == {"model": "smollm2"}
    messages, params = llm.calls[0]
    assert messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert params is not None
    assert params.temperature == 0
    assert llm.shutdowns == 1


def test_prompt_from_stdin(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    cli("chat", "--prompt", "-", stdin="from a pipe")
    assert fake_llm.made[0].calls[0] == ([{"role": "user", "content": "from a pipe"}], None)


def test_a_conversation_grows_and_can_be_forgotten(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    lines = [
        "one",
        "",
        "two",
        "/reset",
        "three",
        "/system be brief",
        "four",
        "/reset",
        "five",
        "/nonsense",
        "/exit",
        "never",
    ]
    result = cli("chat", "m", stdin="\n".join(lines))
    assert result.code == 0
    assert result.out == "one two three\n" * 5
    assert "/nonsense is not a command" in result.err
    answer = {"role": "assistant", "content": "one two three"}
    system = {"role": "system", "content": "be brief"}

    def said(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    assert [messages for messages, _ in fake_llm.made[0].calls] == [
        [said("one")],
        [said("one"), answer, said("two")],
        [said("three")],
        [system, said("four")],
        [system, said("five")],
    ]


def test_an_error_leaves_the_conversation_as_it_was(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    fake_llm.errors = ["too long"]
    result = cli("chat", "m", stdin="one\ntwo\n")
    assert result.code == 0
    assert "octavo: error: too long" in result.err
    assert [messages for messages, _ in fake_llm.made[0].calls] == [
        [{"role": "user", "content": "one"}],
        [{"role": "user", "content": "two"}],
    ]


def test_a_conversation_that_is_too_long_can_be_forgotten(
    cli: Cli, fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = fake_llm.chat

    def chat(self: FakeLLM, messages: list[dict[str, str]], *rest: Any, **more: Any) -> Any:
        if "long" in messages[-1]["content"]:
            raise RequestError("too long", "prompt")
        return answer(self, messages, *rest, **more)

    monkeypatch.setattr(fake_llm, "chat", chat)
    result = cli("chat", "m", "--system", "s", stdin="long\n")
    assert "too long" in result.err
    assert "/reset" not in result.err  # there is nothing to forget
    result = cli("chat", "m", "--system", "s", stdin="one\nlong\n")
    assert result.err.endswith("octavo: error: too long\n(/reset forgets the conversation so far)\n")


def test_a_line_that_is_not_utf8_is_left_out(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("chat", "m", stdin=b"one\ncaf\xe9\ntwo\n")
    assert result.code == 0
    assert "octavo: error: stdin is not UTF-8 text: byte 0xe9" in result.err
    assert [messages[-1]["content"] for messages, _ in fake_llm.made[0].calls] == ["one", "two"]
    assert cli("chat", "m", "--prompt", "-", stdin=b"\xff").code == 1


class Interrupted(FakeLLM):
    """Ctrl-C arrives while the second word of the first answer is made."""

    times = 1

    def _states(self, prompt: str | None) -> Iterator[RequestOutput]:
        for number, state in enumerate(super()._states(prompt)):
            if number == 1 and len(self.calls) == 1:
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGINT)
            yield state


@pytest.fixture
def interrupted(fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> type[Interrupted]:
    import octavo

    fake = type("FakeInterrupted", (Interrupted,), {"made": [], "errors": []})
    monkeypatch.setitem(vars(octavo), "LLM", fake)
    return fake


def test_ctrl_c_stops_the_present_answer_only(cli: Cli, interrupted: type[Interrupted]) -> None:
    result = cli("chat", "m", stdin="one\ntwo\n")
    assert result.code == 0
    assert result.out == "one two\none two three\n"
    (llm,) = interrupted.made
    assert llm.closed_streams == 2
    assert llm.calls[1][0][1] == {"role": "assistant", "content": "one two"}  # what there was of it
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_ends_a_single_answer(cli: Cli, interrupted: type[Interrupted]) -> None:
    result = cli("chat", "m", "--prompt", "hi")
    assert (result.code, result.out) == (130, "one two\n")
    assert interrupted.made[0].shutdowns == 1
    assert cli("generate", "m", "--prompt", "hi").code == 130


def test_a_second_ctrl_c_ends_at_once(cli: Cli, interrupted: type[Interrupted]) -> None:
    interrupted.times = 2
    result = cli("chat", "m", "--prompt", "hi")
    assert result.code == 130
    assert interrupted.made[0].shutdowns == 1
