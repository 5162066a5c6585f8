"""Prompts: the bundled set, data sets' files, synthetic ones. What is dropped is counted; a seed decides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from octavo.bench.prompts import (
    BUNDLED_KINDS,
    PromptSource,
    bundled_prompts,
    copy_heavy_ids,
    load_prompts,
    parse_source,
)
from octavo.errors import ConfigError


class Characters:
    """A tokenizer with one token a character."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]


def lines(path: Path, *records: Any) -> str:
    text = "\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text(text + "\n", encoding="utf-8")
    return str(path)


def test_the_bundled_set_has_every_kind_in_both_languages() -> None:
    prompts = bundled_prompts()
    kinds = Counter((prompt.kind, prompt.language) for prompt in prompts)
    assert set(kinds) == {(kind, language) for kind in BUNDLED_KINDS for language in ("en", "zh")}
    assert all(sum(n for (k, _), n in kinds.items() if k == kind) >= 8 for kind in BUNDLED_KINDS)
    ids = [prompt.prompt_id for prompt in prompts]
    assert len(set(ids)) == len(ids)
    assert len(copy_heavy_ids()) >= 15
    assert copy_heavy_ids() < set(ids)
    for prompt in prompts:
        assert prompt.messages is not None
        assert prompt.messages[-1]["role"] == "user"
        assert prompt.prompt_id.startswith(f"{prompt.kind}-{prompt.language}-")


def test_a_seed_decides_which_prompts_come_and_in_what_order() -> None:
    def ids(seed: int, count: int | None) -> list[str]:
        return [p.prompt_id for p in load_prompts(PromptSource(), count=count, seed=seed)]

    assert ids(1, 12) == ids(1, 12)
    assert ids(1, 12) != ids(2, 12)
    assert ids(1, 30)[:12] == ids(1, 12)  # a longer list begins with the shorter one
    assert len({name.split("-")[0] for name in ids(1, 10)}) == len(BUNDLED_KINDS)  # kinds take turns
    assert sorted(ids(1, None)) == sorted(p.prompt_id for p in bundled_prompts())


def test_more_prompts_than_there_are_get_ids_of_their_own() -> None:
    found = load_prompts(parse_source("bundled:chat"), count=25, seed=0)
    assert len({prompt.prompt_id for prompt in found}) == 25
    first, again = found[0], found[len(load_prompts(parse_source("bundled:chat"), count=None, seed=0))]
    assert again.prompt_id == f"{first.prompt_id}#2"
    assert again.messages == first.messages


def test_sharegpt_takes_what_comes_before_the_first_answer(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("human", "One?"), ("gpt", "1"), ("human", "Two?"), ("gpt", "2")]
    conversation = {"id": "a", "conversations": [{"from": who, "value": text} for who, text in turns]}
    starts_late = {"conversations": [{"from": "gpt", "value": "so"}, {"from": "human", "value": "Go on"}]}
    path = tmp_path / "share.json"
    path.write_text(json.dumps([conversation, starts_late]), encoding="utf-8")
    found = {p.prompt_id: p for p in load_prompts(parse_source(str(path)), count=None, seed=0)}
    assert found["a"].messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
    )
    assert found["share-2"].messages == ({"role": "user", "content": "Go on"},)
    assert found["a"].kind == "sharegpt"


def test_plain_lines_of_every_shape(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl",
        {
            "id": "chat",
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}],
        },
        {"id": "raw", "prompt": "Once upon", "max_tokens": 7},
        {"id": "text", "text": "a text"},
        {"id": "ids", "prompt_token_ids": [5, 6, 7]},
        '"a bare string"',
    )
    found = {p.prompt_id: p for p in load_prompts(parse_source(path), count=None, seed=0)}
    assert found["chat"].messages == ({"role": "user", "content": "Hi"},)
    assert (found["raw"].text, found["raw"].max_tokens) == ("Once upon", 7)
    assert found["text"].text == "a text"
    assert found["ids"].token_ids == (5, 6, 7)
    assert found["p-5"].text == "a bare string"


def test_malformed_lines_are_counted_and_described(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    bad = [
        b'{"prompt": ',
        b'{"prompt": 7}',
        b'{"nothing": "here"}',
        b"[1, 2]",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"messages": [{"role": "martian", "content": "x"}]}',
        b'{"prompt": "x", "max_tokens": 0}',
        b'{"prompt_token_ids": ["a"]}',
    ]
    empty = [b'{"prompt": "  "}', b'{"conversations": [{"from": "gpt", "value": "alone"}]}', b"", b"   "]
    path.write_bytes(b"\n".join([*bad, *empty, b'\xef\xbb\xbf{"prompt": "bom in the middle"}',
                                 b'{"prompt": "good"}']))  # fmt: skip
    found = load_prompts(parse_source(str(path)), count=None, seed=0)
    assert [prompt.text for prompt in found] == ["good"]
    assert found.counts["malformed"] == len(bad) + 1
    assert found.counts["empty"] == 2  # a blank line is no record
    assert found.counts["read"] == len(bad) + 1 + 2 + 1
    assert any("line 1: not JSON" in problem for problem in found.problems)
    assert any("not UTF-8" in problem for problem in found.problems)
    warning = " ".join(found.warnings)
    assert f"{len(bad) + 1} of {found.counts['read']} lines" in warning
    assert "2 records" in warning
    assert found.record()["counts"]["used"] == 1


def test_length_limits_drop_and_count(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", *({"prompt": "x" * n} for n in (1, 3, 5, 8, 9)))
    source = PromptSource("jsonl", path, min_length=3, max_length=8)
    by_tokens = load_prompts(source, count=None, seed=0, tokenizer=Characters())
    assert sorted(len(prompt.content) for prompt in by_tokens) == [3, 5, 8]
    assert (by_tokens.counts["too_short"], by_tokens.counts["too_long"]) == (1, 1)
    assert by_tokens.length_unit == "tokens"
    assert load_prompts(source, count=None, seed=0).length_unit == "characters"
    assert "1 short and 1 long" in by_tokens.warnings[0]


def test_max_lines_bounds_what_is_read_over_all_files(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", *({"prompt": f"a{n}"} for n in range(4)))
    lines(tmp_path / "b.jsonl", *({"prompt": f"b{n}"} for n in range(4)))
    found = load_prompts(PromptSource("sharegpt", str(tmp_path), max_lines=6), count=None, seed=0)
    assert sorted(prompt.text or "" for prompt in found) == ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert found.counts["read"] == 6


def test_ids_that_repeat_in_a_file_are_told_apart(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"id": "x", "prompt": "one"}, {"id": "x", "prompt": "two"})
    found = load_prompts(parse_source(path), count=None, seed=0)
    assert sorted(prompt.prompt_id for prompt in found) == ["x", "x@p-2"]


def test_synthetic_lengths_and_shared_prefixes() -> None:
    plain = load_prompts(parse_source("synthetic:50-60"), count=9, seed=3, tokenizer=Characters())
    sizes = [len(prompt.token_ids or ()) for prompt in plain]
    assert all(50 <= size <= 60 for size in sizes)
    assert len(set(sizes)) > 2
    again = load_prompts(parse_source("synthetic:50-60"), count=9, seed=3, tokenizer=Characters())
    assert plain.digest == again.digest
    other = load_prompts(parse_source("synthetic:50-60"), count=9, seed=4, tokenizer=Characters())
    assert plain.digest != other.digest
    shared = load_prompts(parse_source("shared_prefix:40+10*2"), count=6, seed=3, tokenizer=Characters())
    prefixes = [(prompt.token_ids or ())[:40] for prompt in shared]
    assert prefixes[0] == prefixes[2] == prefixes[4] != prefixes[1] == prefixes[3]
    assert len({prompt.token_ids for prompt in shared}) == 6
    assert all(len(prompt.token_ids or ()) == 50 for prompt in shared)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bundld", "Did you mean bundled"),
        ("bundled:chat,sumary", "did you mean summary"),
        ("no/such/file.jsonl", "there is no file no/such/file.jsonl"),
        ("synthetic:many", "write synthetic:512"),
        ("synthetic:9-3", "goes upwards"),
        ("synthetic:0", "start at 1"),
        ("shared_prefix:5", ""),
        ("", "no prompts"),
    ],
)
def test_what_is_no_source_is_refused_with_the_nearest_one(text: str, message: str) -> None:
    if message:
        with pytest.raises(ConfigError, match=message):
            parse_source(text)
    else:
        assert parse_source(text).input_length == 5  # the prefix's length may be left out


def test_files_that_cannot_be_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.bin").write_bytes(b"1")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "object.json").write_text("{}", encoding="utf-8")
    nothing = lines(tmp_path / "nothing.jsonl", "not json")
    for source, message in (
        (str(tmp_path / "empty"), "holds no .json"),
        (str(tmp_path / "x.bin"), "must end in"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_source(source)
    for name, message in (("broken.json", "not JSON"), ("object.json", "list of records")):
        with pytest.raises(ConfigError, match=message):
            load_prompts(parse_source(str(tmp_path / name)), count=None, seed=0)
    with pytest.raises(ConfigError, match=r"no prompts are left.*1 malformed.*line 1: not JSON"):
        load_prompts(parse_source(nothing), count=None, seed=0)
    with pytest.raises(ConfigError, match="tokenizer is needed"):
        load_prompts(parse_source("synthetic:5"), count=1, seed=0)
    with pytest.raises(ConfigError, match="change PROMPT_MIN_LENGTH"):
        PromptSource(min_length=9, max_length=3).check()
