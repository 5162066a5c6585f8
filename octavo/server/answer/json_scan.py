"""Reading a tool call, `{"name": …, "arguments": {…}}`, while its JSON still arrives.

The arguments are passed on exactly as the model wrote them, and as soon as the name is known; they are
not parsed, since a model may stop half-way and the caller wants what there is. Everything is decided
character by character, so the result never depends on how the text was cut.
"""

from __future__ import annotations

import json
from typing import Literal

SPACE = " \t\n\r"
_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("type", "id", "call_id", "index")  # written by some models, of no use here


class ValueScanner:
    """Finds the end of one JSON value. It trusts the value's inside: brackets and quotes are all it knows."""

    def __init__(self) -> None:
        self.done = False
        self.kind: Literal["", "nested", "string", "scalar"] = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str, start: int) -> int:
        """Read from `start`; returns the index behind the value, or len(text) if it goes on.

        The first character must not be white space.
        """
        if not self.kind and start < len(text):
            first = text[start]
            self.kind = "nested" if first in "{[" else "string" if first == '"' else "scalar"
        if self.kind == "scalar":
            for index in range(start, len(text)):
                if text[index] in SPACE or text[index] in ",}]":
                    self.done = True
                    return index
            return len(text)
        depth, in_string, escaped = self._depth, self._in_string, self._escaped
        for index in range(start, len(text)):
            character = text[index]
            if in_string:
                if escaped:
                    escaped = False
                elif character == "\\":
                    escaped = True
                elif character == '"':
                    in_string = False
            elif character == '"':
                in_string = True
            elif character in "{[":
                depth += 1
            elif character in "}]":
                depth -= 1
            if depth == 0 and not in_string:
                self.done = True
                return index + 1
        self._depth, self._in_string, self._escaped = depth, in_string, escaped
        return len(text)


class CallScanner:
    """One call. `names`, if given, are the only names it may have.

    `failed` is set where the text is no call: no object, no name, another name, or keys that no call has.
    """

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self.name: str | None = None
        self.done = False
        self.failed = False
        self._names = names
        self._expects: Literal["object", "key", "colon", "value", "comma"] = "object"
        self._key: str | None = None
        self._value: ValueScanner | None = None
        self._raw: list[str] = []  # of the key or value being read
        self._arguments: list[str] = []  # not taken yet
        self._has_arguments = False
        self._passes_on = False  # the value being read is the arguments' object

    def take_arguments(self) -> str:
        """The arguments that have come since the last call of this; "" before the name is known."""
        if self.name is None:
            return ""
        arguments = "".join(self._arguments)
        self._arguments.clear()
        return arguments

    def feed(self, text: str) -> int:
        """Read on; returns how many characters belong to the call, all of them unless it ended or failed."""
        index = 0
        while index < len(text) and not self.done and not self.failed:
            if self._value is not None:
                index = self._read(text, index)
            elif text[index] in SPACE:
                index += 1
            else:
                index = self._step(text, index)
        return index

    def _step(self, text: str, index: int) -> int:
        """One character of the object's own structure."""
        character = text[index]
        expects = self._expects
        if expects == "object" and character == "{":
            self._expects = "key"
        elif expects == "key" and character == '"':
            self._value = ValueScanner()
            return self._read(text, index)
        elif expects == "colon" and character == ":":
            self._expects = "value"
        elif expects == "value" and character not in ",}]":
            self._value = ValueScanner()
            self._passes_on = character == "{" and self._key in _ARGUMENT_KEYS and not self._has_arguments
            return self._read(text, index)
        elif expects == "comma" and character == ",":
            self._expects = "key"
        elif expects == "comma" and character == "}":
            self._end()
        else:
            self.failed = True
            return index
        return index + 1

    def _read(self, text: str, index: int) -> int:
        """On with the string or value at hand."""
        assert self._value is not None
        end = self._value.feed(text, index)
        piece = text[index:end]
        if self._passes_on:
            self._arguments.append(piece)
            self._has_arguments = True
        else:
            self._raw.append(piece)
        if self._value.done:
            raw = "".join(self._raw)
            self._raw.clear()
            self._value = None
            self._take(raw)
        return end

    def _take(self, raw: str) -> None:
        if self._expects == "key":
            self._key = _string(raw)
            known = self._key in _NAME_KEYS + _ARGUMENT_KEYS + _OTHER_KEYS
            self.failed = self._key is None or (self.name is None and not known)
            self._expects = "colon"
            return
        self._expects = "comma"
        if self._passes_on:
            self._passes_on = False
        elif self._key in _NAME_KEYS and self.name is None:
            self.name = _string(raw)
            self.failed = not self.name or (self._names is not None and self.name not in self._names)
            if self.failed:
                self.name = None
        elif self._key in _ARGUMENT_KEYS and not self._has_arguments:
            # Arguments as a string that holds JSON, or null for none; whatever else goes on as it is.
            inner = _string(raw)
            self._arguments.append(inner if inner is not None else "{}" if raw == "null" else raw)
            self._has_arguments = True

    def _end(self) -> None:
        if self.name is None:
            self.failed = True
            return
        if not self._has_arguments:
            self._arguments.append("{}")
        self.done = True


def _string(raw: str) -> str | None:
    """The text of a JSON string, None if it is none."""
    try:
        value = json.loads(raw, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
