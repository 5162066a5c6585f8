"""Tool calls in a model's text, in each of the formats that models write them in.

A parser turns pieces of text into `Piece`s: content, the beginning of a call, and more of its
arguments. What looks like a call and turns out to be none is content, as the model wrote it. The
result never depends on how the text was cut.

Two formats are Octavo's own, for answers that structured output holds to a schema: a JSON list of calls
(tool_choice "required") and the bare arguments of one function (a named tool_choice).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple, Protocol

from octavo.server.answer.json_scan import SPACE, CallScanner, ValueScanner
from octavo.server.answer.markers import MarkScanner


class Piece(NamedTuple):
    """Something that a piece of text made certain.

    content, reasoning: more `text`. call: call number `call_index` begins, `text` is the function's name.
    arguments: more of the arguments of call `call_index`, as JSON text.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call_index: int = 0


class ToolParser(Protocol):
    """Reads one answer. `num_calls` have begun."""

    num_calls: int

    def feed(self, text: str, *, final: bool = False) -> list[Piece]: ...


class _Parser:
    """What the parsers share: content with its trailing space held back, and the numbering of calls.

    White space between content and a call, and between calls, is layout and belongs to nobody.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._space = ""  # may turn out to stand before a call
        self._text = ""  # arrived, and not yet understood

    def feed(self, text: str, *, final: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        self._text += text
        while self._advance(pieces, final):
            pass
        if final and self._space and self.num_calls == 0:
            pieces.append(Piece("content", self._space))
            self._space = ""
        return pieces

    def _advance(self, pieces: list[Piece], final: bool) -> bool:
        """Understand some of `_text`; False once more text is needed. With `final`, all of it."""
        raise NotImplementedError

    def _content(self, pieces: list[Piece], text: str) -> None:
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            pieces.append(Piece("content", kept))

    def _begin_call(self, pieces: list[Piece], name: str) -> None:
        self._space = ""
        pieces.append(Piece("call", name, self.num_calls))
        self.num_calls += 1

    def _arguments(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append(Piece("arguments", text, self.num_calls - 1))


class _CallReader:
    """Feeds a `CallScanner` and keeps the raw text for as long as it may have to be content."""

    def __init__(self, before: str, names: frozenset[str] | None = None) -> None:
        self._scanner = CallScanner(names)
        self._raw = before
        self._begun = False

    @property
    def ended(self) -> bool:
        return self._scanner.done or self._scanner.failed

    @property
    def succeeded(self) -> bool:
        """True once the call was announced, however it went on."""
        return self._begun

    @property
    def raw(self) -> str:
        return self._raw

    def read(self, parser: _Parser, pieces: list[Piece], text: str) -> str:
        """Read on; returns the text behind the call, or behind what proves that it is none."""
        scanner = self._scanner
        used = scanner.feed(text)
        if scanner.name is not None and not self._begun:
            self._begun = True
            parser._begin_call(pieces, scanner.name)
            self._raw = ""
        if self._begun:
            parser._arguments(pieces, scanner.take_arguments())
        else:
            self._raw += text[:used]
        return text[used:]


class HermesParser(_Parser):
    """Hermes, Qwen: `<tool_call>{"name": …, "arguments": …}</tool_call>`, any number, text between them."""

    _BEGIN, _END = "<tool_call>", "</tool_call>"

    def __init__(self, dropped: Iterable[str] = ()) -> None:
        super().__init__()
        self._marks = MarkScanner([self._BEGIN, *dropped])
        self._call: _CallReader | None = None
        self._after_call = False

    def _advance(self, pieces: list[Piece], final: bool) -> bool:
        if self._call is not None:
            self._text = self._call.read(self, pieces, self._text)
            if not self._call.ended and not final:
                return False
            if not self._call.succeeded:
                self._content(pieces, self._call.raw)
            self._after_call = self._call.succeeded
            self._call = None
        if self._after_call:
            rest = self._text.lstrip()
            if rest.startswith(self._END):
                self._text = rest[len(self._END) :]
            elif self._END.startswith(rest):
                if not final:
                    return False
                self._text = ""
            else:  # the closing mark is missing, or something stands before it
                self._text = rest
            self._after_call = False
        text, mark, self._text = self._marks.cut(self._text)
        self._content(pieces, text)
        if mark == self._BEGIN:
            self._call = _CallReader(self._BEGIN)
        elif mark is None and final:
            self._content(pieces, self._marks.release())
        return mark is not None


class LlamaParser(_Parser):
    """Llama 3: the whole answer is `{"name": …, "parameters": …}`, several parted by `;` or `,`.

    `<|python_tag|>` may stand before it, even after text. Nothing but its keys and the name tells a call
    from a JSON answer, so only `names` are calls.
    """

    _TAG = "<|python_tag|>"

    def __init__(self, names: frozenset[str], dropped: Iterable[str] = ()) -> None:
        super().__init__()
        self._names = names
        self._marks = MarkScanner([self._TAG, *dropped])
        self._state: Literal["start", "call", "after", "text"] = "start"
        self._call: _CallReader | None = None
        self._separator = ""

    def _advance(self, pieces: list[Piece], final: bool) -> bool:
        if self._state == "call":
            assert self._call is not None
            self._text = self._call.read(self, pieces, self._text)
            if not self._call.ended and not final:
                return False
            if not self._call.succeeded:
                self._content(pieces, self._separator + self._call.raw)
            self._state = "after" if self._call.succeeded else "text"
            self._separator = ""
        if self._state in ("start", "after"):
            return self._at_a_beginning(final)
        text, mark, self._text = self._marks.cut(self._text)
        self._content(pieces, text)
        if mark == self._TAG:
            self._state = "start"
        elif mark is None and final:
            self._content(pieces, self._marks.release())
        return mark is not None

    def _at_a_beginning(self, final: bool) -> bool:
        """Where a call may begin: at the start, after the tag, and after another call."""
        rest = self._text.lstrip()
        separator = rest[:1] if self._state == "after" and rest[:1] in (";", ",") else ""
        begun = rest[len(separator) :].lstrip()
        if begun.startswith("{"):
            self._call, self._text = _CallReader(separator, self._names), begun
            self._state = "call"
        elif begun.startswith(self._TAG):
            self._text = begun[len(self._TAG) :]
            self._state = "start"
        elif self._TAG.startswith(begun) and not final:
            return False
        else:
            self._state = "text"
        return True


class MistralParser(_Parser):
    """Mistral: `[TOOL_CALLS]` and then a JSON list of calls, or (later models) `name[ARGS]{…}`.

    begins_with_list: the answer starts with the list. That is what tool_choice "required" asks structured
    output for, whatever the model's own format is.
    """

    _MARK = "[TOOL_CALLS]"

    def __init__(self, dropped: Iterable[str] = (), *, begins_with_list: bool = False) -> None:
        super().__init__()
        self._marks = MarkScanner([self._MARK, *dropped])
        self._list = _CallList("") if begins_with_list else None
        self._call: _NamedCall | None = None
        self._after_mark = False

    def _advance(self, pieces: list[Piece], final: bool) -> bool:
        if self._after_mark:
            rest = self._text.lstrip()
            if not rest and not final:
                return False
            self._after_mark = False
            self._text = rest
            if rest.startswith("["):
                self._list = _CallList(self._MARK)
            else:
                self._call = _NamedCall()
        if self._list is not None:
            self._text = self._list.read(self, pieces, self._text, final)
            if not self._list.ended:
                return False
            self._list = None
        if self._call is not None:
            self._text = self._call.read(self, pieces, self._text)
            if not self._call.ended and not final:
                return False
            if not self._call.succeeded:
                self._content(pieces, self._MARK + self._call.raw)
            self._call = None
        text, mark, self._text = self._marks.cut(self._text)
        self._content(pieces, text)
        if mark == self._MARK:
            self._after_mark = True
        elif mark is None and final:
            self._content(pieces, self._marks.release())
        return mark is not None


class _NamedCall:
    """`name[ARGS]{…}` or `name{…}`: a function's name, and then the object of its arguments."""

    _BEFORE_OBJECT = re.compile(r"([\w.-]*)\s*(\[(A(R(G(S(\]\s*)?)?)?)?)?)?")

    def __init__(self) -> None:
        self.raw = ""
        self.succeeded = False
        self.ended = False
        self._value: ValueScanner | None = None

    def read(self, parser: _Parser, pieces: list[Piece], text: str) -> str:
        """Read on; returns the text behind the call, or from where it is none."""
        at = 0
        while self._value is None and at < len(text):
            head = self._BEFORE_OBJECT.fullmatch(self.raw)
            assert head is not None  # `raw` grows only as long as it fits
            if text[at] == "{" and head[1] and (head[2] is None or head[7] is not None):
                self._value = ValueScanner()
                self.succeeded = True
                parser._begin_call(pieces, head[1])
            elif self._BEFORE_OBJECT.fullmatch(self.raw + text[at]) is None:
                self.ended = True
                return text[at:]
            else:
                self.raw += text[at]
                at += 1
        if self._value is None:
            return ""
        end = self._value.feed(text, at)
        parser._arguments(pieces, text[at:end])
        self.ended = self._value.done
        return text[end:]


class _CallList:
    """A JSON list of calls, `[{"name": …, "arguments": …}, …]`. `before` is the text it may have to be."""

    _EXPECTED: ClassVar = {"start": "[", "item": "{]", "behind": ",]"}

    def __init__(self, before: str) -> None:
        self.ended = False
        self._raw = before
        self._state: Literal["start", "item", "behind"] = "start"
        self._has_calls = False
        self._call: _CallReader | None = None

    def read(self, parser: _Parser, pieces: list[Piece], text: str, final: bool) -> str:
        """Read on; returns the text behind the list, or from where it is none."""
        while not self.ended:
            if self._call is not None:
                text = self._call.read(parser, pieces, text)
                if not self._call.ended and not final:
                    return text
                self._raw = self._call.raw  # nothing, if it was a call
                self._has_calls |= self._call.succeeded
                self._state, self.ended = "behind", not self._call.succeeded
                self._call = None
                continue
            rest = text.lstrip(SPACE)
            self._raw += text[: len(text) - len(rest)]
            text, first = rest, rest[:1]
            if not first:
                if not final:
                    return text
                self.ended = True
            elif first not in self._EXPECTED[self._state]:
                self.ended = True
            elif first == "{":
                self._call = _CallReader(self._raw)
            else:
                self._raw += first
                text = text[1:]
                self._state, self.ended = "item", first == "]"
                if self.ended and self._has_calls:
                    self._raw = ""
        parser._content(pieces, self._raw)
        return text


class ArgumentsParser:
    """The whole answer is the arguments of one known function: what a named tool_choice asks for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.num_calls = 0

    def feed(self, text: str, *, final: bool = False) -> list[Piece]:
        """All text is arguments; the call begins with the first of it."""
        pieces = []
        if self.num_calls == 0:
            text = text.lstrip()
            if text:
                self.num_calls = 1
                pieces.append(Piece("call", self._name))
        if text:
            pieces.append(Piece("arguments", text))
        return pieces


class PlainParser(_Parser):
    """No calls at all: only texts of special tokens are taken out."""

    def __init__(self, dropped: Iterable[str]) -> None:
        super().__init__()
        self._marks = MarkScanner(dropped)

    def _advance(self, pieces: list[Piece], final: bool) -> bool:
        text, mark, self._text = self._marks.cut(self._text)
        self._content(pieces, text)
        if mark is None and final:
            self._content(pieces, self._marks.release())
        return mark is not None
