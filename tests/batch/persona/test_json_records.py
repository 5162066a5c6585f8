"""Records of a file one by one: what is broken does not take the rest along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.batch.persona.json_records import RawRecord, read_records
from octavo.errors import ConfigError

RECORDS: list[Any] = [{"a": 1, "b": {"c": ["}", '"']}}, {"a": 2}, {"a": 3, "t": "行\n二"}]


def read(tmp_path: Path, text: str) -> list[RawRecord]:
    path = tmp_path / "records.json"
    path.write_bytes(text.encode("utf-8"))
    return read_records(path)


SPELLINGS = {
    "array in one line": json.dumps(RECORDS),
    "array, indented": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "array, a record a line": "[\n" + ",\n".join(json.dumps(each) for each in RECORDS) + "\n]\n",
    "json lines": "\n".join(json.dumps(each) for each in RECORDS) + "\n\n",
    "byte order mark": "﻿" + json.dumps(RECORDS),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_records(spelling: str, tmp_path: Path) -> None:
    found = read(tmp_path, SPELLINGS[spelling])
    assert [each.value for each in found] == RECORDS
    assert [each.index for each in found] == [0, 1, 2]
    assert all(each.error is None for each in found)


def test_lines_are_those_where_records_begin(tmp_path: Path) -> None:
    assert [each.line for each in read(tmp_path, json.dumps(RECORDS, indent=1))] == [2, 11, 14]
    assert [each.line for each in read(tmp_path, SPELLINGS["json lines"])] == [1, 2, 3]


BROKEN = {
    "unquoted key": '{a: "x", "b": {"c": 1}}',
    "open string": '{"a": "x, "b": 2}',
    "two commas": '{"a": 1,, "b": 2}',
    "cut off": '{"a": {"b": [1, 2',
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("frame", ["lines", "array", "indented"])
def test_a_broken_record_is_named_and_the_rest_is_read(broken: str, frame: str, tmp_path: Path) -> None:
    good = '{"a": 1}'
    if frame == "lines":
        text = f"{good}\n{BROKEN[broken]}\n{good}\n"
        line = 2
    else:
        indent = "    " if frame == "indented" else ""
        text = f"[\n{indent}{good},\n{indent}{BROKEN[broken]},\n{indent}{good}\n]\n"
        line = 3
    found = read(tmp_path, text)
    assert [each.value for each in found] == [{"a": 1}, None, {"a": 1}]
    assert found[1].line == line
    assert found[1].error is not None
    assert f"line {line}" in found[1].error or broken in ("cut off", "open string")


def test_in_one_line_the_brackets_are_counted(tmp_path: Path) -> None:
    found = read(tmp_path, '[{"a": 1}, {a: "}", "b": {"c": 1}}, {"a": 2}]')
    assert [each.value for each in found] == [{"a": 1}, None, {"a": 2}]


def test_the_last_record_broken_ends_the_array(tmp_path: Path) -> None:
    found = read(tmp_path, '[\n{"a": 1},\n{"a": nope}\n]\n')
    assert [each.value for each in found] == [{"a": 1}, None]


def test_a_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    whole = json.dumps([{"a": 1}, {"a": 2}])
    found = read(tmp_path, whole[:-1])
    assert [each.value for each in found] == [{"a": 1}, {"a": 2}, None]
    assert found[-1].error is not None
    assert "cut off" in found[-1].error


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    found = read(tmp_path, '{"a": "\\ud800"}\n{"a": "\\ud83d\\ude00"}\n')
    assert found[0].error is not None
    assert found[1].value == {"a": "😀"}


def test_nested_too_deeply(tmp_path: Path) -> None:
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    found = read(tmp_path, f'{deep}\n{{"a": 1}}\n')
    assert found[0].error is not None
    assert found[1].value == {"a": 1}


@pytest.mark.parametrize("content", ["", "  \n", "name,age\nAnna,3\n", '"a text"'])
def test_what_holds_no_records_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no records"):
        read(tmp_path, content)


def test_what_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_bytes('[{"a": "ä"}]'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_records(path)
