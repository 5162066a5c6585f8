"""`octavo chat --show-drafts`: the text stays the text, and the marks tell the truth."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, RequestOutput, SamplingParams
from octavo.cli.show_drafts import DraftPainter, wants_colour
from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Cli
from tests.cli.fakes import FakeLLM

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
PROMPT = "one two one two one two one"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


def painted(
    folder: Path, params: dict[str, Any], *, colour: bool = False, depth: int = 0
) -> tuple[list[str], RequestOutput]:
    speculative = {"method": "prompt_lookup", "num_speculative_tokens": 3}
    given = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, trace=True).replace(**params)
    with LLM(
        str(folder), dtype="float32", kv_cache_memory="8MB", speculative=speculative, pipeline_depth=depth
    ) as llm:
        tokenizer = llm._engine_parts().engine.tokenizer
        assert tokenizer is not None
        painter = DraftPainter(tokenizer, colour=colour)
        parts: list[str] = []
        for output in llm.generate([PROMPT], given, stream=True, use_tqdm=False):
            parts.append(painter.paint(output))
    assert output.metrics is not None
    assert output.metrics.speculation is not None
    drafted, accepted = output.metrics.speculation.drafted, output.metrics.speculation.accepted
    assert (f"{accepted} of {drafted} drafts" if drafted else "no drafts") in painter.summary
    return parts, output


def unpainted(text: str) -> str:
    """Without colours and rejected drafts; a prompt of letters and spaces has no brackets of its own."""
    text = re.sub(r"\x1b\[31m\x1b\[9m.*?\x1b\[0m", "", text, flags=re.DOTALL)
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("depth", [0, 1])
def test_without_the_marks_it_is_the_text(folder: Path, depth: int) -> None:
    parts, output = painted(folder, {}, colour=True, depth=depth)
    text = "".join(parts)
    assert unpainted(text) == output.outputs[0].text
    assert len([part for part in parts if part]) > 5  # it was streamed
    assert "\x1b[32m" in text  # accepted


def test_a_stop_string_is_never_shown(folder: Path) -> None:
    _, whole = painted(folder, {})
    stop = whole.outputs[0].text[15:18]
    parts, output = painted(folder, {"stop": [stop]}, colour=True)
    assert output.outputs[0].stop_reason == stop
    assert unpainted("".join(parts)) == output.outputs[0].text
    assert stop not in unpainted("".join(parts))


def test_the_marks_are_those_of_the_trace(folder: Path) -> None:
    parts, output = painted(folder, {}, colour=True)
    assert output.metrics is not None
    steps = output.metrics.trace
    assert steps
    ids, text = output.outputs[0].token_ids, "".join(parts)
    for step in steps:
        assert ids[step.start : step.start + step.num_accepted] == step.drafted_ids[: step.num_accepted]
    rejected = [step for step in steps if step.num_accepted < len(step.drafted_ids)]
    bonus = [
        step
        for step in steps
        if step.drafted_ids
        and step.num_accepted == len(step.drafted_ids)
        and step.start + step.num_accepted < len(ids)  # an answer may end with an accepted draft
    ]
    assert rejected
    assert bonus
    assert text.count("\x1b[31m") == len(rejected)
    assert text.count("\x1b[36m") == len(bonus)


def test_brackets_where_there_are_no_colours(folder: Path) -> None:
    parts, _ = painted(folder, {})
    text = "".join(parts)
    assert "\x1b" not in text
    assert re.search(r"\[[^-].*?\]", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("tty", "no_color", "term", "wanted"),
    [
        (True, "", "xterm", True),
        (True, "1", "xterm", False),
        (False, "", "xterm", False),
        (True, "", "dumb", False),
    ],
)
def test_colours_are_wanted_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tty: bool, no_color: str, term: str, wanted: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    assert wants_colour() is wanted


def test_chat_shows_drafts(cli: Cli, folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    options = ["--dtype", "float32", "--kv-cache-memory", "8MB", "--chat-template", str(template), "-q"]
    options += ["--temperature", "0", "--max-tokens", "30", "--prompt", PROMPT]
    drafting = ["--speculative-method", "prompt_lookup", "--num-speculative-tokens", "3"]
    plain = cli("chat", str(folder), *options, *drafting)
    shown = cli("chat", str(folder), *options, *drafting, "--show-drafts")
    assert plain.code == shown.code == 0
    assert shown.out != plain.out
    assert "[accepted], {bonus}" in shown.err
    assert "drafts accepted" in shown.err


def test_without_a_drafter_there_is_nothing_to_show(cli: Cli, fake_llm: type[FakeLLM]) -> None:
    result = cli("chat", "--prompt", "hi", "--show-drafts")
    assert result.code == 2
    assert "needs a drafter" in result.err
    assert not fake_llm.made
