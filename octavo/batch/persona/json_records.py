"""The records of a JSON file, one by one, with the line each begins in.

A file is a JSON array of records, or one record after another (JSON lines). A record that is not valid
JSON does not take the rest along: reading goes on behind it, where that can be told. This is why the
file is not handed to `json.load` as a whole.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError

_BETWEEN = re.compile(r"[\s,]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record of a file. `error` says why it could not be read; `value` is None then."""

    index: int  # from 0
    line: int  # from 1
    value: Any
    error: str | None = None


def read_records(path: Path) -> list[RawRecord]:
    """All records of a file. Raises ConfigError if it cannot be read or is no list of records at all."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, for one with iconv -t UTF-8"
        ) from error
    if text.lstrip()[:1] not in ("[", "{"):
        raise ConfigError(
            f"{path} holds no records: it must be a JSON list of objects, or one object a line, and begins "
            f"with {text.lstrip()[:20]!r}"
        )
    return list(_records(text))


def _records(text: str) -> Iterator[RawRecord]:
    starts_of_lines = [0, *(match.end() for match in re.finditer("\n", text))]
    at = len(text) - len(text.lstrip())
    is_array = text[at] == "["
    at += is_array
    index = 0
    while True:
        at = _between(text, at)
        if at == len(text):
            if is_array:
                line = bisect_right(starts_of_lines, at)
                yield RawRecord(index, line, None, "the file ends without the closing ]: it is cut off")
            return
        line = bisect_right(starts_of_lines, at)
        if is_array and text[at] == "]":
            behind = _between(text, at + 1)
            if behind < len(text):
                line = bisect_right(starts_of_lines, behind)
                yield RawRecord(index, line, None, "there is more behind the list's closing ]")
            return
        try:
            value, end = _DECODER.raw_decode(text, at)
            # Half of a surrogate pair, which JSON can spell and UTF-8 cannot.
            json.dumps(value, ensure_ascii=False).encode()
            yield RawRecord(index, line, value)
        except json.JSONDecodeError as error:
            yield RawRecord(index, line, None, f"not valid JSON: {error.msg} (line {error.lineno})")
            found = _behind_broken(text, at, starts_of_lines[line - 1])
            if found is None:
                return
            end = found
        except UnicodeEncodeError:
            yield RawRecord(index, line, None, "a text holds half of a surrogate pair, which is not Unicode")
        except RecursionError:
            yield RawRecord(index, line, None, "it is nested too deeply")
            found = _balanced_end(text, at)
            if found is None:
                return
            end = found
        at = end
        index += 1


def _between(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    return at if match is None else match.end()


def _behind_broken(text: str, at: int, line_start: int) -> int | None:
    """Where to go on behind a record that is not valid JSON; None: nothing behind it can be told apart.

    Records that begin lines of their own begin them alike, and what is nested in them does not; this
    holds whatever is broken. Otherwise the brackets are counted.
    """
    indent = text[line_start:at]
    if indent.strip(" \t[,") == "":
        indent = indent.replace("[", "").replace(",", "")
        following = re.compile(rf"^{re.escape(indent)}(?=[{{\]])", re.MULTILINE).search(text, at + 1)
        return following.end() if following else None
    return _balanced_end(text, at)


def _balanced_end(text: str, at: int) -> int | None:
    """Behind the bracket that closes the one at `at`, texts left out of account."""
    depth = 0
    while at < len(text):
        if text[at] == '"':
            string = _STRING.match(text, at)
            if string is None:
                return None
            at = string.end()
            continue
        depth += (text[at] in "{[") - (text[at] in "}]")
        at += 1
        if depth == 0:
            return at
    return None
