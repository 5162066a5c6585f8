"""Telling a model's reasoning from its answer: `<think> … </think>` before the text.

The marks themselves, and the white space around them, belong to neither side. Reasoning can only come
first: a `<think>` later in the answer is text that the model wrote.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from octavo.server.answer.markers import MarkScanner

BEGIN, END = "<think>", "</think>"


class Part(NamedTuple):
    """A stretch of text and the side it belongs to."""

    is_reasoning: bool
    text: str


class ThinkSplitter:
    """Splits one answer as it arrives; the sum of the parts never depends on how the text was cut.

    begins_inside: the prompt ended with `<think>` already, so the answer starts as reasoning.
    """

    def __init__(self, *, begins_inside: bool) -> None:
        self._state: Literal["start", "inside", "between", "answer"] = "inside" if begins_inside else "start"
        self._start = ""  # white space and, maybe, a part of <think>
        self._end = MarkScanner([END])
        self._space = ""  # white space that may turn out to stand before </think>
        self._said_something = False

    @property
    def is_reasoning(self) -> bool:
        """True while the reasoning has not ended."""
        return self._state == "inside"

    def feed(self, text: str, *, final: bool = False) -> list[Part]:
        """The parts that `text` makes certain; `final` says that nothing will follow."""
        parts: list[Part] = []
        if self._state == "start":
            text = self._find_begin(text, final)
        if self._state == "inside":
            text = self._read_reasoning(text, parts, final)
        if self._state == "between":
            text = text.lstrip()
            if text:
                self._state = "answer"
        if self._state == "answer" and text:
            parts.append(Part(False, text))
        return parts

    def _find_begin(self, text: str, final: bool) -> str:
        """Decide how the answer begins; returns the text that follows what was decided."""
        text = self._start + text
        begun = text.lstrip()
        if begun.startswith(BEGIN):
            self._state = "inside"
            return begun[len(BEGIN) :]
        if BEGIN.startswith(begun) and not final:
            self._start = text
            return ""
        self._state = "answer"
        return text

    def _read_reasoning(self, text: str, parts: list[Part], final: bool) -> str:
        before, mark, after = self._end.cut(text)
        if final and mark is None:
            before += self._end.release()
        if not self._said_something:
            before = before.lstrip()
        before = self._space + before
        kept = before.rstrip()
        self._space = before[len(kept) :]
        if kept:
            self._said_something = True
            parts.append(Part(True, kept))
        if mark is not None:
            self._state = "between"
        return after
