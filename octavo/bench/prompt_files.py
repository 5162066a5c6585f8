"""Prompts out of other people's files: ShareGPT (json or jsonl), plain jsonl, or one text a line.

Such files are large and dirty: a broken line is counted and described, never fatal, and never silently
gone. The shape is recognised record by record:

    {"conversations": [{"from": "human", "value": "…"}, …]}   ShareGPT: what comes before the first answer
    {"messages": [{"role": "user", "content": "…"}, …]}       chat; a last answer of the assistant is cut off
    {"prompt": "…"} or {"text": "…"}                          raw text, sent without a chat template
    {"prompt_token_ids": [1, 2, …]}                           token ids

Optional keys: id, kind, language, max_tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.bench.prompts import Prompt
from octavo.errors import ConfigError

SUFFIXES = (".json", ".jsonl", ".txt")
_SHOWN = 5  # malformed lines described
_ROLES = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant",
}  # fmt: skip


class _Malformed(ValueError):
    """A record that is not what it should be; the message says why."""


def files_of(path: str | None) -> list[Path]:
    """The files meant by a file or folder name. Raises ConfigError if there are none."""
    if not path:
        raise ConfigError("no file with prompts was named (PROMPTS, SHAREGPT_DIR or --prompts)")
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(p for p in place.iterdir() if p.suffix in (".json", ".jsonl") and p.is_file())
        if not found:
            raise ConfigError(f"the folder {place} holds no .json or .jsonl file")
        return found
    if not place.exists():
        raise ConfigError(f"there is no file {place} to take prompts from")
    if place.suffix not in SUFFIXES:
        raise ConfigError(f"{place} is not a file of prompts: it must end in {', '.join(SUFFIXES)}")
    return [place]


def read_files(path: str | None, max_lines: int | None) -> tuple[list[Prompt], Counter[str], tuple[str, ...]]:
    """All prompts of a file or folder, at most `max_lines` records read.

    Returns them, how many records were read, malformed or empty, and what was wrong with the first
    malformed ones.
    """
    counts: Counter[str] = Counter(read=0, malformed=0, empty=0, too_short=0, too_long=0)
    prompts: list[Prompt] = []
    problems: list[str] = []
    files = files_of(path)
    seen: Counter[str] = Counter()
    for file in files:
        if max_lines is not None and counts["read"] >= max_lines:
            break
        for where, record in _records(file):
            if max_lines is not None and counts["read"] >= max_lines:
                break
            counts["read"] += 1
            try:
                if isinstance(record, _Malformed):
                    raise record
                prompt = _prompt(record, f"{file.stem}-{where}")
            except _Malformed as error:
                counts["malformed"] += 1
                if len(problems) < _SHOWN:
                    unit = "record" if file.suffix == ".json" else "line"
                    problems.append(f"{file.name} {unit} {where}: {error}")
                continue
            if prompt is None:
                counts["empty"] += 1
                continue
            seen[prompt.prompt_id] += 1
            if seen[prompt.prompt_id] > 1:  # an id of the file that is not unique names nothing
                prompt = replace(prompt, prompt_id=f"{prompt.prompt_id}@{file.stem}-{where}")
            prompts.append(prompt)
    return prompts, counts, tuple(problems)


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, record or _Malformed) of each record; a .json file is one list of them."""
    if file.suffix == ".json":
        try:
            whole = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{file} is not JSON: {error}. A file with one object a line is called .jsonl"
            ) from None
        if not isinstance(whole, list):
            raise ConfigError(f"{file} must hold a list of records, not a {type(whole).__name__}")
        yield from enumerate(whole, start=1)
        return
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not line.strip():
                continue
            yield number, _parsed(line, file.suffix)


def _parsed(line: bytes, suffix: str) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return _Malformed(f"not UTF-8 at byte {error.start}")
    if suffix == ".txt":
        return {"text": text.strip("\r\n")}
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _Malformed(f"not JSON: {error}")


def _prompt(record: Any, default_id: str) -> Prompt | None:
    """The prompt in a record, None if it holds nothing to answer. Raises _Malformed."""
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, Mapping):
        raise _Malformed(f"a {type(record).__name__} instead of an object")
    limit = record.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise _Malformed(f"max_tokens {limit!r} is no number of tokens")
    named = record.get("id", record.get("prompt_id"))
    name = str(named) if isinstance(named, (str, int)) and str(named).strip() else default_id
    common: dict[str, Any] = {
        "prompt_id": _text(name, "id"),
        "kind": _text(record.get("kind", ""), "kind"),
        "language": _text(record.get("language", ""), "language"),
        "max_tokens": limit,
    }
    turns = record.get("conversations", record.get("conversation"))
    if turns is not None:
        common["kind"] = common["kind"] or "sharegpt"
        return _chat(turns, ("from", "role"), ("value", "content"), common, first_only=True)
    if "messages" in record:
        return _chat(record["messages"], ("role", "from"), ("content", "value"), common, first_only=False)
    if "prompt_token_ids" in record:
        ids = record["prompt_token_ids"]
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise _Malformed("prompt_token_ids is no list of token ids")
        return Prompt(token_ids=tuple(ids), **common) if ids else None
    for key in ("prompt", "text"):
        if key in record:
            text = _text(record[key], key)
            return Prompt(text=text, **common) if text.strip() else None
    raise _Malformed("none of the keys conversations, messages, prompt, text, prompt_token_ids")


def _chat(
    turns: Any,
    role_keys: tuple[str, str],
    text_keys: tuple[str, str],
    common: dict[str, Any],
    *,
    first_only: bool,
) -> Prompt | None:
    """The messages up to the (first or last) answer."""
    if not isinstance(turns, list):
        raise _Malformed("the conversation is no list")
    messages: list[dict[str, str]] = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise _Malformed("a turn of the conversation is no object")
        said_by = next((turn[key] for key in role_keys if key in turn), None)
        role = _ROLES.get(said_by) if isinstance(said_by, str) else None
        if role is None:
            raise _Malformed(f"unknown speaker {said_by!r}")
        content = _text(next((turn[key] for key in text_keys if key in turn), None), "the text of a turn")
        if role == "assistant" and first_only:
            if any(message["role"] == "user" for message in messages):
                break
            continue  # a conversation that was cut out of a longer one begins with an answer
        messages.append({"role": role, "content": content})
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not any(message["content"].strip() for message in messages if message["role"] == "user"):
        return None
    return Prompt(messages=tuple(messages), **common)


def _text(value: Any, what: str) -> str:
    """A text that can be encoded: JSON lets through halves of surrogate pairs, which no tokenizer takes."""
    if not isinstance(value, str):
        raise _Malformed(f"{what} is a {type(value).__name__}, not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Malformed(f"{what} holds half of a surrogate pair") from None
    return value
