"""One answer, read as it arrives: what of its text is reasoning, content, or a tool call."""

from __future__ import annotations

from octavo.server.answer.reasoning import ThinkSplitter
from octavo.server.answer.tool_parsers import Piece, ToolParser


class AnswerReader:
    """Reasoning is split off first; what remains may hold tool calls.

    max_calls: calls beyond so many are dropped (`parallel_tool_calls` false allows one).
    """

    def __init__(
        self,
        reasoning: ThinkSplitter | None = None,
        tools: ToolParser | None = None,
        max_calls: int | None = None,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._max_calls = max_calls

    @property
    def num_calls(self) -> int:
        """Tool calls that have begun."""
        found = self._tools.num_calls if self._tools is not None else 0
        return found if self._max_calls is None else min(found, self._max_calls)

    @property
    def is_reasoning(self) -> bool:
        """True while all that has come is reasoning."""
        return self._reasoning is not None and self._reasoning.is_reasoning

    def feed(self, text: str, *, final: bool = False) -> list[Piece]:
        """What `text` makes certain. `final`: nothing will follow."""
        if self._reasoning is None:
            return self._read(text, final)
        pieces: list[Piece] = []
        answer = ""
        for part in self._reasoning.feed(text, final=final):
            if part.is_reasoning:
                pieces.append(Piece("reasoning", part.text))
            else:
                answer += part.text
        return pieces + self._read(answer, final)

    def _read(self, text: str, final: bool) -> list[Piece]:
        if self._tools is None:
            return [Piece("content", text)] if text else []
        pieces = self._tools.feed(text, final=final)
        if self._max_calls is None:
            return pieces
        return [p for p in pieces if p.kind == "content" or p.call_index < self._max_calls]
