"""Server-sent events, from bytes as the network brings them.

Pieces end anywhere: in the middle of a line, of a UTF-8 character, between CR and LF. The stamp of an event
is that of the piece that completed it.
"""

from __future__ import annotations

import codecs


class EventReader:
    """Feed bytes, get the data of the events that are complete."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The `data` of each event that `piece` completes; comments and other fields are dropped."""
        text = self._rest + self._decoder.decode(piece)
        # A CR at the end may be half of CR LF: it waits for what follows.
        held = text.endswith("\r")
        lines = (text[:-1] if held else text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._rest = lines.pop() + ("\r" if held else "")
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append("\n".join(self._data))
                    self._data = []
            elif line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
        return events

    @property
    def pending(self) -> bool:
        """True if an event has begun and not ended."""
        return bool(self._data or self._rest.strip())
