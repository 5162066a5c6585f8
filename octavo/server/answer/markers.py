"""Finding marks such as `<tool_call>` in a text that arrives in pieces.

A mark may be cut anywhere, so the end of what has arrived is held back for as long as it could be the
beginning of one. What is found therefore never depends on how the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class MarkScanner:
    """Cuts a text at marks. `held` is what may still become one."""

    def __init__(self, marks: Iterable[str]) -> None:
        by_length = sorted(set(marks), key=len, reverse=True)  # the longest of those that begin alike wins
        if not by_length or not by_length[-1]:
            raise ValueError("a mark cannot be empty")
        self._pattern = re.compile("|".join(map(re.escape, by_length)))
        self._prefixes = frozenset(mark[:end] for mark in by_length for end in range(1, len(mark)))
        self._longest_prefix = len(by_length[0]) - 1
        self.held = ""

    def cut(self, text: str) -> tuple[str, str | None, str]:
        """(text before, the first mark, text after it), what was held back included.

        Without a mark, (text that is certain, None, ""), and the rest is held. Give the text after a mark
        to the next call.
        """
        text = self.held + text
        found = self._pattern.search(text)
        if found is not None:
            at, end = found.span()
            # A longer mark may begin where this one does and still be on its way.
            if text[at:] not in self._prefixes:
                self.held = ""
                return text[:at], found[0], text[end:]
            self.held = text[at:]
            return text[:at], None, ""
        for length in range(min(self._longest_prefix, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                self.held = text[-length:]
                return text[:-length], None, ""
        self.held = ""
        return text, None, ""

    def release(self) -> str:
        """What was held back, when no more text will come."""
        held, self.held = self.held, ""
        return held
