"""The files of a persona job: one a user, the filled test file, and the summary.

They are made from the journal's records and the scenario alone, sorted by item and sample, so that the
same samples give the same bytes whatever happened on the way. Each is written beside its place and then
moved there: a reader never sees half of one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from octavo.batch.persona.clean import clean
from octavo.batch.persona.data import Item, Scenario, Turn, User
from octavo.batch.persona.datasets import TEST_FILE
from octavo.batch.persona.job import Sample
from octavo.outputs import RequestOutput

SUMMARY_FILE, JOURNAL_FILE = "inference_summary.json", "samples.jsonl"
_RESERVED = {Path(name).stem for name in (TEST_FILE, SUMMARY_FILE)}
_SAFE_NAME = re.compile(r"[\w-][\w.-]{0,119}", re.ASCII)

Record = dict[str, Any]  # of the journal


def sample_record(
    sample: Sample,
    output: RequestOutput | None,
    error: str | None,
    *,
    num_dropped: int,
    run: int,
    elapsed: float,
) -> Record:
    """How one sample ended, as the journal keeps it."""
    answer = None if output is None else output.outputs[0]
    return {
        "key": sample.key,
        "user_hash": sample.user.user_hash,
        "item_idx": sample.item.index,
        "sample_idx": sample.index,
        "seed": sample.seed,
        "generated_text": None if answer is None else answer.text,
        "finish_reason": "error" if answer is None else answer.finish_reason,
        "error": error,
        "prompt_tokens": 0 if output is None else len(output.prompt_token_ids),
        "generated_tokens": 0 if answer is None else len(answer.token_ids),
        "dropped_turns": num_dropped,
        "run": run,
        "elapsed": round(elapsed, 3),
    }


def is_failed(record: Record) -> bool:
    """True for a sample without a text."""
    return record.get("error") is not None


class Results:
    """The samples that are there, by user and item. Holds them in memory."""

    def __init__(self, scenario: Scenario, *, with_history: bool, cleans: bool) -> None:
        self._scenario = scenario
        self._with_history = with_history
        self._cleans = cleans
        self._by_user: dict[str, dict[tuple[int, int], Record]] = {}

    def add(self, record: Record) -> None:
        """One record of the journal; a later one of the same sample replaces it."""
        place = (record["item_idx"], record["sample_idx"])
        self._by_user.setdefault(record["user_hash"], {})[place] = record

    def count_of(self, user_hash: str) -> int:
        """Samples of a user that have ended."""
        return len(self._by_user.get(user_hash, ()))

    def records(self) -> Iterable[Record]:
        """All of them, in no particular order."""
        for records in self._by_user.values():
            yield from records.values()

    def write_user(self, folder: Path, user: User) -> None:
        """`<user_hash>.json`."""
        write_json(folder / user_file_name(user.user_hash), self._user_file(user))

    def write_test_file(self, folder: Path) -> None:
        """The input with `continuations`: one text a sample, in their order, null for a failed one."""
        filled = copy.deepcopy(self._scenario.records)
        for user in self._scenario.users:
            records = self._by_user.get(user.user_hash, {})
            texts: dict[int, list[str | None]] = {}
            items = {item.index: item for item in user.items}
            for (item_index, _), record in sorted(records.items()):
                text = record["generated_text"]
                if self._cleans and text is not None:
                    text = _cleaned(text, items[item_index])
                texts.setdefault(item_index, []).append(text)
            for item in user.items:
                record_at, collection, entry = item.place
                data = filled[record_at]["task"]["task_behavior_collections"][collection]["data"]
                data[entry]["continuations"] = texts.get(item.index, [])
        write_json(folder / TEST_FILE, filled)

    def _user_file(self, user: User) -> dict[str, Any]:
        records = self._by_user.get(user.user_hash, {})
        items = {item.index: item for item in user.items}
        samples = []
        for (item_index, sample_index), record in sorted(records.items()):
            sample = {
                "item_idx": item_index,
                "sample_idx": sample_index,
                "seed": record["seed"],
                "generated_text": record["generated_text"],
                "finish_reason": record["finish_reason"],
            }
            if self._cleans:
                text = record["generated_text"]
                sample["cleaned_text"] = None if text is None else _cleaned(text, items[item_index])
            if is_failed(record):
                sample["error"] = record["error"]
            samples.append(sample)
        return {
            "user_hash": user.user_hash,
            "user_profile": user.person.profile,
            "context": [_turns(item.turns) for item in user.items],
            "history": [_history(item) for item in user.history] if self._with_history else [],
            "generated_samples": samples,
        }


def _cleaned(text: str, item: Item) -> str:
    return clean(text, item.person.name, {turn.source for turn in item.turns})


def _turns(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    return [
        {"source": turn.source, "content": turn.content}
        | ({"timestamp": turn.timestamp} if turn.timestamp else {})
        for turn in turns
    ]


def _history(item: Item) -> dict[str, Any]:
    return {"context": _turns(item.turns), "continuation": item.continuation}


def user_file_name(user_hash: str) -> str:
    """The hash itself where it can be a file's name, otherwise what is left of it and a hash of it."""
    if _SAFE_NAME.fullmatch(user_hash) and user_hash not in _RESERVED:
        return f"{user_hash}.json"
    kept = re.sub(r"[^\w-]+", "_", user_hash, flags=re.ASCII)[:40]
    return f"{kept}-{hashlib.sha256(user_hash.encode()).hexdigest()[:12]}.json"


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")
    os.replace(beside, path)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary that lies in a folder; None if there is none that can be read."""
    try:
        found = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
