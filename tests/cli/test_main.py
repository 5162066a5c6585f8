"""Verbs, suggestions, exit codes, and how errors are shown."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.cli import main as cli_main
from octavo.errors import InsufficientMemoryError
from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Cli
from tests.cli.fakes import FakeLLM


def test_help_lists_all_verbs(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    for verb in [*cli_main.VERBS, *cli_main.VERBS_TO_COME]:
        assert f"\n  {verb}" in result.out
    assert "Not in this version" in result.out


def test_every_verb_explains_itself(cli: Cli) -> None:
    for verb in cli_main.VERBS:
        result = cli(verb, "--help")
        assert result.code == 0
        assert f"Usage: octavo {verb}" in result.out
        assert "--debug" in result.out


def test_version(cli: Cli) -> None:
    assert cli("--version").out == "octavo 0.1.0\n"


@pytest.mark.parametrize("verb", list(cli_main.VERBS_TO_COME))
def test_a_verb_to_come_is_refused_in_one_line(cli: Cli, verb: str) -> None:
    result = cli(verb, "some-model", "--port", "8000", "--help")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"octavo: error: octavo {verb} is not in this version of Octavo\n"


def test_unknown_verb_is_suggested(cli: Cli) -> None:
    result = cli("generat", "x")
    assert result.code == 2
    assert "Did you mean generate?" in result.err


def test_unknown_option_is_suggested(cli: Cli) -> None:
    result = cli("generate", "x", "--temprature", "1")
    assert result.code == 2
    assert "--temperature" in result.err


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--max-seq-len", "9"], "--max-model-len"),
        (["--random-seed", "9"], "--engine-seed"),
        (["--task", "embed"], "not in this version"),
        (["--max-new-tokens", "9"], "--max-tokens"),
        (["--guided-regex", "9"], "--structured-outputs={'regex': …}"),
        (["--do-sample"], "--temperature (0 is greedy)"),
        (["--model", "x"], "first argument"),
        (["--swap-space", "4"], "computed again"),
    ],
)
def test_flags_of_other_engines_are_answered_with_ours(cli: Cli, arguments: list[str], advice: str) -> None:
    result = cli("generate", "x", *arguments, "--prompt", "a")
    assert result.code == 2
    assert "No such option: --" in result.err
    assert advice in result.err


@pytest.mark.parametrize(
    ("verb", "advice"),
    [
        ("complete", "called generate"),
        ("run-batch", "called batch"),
        ("embed", "not in this version"),
        ("rerank", "not in this version"),
        ("score", "not in this version"),
    ],
)
def test_verbs_of_other_engines_are_answered_with_ours(cli: Cli, verb: str, advice: str) -> None:
    result = cli(verb, "some-model", "--port", "8000")
    assert result.code == 2
    assert advice in result.err


def test_an_error_is_one_block(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    fake_llm.fail_start = InsufficientMemoryError("too big; lower max_model_len to 512")
    result = cli("generate", "x", "--prompt", "hello")
    assert (result.code, result.out) == (1, "")
    assert result.err == "octavo: error: too big; lower max_model_len to 512\n"


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(cli: Cli, fake_llm: type[FakeLLM], place: str) -> None:
    fake_llm.fail_start = InsufficientMemoryError("too big")
    verb = ["generate", "x", "--prompt", "hello"]
    result = cli(*(["--debug", *verb] if place == "before" else [*verb, "--debug"]))
    assert result.code == 1
    assert "Traceback" in result.err
    assert result.err.endswith("octavo: error: too big\n")


def test_a_defect_is_one_block_too(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    fake_llm.fail_start = ZeroDivisionError("oops")
    result = cli("generate", "x", "--prompt", "hello")
    assert result.code == 1
    assert "internal error: ZeroDivisionError: oops" in result.err
    assert "Traceback" not in result.err


def test_what_the_machine_refuses_is_no_defect(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    fake_llm.fail_start = OSError(errno.ENOSPC, "No space left on device", "/full/file")
    result = cli("generate", "x", "--prompt", "hello")
    assert result.code == 1
    assert result.err.endswith("octavo: error: No space left on device: /full/file\n")
    fake_llm.fail_start = FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")
    assert "This is a defect" in cli("generate", "x", "--prompt", "hello").err


def test_an_option_that_is_not_here_yet(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    from octavo.errors import NotInThisVersionError

    fake_llm.fail_start = NotInThisVersionError("LoRA")
    assert cli("generate", "x", "--prompt", "hello", "--enable-lora").code == 2


def test_an_interrupt_is_quiet(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    fake_llm.fail_start = KeyboardInterrupt()
    result = cli("generate", "x", "--prompt", "hello")
    assert (result.code, result.out, result.err.strip()) == (130, "", "")


@pytest.mark.parametrize("module", ["octavo.cli.main", "octavo.cli.models"])
def test_an_interrupt_amid_imports_is_quiet(module: str) -> None:
    code = f"""
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["octavo", "models"]
import octavo.__main__
octavo.__main__.run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


def run_into_a_closed_pipe(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run(
        [sys.executable, "-m", "octavo", *arguments],
        stdout=write_end,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(write_end)
    return process


def test_a_closed_pipe_ends_quietly() -> None:
    process = run_into_a_closed_pipe("--help")
    assert process.returncode == 141  # 128 + SIGPIPE, what shells show for other programs
    assert process.stderr == b""


def test_a_closed_pipe_ends_an_answer_quietly(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", tokenizer=True)
    options = ["--prompt", "hi", "--kv-cache-memory", "4MB", "--ignore-eos", "--quiet"]
    process = run_into_a_closed_pipe("generate", str(folder), *options)
    assert process.returncode == 141
    assert process.stderr == b""


def test_shells_can_complete() -> None:
    env = {**os.environ, "_OCTAVO_COMPLETE": "bash_complete", "COMP_WORDS": "octavo gen", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "octavo"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "generate" in done.stdout


def test_wrong_size_is_refused_by_the_config(cli: Cli) -> None:
    result = cli("plan", "x", "--kv-cache-memory", "lots")
    assert result.code == 2
    assert "kv_cache_memory='lots' is not a size" in result.err
