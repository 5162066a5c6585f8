"""Whatever stands in a batch file, each line that is not empty is a request or says what is wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from octavo.batch.openai import lines
from octavo.batch.openai.lines import BadLine, RequestLine, read_facts, read_lines
from octavo.errors import ConfigError

NAMES = ("m", "other")


def request(custom_id: str = "a", **changes: Any) -> dict[str, Any]:
    found = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": "x"},
    }
    return {**found, **changes}


def read(tmp_path: Path, *raw: bytes | dict[str, Any]) -> list[RequestLine | BadLine]:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in raw))
    found = list(read_lines(path, NAMES))
    assert read_facts(path).num_lines == len(found)
    assert read_facts(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_requests_come_in_order_with_their_line(tmp_path: Path) -> None:
    chat = request("b", url="/v1/chat/completions", body={"messages": []})
    found = read(tmp_path, b"\xef\xbb\xbf" + json.dumps(request()).encode(), b"", b"  \r", chat, b"")
    assert found == [
        RequestLine(1, "a", "/v1/completions", {"model": "m", "prompt": "x"}),
        RequestLine(4, "b", "/v1/chat/completions", {"messages": []}),
    ]


@pytest.mark.parametrize(
    ("raw", "code", "says"),
    [
        (b"{'a': 1}", "invalid_json", "not JSON"),
        (b'{"custom_id":"a"', "invalid_json", "not JSON"),
        (b"\xff\xfe{}", "invalid_json", "not UTF-8"),
        (b"[" * 100_000, "invalid_json", "nested too deeply"),
        (b"[1]", "invalid_request", "an object is needed, not a list"),
        (b"null", "invalid_request", "not nothing"),
        (request(custom_id=""), "missing_custom_id", "custom_id"),
        ({"url": "/v1/completions"}, "missing_custom_id", "custom_id"),
        ({**request(), "custom_id": 7}, "missing_custom_id", "custom_id"),
        (request(method="GET"), "invalid_method", '"GET"'),
        (request(url="/v1/chat"), "invalid_url", "/v1/chat/completions or /v1/completions"),
        (request(url=["x"]), "invalid_url", '["x"]'),
        (request(url="/v1/embeddings"), "not_in_this_version", "not in this version"),
        (request(body=None), "invalid_body", "body must be an object"),
        (request(body={"model": "gpt-4", "prompt": "x"}), "model_not_found", "there is: m, other"),
        (request(body={"model": ["m"]}), "model_not_found", "--served-model-name"),
        (request(body={"prompt": "x", "stream": True}), "stream_not_allowed", "cannot stream"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_the_rest_goes_on(
    tmp_path: Path, raw: bytes | dict[str, Any], code: str, says: str
) -> None:
    found = read(tmp_path, request("before"), raw, request("after"))
    bad = found[1]
    assert isinstance(bad, BadLine)
    assert (bad.number, bad.code) == (2, code)
    assert bad.message.startswith("line 2: ")
    assert says in bad.message
    assert [line.number for line in found] == [1, 2, 3]
    assert isinstance(found[2], RequestLine)


def test_a_duplicate_is_told_by_its_line_and_the_first_one_counts(tmp_path: Path) -> None:
    found = read(tmp_path, request("a"), request("b"), request("a"))
    assert isinstance(found[0], RequestLine)
    bad = found[2]
    assert isinstance(bad, BadLine)
    assert (bad.code, bad.custom_id, bad.key) == ("duplicate_custom_id", "a", "line:3")
    assert found[0].key == "id:a"


def test_a_line_too_long_to_be_held_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 200)
    found = read(tmp_path, request("a"), b"x" * 100_000, request("b"))
    assert [type(line) for line in found] == [RequestLine, BadLine, RequestLine]
    assert found[1].number == 2


def test_a_file_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_facts(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_facts(tmp_path)


def test_blanks_that_cross_a_chunk_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_CHUNK", 7)
    assert len(read(tmp_path, request("a"), b"", b" " * 20, request("b"), b"   ")) == 2
