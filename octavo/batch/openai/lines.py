"""Reading an OpenAI batch file line by line, whatever stands in it.

A line is a request (`{"custom_id", "method", "url", "body"}`) or a `BadLine` that says what is wrong with
it, and the rest of the file goes on. The file may be of any length; only one line is held.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from octavo.batch.keys import KeySet
from octavo.errors import ConfigError

MAX_LINE_BYTES = 16 << 20
URLS = ("/v1/chat/completions", "/v1/completions")
_NOT_YET = ("/v1/embeddings", "/v1/responses", "/v1/moderations")
_CHUNK = 1 << 16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One request of the file."""

    number: int  # of its line, from 1
    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def key(self) -> str:
        """What it is known by in the journal."""
        return f"id:{self.custom_id}"


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request. `code` is for programs, `message` for people."""

    number: int
    custom_id: str | None
    code: str
    message: str

    @property
    def key(self) -> str:
        """What it is known by in the journal: its custom_id may be missing, or another line's."""
        return f"line:{self.number}"


@dataclass(frozen=True)
class FileFacts:
    """A file as a whole."""

    num_lines: int  # that are not empty
    sha256: str


def check_readable(path: Path) -> None:
    """Raise ConfigError for a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from None


def read_facts(path: Path) -> FileFacts:
    """Count and hash a file, in pieces. Raises ConfigError if it cannot be read."""
    check_readable(path)
    found = hashlib.sha256()
    num_lines = 0
    has_text = False
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            *whole, rest = chunk.split(b"\n")
            for piece in whole:
                num_lines += has_text or not _is_blank(piece)
                has_text = False
            has_text = has_text or not _is_blank(rest)
    return FileFacts(num_lines + has_text, found.hexdigest())


def read_lines(path: Path, model_names: tuple[str, ...]) -> Iterator[RequestLine | BadLine]:
    """Every line that is not empty. `model_names` are the names that requests may use."""
    seen = KeySet()
    with open(path, "rb") as file:
        for number, raw in _raw_lines(file):
            yield _read_line(number, raw, model_names, seen)


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number, line); None for a line that is too long to be held."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(_BOM)
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif not _is_blank(raw):
            yield number, raw


def _is_blank(raw: bytes) -> bool:
    return not raw.removeprefix(_BOM).strip()


def _read_line(
    number: int, raw: bytes | None, model_names: tuple[str, ...], seen: KeySet
) -> RequestLine | BadLine:
    def bad(code: str, message: str, custom_id: str | None = None) -> BadLine:
        return BadLine(number, custom_id, code, f"line {number}: {message}")

    if raw is None:
        return bad("line_too_long", f"longer than {MAX_LINE_BYTES >> 20} MB")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return bad("invalid_json", f"not JSON: {_reason(error)}")
    if not isinstance(found, dict):
        return bad("invalid_request", f"an object is needed, not {_kind(found)}")
    custom_id = found.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return bad("missing_custom_id", "custom_id must be a text that is not empty")
    if not seen.add(custom_id):
        return bad(
            "duplicate_custom_id", f"custom_id {_shown(custom_id)} was used by an earlier line", custom_id
        )
    method = found.get("method", "POST")
    if method != "POST":
        return bad("invalid_method", f"method must be POST, not {_shown(method)}", custom_id)
    url = found.get("url")
    if url in _NOT_YET:
        return bad("not_in_this_version", f"{url} is not in this version", custom_id)
    if url not in URLS:
        return bad("invalid_url", f"url must be {' or '.join(URLS)}, not {_shown(url)}", custom_id)
    body = found.get("body")
    if not isinstance(body, dict):
        return bad("invalid_body", f"body must be an object, not {_kind(body)}", custom_id)
    model = body.get("model")
    if model is not None and model not in model_names:
        return bad(
            "model_not_found",
            f"the model {_shown(model)} is not served by this job; there is: {', '.join(model_names)} "
            "(--served-model-name gives it other names)",
            custom_id,
        )
    if body.get("stream"):
        return bad("stream_not_allowed", "a batch cannot stream; leave stream out", custom_id)
    return RequestLine(number, custom_id, str(url), body)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return "nothing" if value is None else names.get(type(value), "a number")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 100 else text[:99] + "…"
