"""Reasoning and tool calls in real shapes of text, cut in every possible way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.server.answer.markers import MarkScanner
from octavo.server.answer.reader import AnswerReader
from octavo.server.answer.reasoning import ThinkSplitter
from octavo.server.answer.tool_formats import format_named, format_of_template
from octavo.server.answer.tool_parsers import (
    ArgumentsParser,
    HermesParser,
    LlamaParser,
    MistralParser,
    Piece,
    ToolParser,
)

Make = Callable[[], ToolParser]
NAMES = frozenset({"get_weather", "add"})
MAKERS: dict[str, Make] = {
    "hermes": lambda: HermesParser(["<|im_end|>"]),
    "llama": lambda: LlamaParser(NAMES, ["<|eom_id|>"]),
    "mistral": lambda: MistralParser(["</s>"]),
    "required": lambda: MistralParser(begins_with_list=True),
    "named": lambda: ArgumentsParser("add"),
}
PARIS = ("get_weather", '{"city": "Paris"}')
SUM = ("add", '{"a": 1, "b": [2, {"c": "}]\\"{"}]}')

# (format, the model's text, content, calls)
GOLDEN: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Just text, 3 < 4 and <tool> too.", "Just text, 3 < 4 and <tool> too.", []),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [PARIS],
    ),
    (
        "hermes",
        'Let me look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"a": 1, "b": [2, {"c": "}]\\"{"}]}, "name": "add"}\n</tool_call>',
        "Let me look.",
        [PARIS, SUM],
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call> Done.', " Done.", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),  # cut short
    ("hermes", '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    ("hermes", "<tool_call>I would call add.</tool_call>", "<tool_call>I would call add.</tool_call>", []),
    ("hermes", '<tool_call>{"tool": "add"}</tool_call>', '<tool_call>{"tool": "add"}</tool_call>', []),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {}}<tool_call>{"name": "add"}',
        "",
        [("add", "{}")] * 2,
    ),
    ("hermes", "an end<|im_end|> within, and <tool_ca", "an end within, and <tool_ca", []),
    ("hermes", " padded \n", " padded \n", []),
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (
        "llama",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"type": "function", "name": "add", "parameters": {"a": 1, "b": [2, {"c": "}]\\"{"}]}}<|eom_id|>',
        "",
        [PARIS, SUM],
    ),
    ("llama", '{"answer": 42, "name": "add"}', '{"answer": 42, "name": "add"}', []),
    ("llama", '{"name": "Alice", "parameters": {}} is', '{"name": "Alice", "parameters": {}} is', []),
    ("llama", 'Calling: <|python_tag|>{"name": "add", "parameters": {}}', "Calling:", [("add", "{}")]),
    ("llama", '{"name": "add", "parameters": {}}; and then?', "; and then?", [("add", "{}")]),
    ("llama", "A set is written {1, 2}.", "A set is written {1, 2}.", []),
    ("llama", "<|python_tag|>print(1)", "print(1)", []),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    (
        "mistral",
        'Both.\n[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
        '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}]\\"{"}]}}]</s>',
        "Both.",
        [PARIS, SUM],
    ),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add{"a": 1, "b": [2, {"c": "}]\\"{"}]}',
        "",
        [PARIS, SUM],
    ),
    ("mistral", "[TOOL_CALLS] no call", "[TOOL_CALLS]no call", []),
    ("mistral", "[TOOL_CALLS] [1, 2]", "[TOOL_CALLS][1, 2]", []),
    ("mistral", "[TOOL_CALLS] []", "[TOOL_CALLS][]", []),
    ("mistral", 'a [TOOL_CALLS] [{"name": "add"}, 7] b', "a, 7] b", [("add", "{}")]),
    ("mistral", "a list: [1, 2] [TOOL", "a list: [1, 2] [TOOL", []),
    (
        "required",
        '[{"name": "get_weather", "parameters": {"city": "Paris"}}, '
        '{"name": "add", "parameters": {"a": 1, "b": [2, {"c": "}]\\"{"}]}}]',
        "",
        [PARIS, SUM],
    ),
    ("required", '[{"name": "add", "parameters": {"a', "", [("add", '{"a')]),
    ("required", "no list", "no list", []),
    ("named", ' {"a": 1}', "", [("add", '{"a": 1}')]),
]


def read(parser: Any, chunks: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """(reasoning, content, calls) of a text given in chunks."""
    pieces: list[Piece] = []
    for chunk in chunks:
        pieces += parser.feed(chunk)
    pieces += parser.feed("", final=True)
    calls: list[list[str]] = []
    for piece in pieces:
        if piece.kind == "call":
            assert piece.call_index == len(calls), "calls are numbered in the order they begin"
            calls.append([piece.text, ""])
        elif piece.kind == "arguments":
            assert piece.call_index == len(calls) - 1
            calls[piece.call_index][1] += piece.text
    texts = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content")}
    return texts["reasoning"], texts["content"], [(name, arguments) for name, arguments in calls]


def cuts(text: str) -> list[list[str]]:
    """The text whole, in single characters, and in two and three parts at every place."""
    ways = [[text], list(text)]
    ways += [[text[:at], text[at:]] for at in range(1, len(text))]
    step = max(1, len(text) // 40)
    for first, second in itertools.combinations(range(1, len(text), step), 2):
        ways.append([text[:first], text[first:second], text[second:]])
    return ways


@pytest.mark.parametrize(("name", "text", "content", "calls"), GOLDEN)
def test_tool_calls_however_the_text_is_cut(
    name: str, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    for chunks in cuts(text):
        assert read(MAKERS[name](), chunks) == ("", content, calls), chunks


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|im_end|>", "<", "[", "{",
    "}", "]", '"', "\\", ":", ",", ";", " ", "\n", '{"name": "add"', '"arguments": {', '"parameters": ',
    "add", "null",
    '{"name": "add", "arguments": {"a": 1}}', "text", "<think>", "</think>", "é", "1",
]  # fmt: skip
WAYS_TO_BEGIN = st.sampled_from([None, True, False])
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@given(
    name=st.sampled_from(sorted(MAKERS)),
    text=texts,
    data=st.data(),
    thinks=st.sampled_from([None, True, False]),
)
@settings(max_examples=300, deadline=None)
def test_no_text_depends_on_its_cuts(name: str, text: str, data: st.DataObject, thinks: bool | None) -> None:
    def reader() -> AnswerReader:
        splitter = None if thinks is None else ThinkSplitter(begins_inside=thinks)
        return AnswerReader(splitter, MAKERS[name]())

    whole = read(reader(), [text])
    assert read(reader(), list(text)) == whole
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=5)))
    chunks = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
    assert read(reader(), chunks) == whole


@pytest.mark.parametrize(
    ("begins_inside", "text", "reasoning", "content"),
    [
        (False, "<think>\nHm. 2+2?\n</think>\n\nFour.", "Hm. 2+2?", "Four."),
        (False, " \n<think>a</think>b", "a", "b"),
        (False, "Four.", "", "Four."),
        (False, "<thin ice", "", "<thin ice"),
        (False, "So <think>x</think>", "", "So <think>x</think>"),
        (False, "<think>", "", ""),
        (False, "<thi", "", "<thi"),
        (False, "<think>\n\n</think>\n\nFour.", "", "Four."),
        (True, "Hm.\n\nYes </thin\n</think>\nFour. </think> ", "Hm.\n\nYes </thin", "Four. </think> "),
        (True, "endless \n", "endless", ""),
        (True, "</think>", "", ""),
    ],
)
def test_reasoning_is_split_off(begins_inside: bool, text: str, reasoning: str, content: str) -> None:
    for chunks in cuts(text):
        found = read(AnswerReader(ThinkSplitter(begins_inside=begins_inside)), chunks)
        assert found == (reasoning, content, []), chunks


def test_calls_are_looked_for_behind_the_reasoning_only() -> None:
    text = (
        '<think>I call <tool_call>{"name": "add"}</tool_call>?</think><tool_call>{"name": "add"}</tool_call>'
    )
    for chunks in cuts(text):
        reader = AnswerReader(ThinkSplitter(begins_inside=False), HermesParser())
        assert read(reader, chunks) == ('I call <tool_call>{"name": "add"}</tool_call>?', "", [("add", "{}")])
        assert reader.num_calls == 1


def test_a_single_call_where_one_is_allowed() -> None:
    text = '<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "get_weather"}</tool_call>'
    for chunks in cuts(text):
        reader = AnswerReader(None, HermesParser(), max_calls=1)
        assert read(reader, chunks) == ("", "", [("add", "{}")])
        assert reader.num_calls == 1


def test_text_is_not_held_back_longer_than_it_must() -> None:
    parser = HermesParser()
    assert parser.feed("Hello <") == [Piece("content", "Hello")]
    assert parser.feed("b>") == [Piece("content", " <b>")]
    assert parser.feed('<tool_call>{"name": "add", "arg') == [Piece("call", "add", 0)]
    assert parser.feed('uments": {"a": 1') == [Piece("arguments", '{"a": 1', 0)]
    assert parser.feed("2") == [Piece("arguments", "2", 0)]


def test_of_marks_that_begin_alike_the_longest_is_found() -> None:
    for chunks in cuts("x<a><a>b<a"):
        scanner, found = MarkScanner(["<a>", "<a>b"]), []
        for chunk in chunks:
            while True:
                before, mark, chunk = scanner.cut(chunk)
                found.append(before)
                if mark is None:
                    break
                found.append(f"({mark})")
        assert "".join(found) + scanner.release() == "x(<a>)(<a>b)<a"
    with pytest.raises(ValueError, match="empty"):
        MarkScanner([""])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ('{{ "<tool_call>\\n" }}', "hermes"),
        ('{{ "[TOOL_CALLS] [" }}', "mistral"),
        ('{{ "<|python_tag|>" }}', "llama3_json"),
        ('{{ "Environment: ipython" }}', "llama3_json"),
        ("{{ messages }}", None),
    ],
)
def test_the_format_is_found_from_the_template(template: str, expected: str | None) -> None:
    found = format_of_template(template)
    assert (found.name if found is not None else None) == expected


def test_a_format_can_be_named() -> None:
    assert format_named("qwen").name == "hermes"
    assert isinstance(format_named("mistral").make(NAMES, ()), MistralParser)
    with pytest.raises(ConfigError, match="hermes"):
        format_named("hermit")
