"""What the documentation tells people to type is true: each command line is given to the real parser, each
piece of Python is checked against the real signatures, each configuration file is read."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import octavo
from octavo.cli.lazy import Session
from octavo.cli.main import cli
from octavo.config import EngineArgs, SpeculativeConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Bare flags in the text that belong to other programs: vLLM, docker compose, pip.
FOREIGN_FLAGS = {
    "migration.md": {
        "--task", "--enable-auto-tool-choice", "--tool-call-parser", "--allowed-origins",
        "--disable-log-requests",
    },
    "serving.md": {"--profile"},
    "troubleshooting.md": {"--extra-index-url"},
}  # fmt: skip
CALLS = {"LLM": octavo.LLM, "AsyncLLM": octavo.AsyncLLM}


class Block(NamedTuple):
    """A fenced piece of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 2
            yield Block(page.name, line, match[1], match[2])


def in_language(*languages: str) -> list[Block]:
    found = [block for block in blocks() if block.language in languages]
    assert found, languages
    return found


def command_lines(block: Block) -> Iterator[list[str]]:
    """Every call of octavo in a piece of shell, as words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in ("|", "&&", ";", "<", ">"):
                words.append(word)
                continue
            if words[:1] == ["octavo"]:
                yield words[1:]
            words = []
            if word in ("<", ">"):
                break


def parse(words: list[str]) -> None:
    """Read a command line as `octavo` would, and stop before it does anything."""
    context = click.Context(cli, info_name="octavo", obj=Session())
    command: click.Command = cli
    with context:
        while isinstance(command, click.Group):
            name, found, words = command.resolve_command(context, words)
            assert found is not None
            context = click.Context(found, parent=context, info_name=name, obj=context.obj)
            command = found
        command.parse_args(context, words)


@pytest.mark.parametrize("block", in_language("bash", "sh"), ids=str)
def test_command_lines_are_understood(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for words in command_lines(block):
        for word in words:
            if re.fullmatch(r"[\w.-]+\.(jsonl?|yaml|txt)", word):  # the parser looks whether it is there
                Path(word).touch()
        try:
            parse(list(words))
        except click.exceptions.Exit:  # --help
            pass
        except click.ClickException as error:
            pytest.fail(f"{block}: octavo {shlex.join(words)}: {error.format_message()}")


def all_flags(command: click.Command) -> set[str]:
    found = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(command, click.Group):
        with click.Context(command) as context:
            for name in command.list_commands(context):
                under = command.get_command(context, name)
                assert under is not None
                found |= all_flags(under)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_verbs_in_the_text_exist(page: Path) -> None:
    """`--flag` must be one of ours, `octavo VERB --flag` one of that verb's; other programs' are theirs."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        ours = re.match(r"octavo ([a-z]\w*)|--[a-z]", code)
        if ours is None:
            continue
        command: click.Command | None = cli
        if ours[1] is not None:
            command = cli.get_command(click.Context(cli), ours[1])
        assert command is not None, f"{page.name}: {code}"
        known = all_flags(command) | {"--help"} | FOREIGN_FLAGS.get(page.name, set())
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert flag in known, f"{page.name}: {code}"


def literal(node: ast.expr) -> object:
    """The value of a literal; None where it is no literal."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


@pytest.mark.parametrize("block", in_language("python"), ids=str)
def test_python_uses_names_that_exist(block: Block) -> None:
    tree = ast.parse(block.text, f"{block.page}:{block.line}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("octavo"):
            module = __import__(node.module or "", fromlist=["_"])
            assert all(hasattr(module, alias.name) for alias in node.names), block
        if isinstance(node, ast.Call):
            check_call(node, block, octavo.AsyncLLM if "AsyncLLM(" in block.text else octavo.LLM)


def check_call(call: ast.Call, block: Block, llm: type) -> None:
    """Keywords of our own classes and methods; literal values are checked as they would be for real."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    if isinstance(call.func, ast.Name) and call.func.id in CALLS:
        assert keywords.keys() <= {field.name for field in fields(EngineArgs)}, (block, list(keywords))
        speculative = literal(keywords["speculative"]) if "speculative" in keywords else None
        if isinstance(speculative, dict):
            SpeculativeConfig.from_dict(speculative)
    elif isinstance(call.func, ast.Name) and call.func.id == "SamplingParams":
        known = {name: value for name, node in keywords.items() if (value := literal(node)) is not None}
        octavo.SamplingParams(**dict.fromkeys(keywords.keys() - known.keys()), **known)  # type: ignore[arg-type]
    elif isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "llm":
        method = getattr(llm, call.func.attr)
        assert keywords.keys() <= inspect.signature(method).parameters.keys(), (block, list(keywords))


@pytest.mark.parametrize("block", in_language("yaml", "json"), ids=str)
def test_configuration_files_and_requests_are_read(block: Block, tmp_path: Path) -> None:
    if block.language == "json":
        for text in re.split(r"\n(?=\{)", block.text):
            json.loads(text)
        return
    from octavo.cli.layers import Layers
    from octavo.cli.serve import command

    file = tmp_path / "serve.yaml"
    file.write_text(block.text)
    assert Layers(command).merge({}, {}, str(file))
