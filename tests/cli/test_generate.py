"""`octavo generate` with a fake engine."""

from __future__ import annotations

import json
import sys

import pytest

from octavo.cli.main import main
from tests.cli.conftest import Cli
from tests.cli.fakes import FakeLLM


def test_one_prompt_is_streamed(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("generate", "m", "--prompt", "hello", "--max-tokens", "3", "--max-model-len", "64")
    assert (result.code, result.out, result.err) == (0, "one two three\n", "")
    (llm,) = fake_llm.made
    assert llm.kwargs == {"model": "m", "max_model_len": 64}
    prompts, params = llm.calls[0]
    assert prompts == ["hello"]
    assert params is not None
    assert params.set_fields == {"max_tokens"}
    assert (llm.closed_streams, llm.shutdowns) == (1, 1)


def test_stats_go_to_stderr(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("generate", "m", "--prompt", "hello", "--stats")
    assert result.out == "one two three\n"
    assert "2 prompt tokens, 3 tokens in" in result.err
    result = cli("generate", "m", "--prompt", "a", "--prompt", "b", "--stats")
    assert "2 prompts, 6 tokens in" in result.err


def test_stdin_is_read(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    cli("generate", "m", stdin="from a pipe\n")
    cli("generate", "m", "--prompt", "first", "--prompt", "-", stdin="second")
    assert [llm.calls[0][0] for llm in fake_llm.made] == [["from a pipe"], ["first", "second"]]


def test_stdin_that_is_not_utf8_is_one_clear_error(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("generate", "m", stdin=b"fine\ncaf\xe9\n")
    assert result.code == 1
    assert "not UTF-8 text: byte 0xe9 in line 2, at offset 8" in result.err
    assert "iconv" in result.err
    assert fake_llm.made == []  # before a model is loaded


def test_windows_newlines_become_plain_ones(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    cli("generate", "m", stdin=b"one\r\ntwo\r\n")
    assert fake_llm.made[0].calls[0][0] == ["one\ntwo"]


def test_a_closed_stdin_is_no_prompt(
    cli: Cli, fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "m"]) == 2
    assert main(["generate", "m", "--prompt", "-"]) == 2
    assert fake_llm.made == []


def test_no_prompt_at_a_terminal_is_wrong_usage(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("generate", "m")
    assert result.code == 2
    assert "--prompt" in result.err
    assert fake_llm.made == []


def test_stdin_twice_is_wrong_usage(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    assert cli("generate", "m", "--prompt", "-", "--prompt", "-", stdin="x").code == 2


def test_several_answers_have_headers(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("generate", "m", "--prompt", "a\nb", "--prompt", "c" * 80, "--n", "2", "--temperature", "1")
    assert result.out.split("\n\n") == [
        "==> a b (1) <==\none two three",
        "==> a b (2) <==\none two three",
        f"==> {'c' * 59}… (1) <==\none two three",
        f"==> {'c' * 59}… (2) <==\none two three\n",
    ]


def test_json_has_one_object_an_answer(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    fake_llm.answer = "één twee"
    result = cli("generate", "m", "--prompt", "a", "--prompt", "b", "--n", "2", "--json")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [(record["prompt_index"], record["index"]) for record in records] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert records[0] == {
        "prompt_index": 0,
        "index": 0,
        "prompt": "a",
        "text": "één twee",
        "token_ids": [0, 1],
        "finish_reason": "stop",
        "stop_reason": None,
        "num_prompt_tokens": 2,
    }
    assert "één" in result.out  # readable, not escaped


def test_logprobs_without_json_are_not_swallowed(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("generate", "m", "--prompt", "a", "--logprobs", "2")
    assert result.code == 2
    assert "--json" in result.err
    assert fake_llm.made == []


def test_a_failed_prompt_fails_the_command_after_the_others(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    fake_llm.errors = ["too long", None, "too short"]
    result = cli("generate", "m", "--prompt", "a", "--prompt", "b")
    assert result.code == 1
    assert result.out == "==> a <==\nerror: too long\n\n==> b <==\none two three\n"
    assert "1 of 2 prompts failed: too long" in result.err
    result = cli("generate", "m", "--prompt", "a")
    assert (result.code, result.err) == (1, "octavo: error: too short\n")
    assert [llm.shutdowns for llm in fake_llm.made] == [1, 1]


def test_illegal_sampling_is_refused_before_loading(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("generate", "m", "--prompt", "a", "--top-p", "3")
    assert result.code == 2
    assert "top_p" in result.err
    assert fake_llm.made == []


def test_the_models_defaults_fill_what_was_not_given(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    fake_llm.generation_defaults = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": 2}
    cli("generate", "m", "--prompt", "a", "--top-p", "0.5")
    cli("chat", "m", "--prompt", "a", "--top-p", "0.5")
    cli("generate", "m", "--prompt", "a")
    first, second, third = [llm.calls[0][1] for llm in fake_llm.made]
    assert first is not None
    assert (first.temperature, first.top_p, first.set_fields) == (0.6, 0.5, frozenset({"top_p"}))
    assert second == first
    assert third is None  # LLM does it then
