"""Results as entries that can be laid side by side, whatever kind of job made them.

Two kinds are known: an OpenAI batch file of answers, and the output folder of a persona job. An entry is
one request of the first or one sample of the second. What differs between two runs of the same job by its
nature is left out: ids, the time of creation, and counts of what a run found in its cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from octavo.batch.journal import read_job
from octavo.batch.keys import digest_of
from octavo.batch.persona.datasets import TEST_FILE
from octavo.batch.persona.results import SUMMARY_FILE, read_summary
from octavo.batch.persona.summary import TIMING_KEYS
from octavo.errors import ConfigError

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """One generated text. `part` says which of an entry's it is; "" where there is one."""

    part: str
    text: str
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One request or sample. `rest` is all that is compared beside texts, seed and error."""

    name: str  # for people
    seed: int | None
    error: str | None
    texts: tuple[Text, ...] = ()
    rest: Mapping[str, Any] = field(default_factory=dict)


class ResultSet(Protocol):
    """One side of a comparison."""

    path: Path

    @property
    def settings(self) -> Settings:
        """What is known of how it was made."""
        ...

    def names(self) -> Iterator[str]:
        """Names of all entries; equal names belong together."""
        ...

    def get(self, key: str) -> Entry | None:
        """The entry of that name."""
        ...


def open_results(path: Path) -> ResultSet:
    """A file of answers or a folder of samples. Raises ConfigError for neither."""
    if path.is_dir():
        return PersonaFolder(path)
    if path.is_file():
        return AnswerFile(path)
    raise ConfigError(f"{path}: there is no such file or folder")


# ---------------------------------------------------------------------- OpenAI batch files


class AnswerFile:
    """Answers in JSON lines, found by custom_id. Holds a place for each line and no line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}
        place = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    digest = digest_of(_key_of(_record(line, path, number)))
                    if digest in self._places:
                        raise ConfigError(
                            f"line {number} of {path} answers what an earlier line has answered"
                        )
                    self._places[digest] = place
                place += len(line)

    @property
    def settings(self) -> Settings:
        """The job beside the file, where there is one."""
        found = read_job(self.path)
        if found is None:
            return {}
        job = dict(found["job"])
        if found.get("runs"):
            job["version"] = found["runs"][-1].get("version")
        return job

    @property
    def input_file(self) -> Path | None:
        """The requests, as the last run knew them; None if that is not known, or they have changed."""
        found = read_job(self.path) or {}
        runs = found.get("runs") or [{}]
        named = runs[-1].get("input_file")
        return Path(named) if named and os.path.isfile(named) else None

    def names(self) -> Iterator[str]:
        """See ResultSet."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _key_of(_record(line, self.path, number))

    def get(self, key: str) -> Entry | None:
        """See ResultSet."""
        place = self._places.get(digest_of(key))
        if place is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(place)
            return _entry(json.loads(file.readline()))


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "custom_id" not in found:
        raise ConfigError(f"line {number} of {path} is no answer of an OpenAI batch file")
    return found


def _key_of(record: Mapping[str, Any]) -> str:
    error = record.get("error")
    if isinstance(error, Mapping) and "line" in error:
        return f"line {error['line']}"
    return f"custom_id {json.dumps(record['custom_id'], ensure_ascii=False)}"


def _entry(record: Mapping[str, Any]) -> Entry:
    name, seed = _key_of(record), record.get("seed")
    error = record.get("error")
    if error is not None:
        return Entry(name, seed, error.get("message") if isinstance(error, Mapping) else str(error))
    response = record.get("response") or {}
    body = response.get("body") or {}
    if response.get("status_code", 200) >= 400:
        found = body.get("error")
        message = found.get("message") if isinstance(found, Mapping) else json.dumps(found)
        return Entry(name, seed, f"{response['status_code']}: {message}")
    choices = body.get("choices") or []
    texts = []
    rest: dict[str, Any] = {"usage": _without_the_run(body.get("usage"))}
    for number, choice in enumerate(choices):
        message = choice.get("message")
        text = choice.get("text") if message is None else message.get("content")
        part = f"choice {number}" if len(choices) > 1 else ""
        texts.append(Text(part, text or "", choice.get("finish_reason")))
        rest[f"choices[{number}]"] = _without_ids(
            {k: v for k, v in choice.items() if k not in ("text", "finish_reason")}
        )
    return Entry(name, seed, None, tuple(texts), rest)


def _without_the_run(usage: Any) -> Any:
    if not isinstance(usage, Mapping):
        return usage
    return {
        name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens") if name in usage
    }


def _without_ids(value: Any) -> Any:
    """Calls of tools carry ids that are drawn."""
    if isinstance(value, Mapping):
        return {name: _without_ids(v) for name, v in value.items() if name != "id"}
    return [_without_ids(v) for v in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------- persona folders


class PersonaFolder:
    """The files of a persona job, one a user; the last file read is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, Path] = {}
        for file in sorted(path.glob("*.json")):
            if file.name not in (TEST_FILE, SUMMARY_FILE) and not file.name.endswith(".job.json"):
                self._files[file.name] = file
        if not self._files and not (path / SUMMARY_FILE).exists():
            raise ConfigError(f"{path} holds no results: there is no {SUMMARY_FILE} and no file of a user")
        self._last: tuple[str, dict[str, Entry]] = ("", {})

    @property
    def summary(self) -> dict[str, Any]:
        """`inference_summary.json`; empty where it is missing."""
        return read_summary(self.path) or {}

    @property
    def settings(self) -> Settings:
        """The summary without times and outcomes."""
        left_out = TIMING_KEYS | {"generated_tokens", "failed_samples", "warnings"}
        return {name: value for name, value in self.summary.items() if name not in left_out}

    def names(self) -> Iterator[str]:
        """See ResultSet."""
        for name in self._files:
            for key in self._entries(name):
                yield f"{name}\x00{key}"

    def get(self, key: str) -> Entry | None:
        """See ResultSet."""
        name, _, inner = key.partition("\x00")
        return self._entries(name).get(inner) if name in self._files else None

    def place(self, key: str) -> tuple[str, int]:
        """(user_hash, item_idx) of an entry."""
        name, _, inner = key.partition("\x00")
        user = json.loads(self._files[name].read_text(encoding="utf-8"))["user_hash"]
        return str(user), int(inner.partition("/")[0])

    def _entries(self, name: str) -> dict[str, Entry]:
        if self._last[0] != name:
            file = self._files[name]
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                entries = {
                    f"{sample['item_idx']}/{sample['sample_idx']}": _sample(found, sample)
                    for sample in found["generated_samples"]
                }
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{file} is not a file of a user's samples: {error!r}") from None
            self._last = (name, entries)
        return self._last[1]


def _sample(user: Mapping[str, Any], sample: Mapping[str, Any]) -> Entry:
    name = f"user {user['user_hash']}, item {sample['item_idx']}, sample {sample['sample_idx']}"
    error = sample.get("error")
    texts: tuple[Text, ...] = ()
    if error is None:
        texts = (Text("", sample["generated_text"] or "", sample.get("finish_reason")),)
    rest = {
        "user_profile": user.get("user_profile"),
        "context": (user.get("context") or [])[sample["item_idx"] : sample["item_idx"] + 1],
        "history": user.get("history"),
        "cleaned_text": sample.get("cleaned_text"),
    }
    return Entry(name, sample.get("seed"), error, texts, rest)
