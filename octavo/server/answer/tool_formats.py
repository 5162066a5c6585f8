"""Which format a model writes its tool calls in, found from its chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from octavo.errors import ConfigError
from octavo.server.answer.tool_parsers import HermesParser, LlamaParser, MistralParser, ToolParser


class ToolFormat(NamedTuple):
    """How one family of models writes calls."""

    name: str
    found_by: tuple[str, ...]  # any of these in a chat template says that it is this format
    marks: tuple[str, ...]  # must reach the parser even where they are special tokens
    make: Callable[[frozenset[str], Iterable[str]], ToolParser]  # (names of the tools, texts to drop)


# In this order: should a template hold marks of two families, the first is taken.
FORMATS = (
    ToolFormat("mistral", ("[TOOL_CALLS]",), ("[TOOL_CALLS]", "[ARGS]"), lambda _, drop: MistralParser(drop)),
    ToolFormat(
        "hermes", ("<tool_call>",), ("<tool_call>", "</tool_call>"), lambda _, drop: HermesParser(drop)
    ),
    ToolFormat("llama3_json", ("<|python_tag|>", "ipython"), ("<|python_tag|>",), LlamaParser),
)
HERMES = FORMATS[1]
_ALIASES = {"qwen": "hermes", "llama3": "llama3_json", "llama": "llama3_json"}


def format_named(name: str) -> ToolFormat:
    """The format that an option names. Raises ConfigError."""
    wanted = _ALIASES.get(name, name)
    for found in FORMATS:
        if found.name == wanted:
            return found
    raise ConfigError(f"tool_parser={name!r} is not one of auto, {', '.join(f.name for f in FORMATS)}")


def format_of_template(template: str) -> ToolFormat | None:
    """The format that a chat template shows its model; None where it holds no mark that is known."""
    return next((f for f in FORMATS if any(mark in template for mark in f.found_by)), None)
