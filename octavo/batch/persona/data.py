"""What a scenario folder holds, checked once: people, what they did, and what is asked of a model.

A record of `test_leaderboard.json` or `train.json`:

    {"user_hash": "…",                                            may be missing
     "user": {"profile": {"name": "…", …},
              "personality": {"structured": {…}, "unstructured": "…"}},
     "task": {"description": "…",
              "task_behavior_collections": [
                {"type": "…", "type_desc": "…",
                 "data": [{"context": [{"source": "…", "content": "…", "timestamp": …}],
                           "continuation": "…", "continuation_prefix": "…", "timestamp": …}]}]}}

`structured` comes in three shapes, read by `traits_of`. What is malformed becomes a `Problem` with the
place it was found in, and the rest is used. A user's items are numbered from 0 in the order of the file,
malformed ones included, so that a number means the same whatever else is repaired.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.batch.persona.datasets import TEST_FILE, TRAIN_FILE
from octavo.batch.persona.json_records import RawRecord, read_records
from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a file that could not be used."""

    file: str
    line: int  # where its record begins, from 1
    record: int  # from 0
    where: str  # the field inside the record; empty: the record itself
    what: str

    def __str__(self) -> str:
        place = f", {self.where}" if self.where else ""
        return f"{self.file}, line {self.line} (record {self.record}{place}): {self.what}"


@dataclass(frozen=True, slots=True)
class Turn:
    """One contribution to a conversation; `source` is who made it, empty where nobody is named."""

    source: str
    content: str
    timestamp: str | None = None


@dataclass(frozen=True, slots=True)
class Trait:
    """One figure of a personality, such as Ocean / Extraversion / 90."""

    path: tuple[str, ...]  # group or groups, then the trait's own name
    value: str  # empty where there is only a description
    description: str = ""


@dataclass(frozen=True, slots=True)
class Person:
    """Who is to be imitated, as one record describes them."""

    user_hash: str
    profile: dict[str, Any]
    traits: tuple[Trait, ...] = ()
    unstructured: str = ""

    @property
    def name(self) -> str | None:
        """The source of this person's own turns; None where the profile has no name."""
        name = self.profile.get("name")
        return str(name).strip() or None if isinstance(name, (str, int)) else None


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that a person did, or that a model is asked to do in their place."""

    person: Person
    index: int  # among the user's items of this file
    turns: tuple[Turn, ...]
    continuation: str | None  # what the person did; never shown for an item that is asked for
    continuation_prefix: str
    timestamp: str | None
    description: str  # of the task, and of the kind of item
    place: tuple[int, int, int]  # record, collection, entry of its data


@dataclass(slots=True)
class User:
    """Everything about one user_hash."""

    person: Person  # of the first record
    items: list[Item] = field(default_factory=list)
    history: list[Item] = field(default_factory=list)  # newest last

    @property
    def user_hash(self) -> str:
        """What tells this user from all others."""
        return self.person.user_hash


@dataclass(slots=True)
class Scenario:
    """A folder, read."""

    folder: Path
    users: list[User]
    records: list[Any]  # of the test file as they are; what is not valid JSON is left out
    problems: list[Problem]
    num_malformed_items: int  # of the test file: asked for, and not usable
    digest: str  # of the files' contents

    @property
    def num_items(self) -> int:
        """Usable items of the test file."""
        return sum(len(user.items) for user in self.users)


class _Malformed(ValueError):
    """`where` in a record, and what is wrong there."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(what)
        self.where, self.what = where, what


def read_scenario(folder: Path) -> Scenario:
    """Read a scenario folder. Raises ConfigError if it has no test file or nothing in it can be used."""
    test_path, train_path = folder / TEST_FILE, folder / TRAIN_FILE
    if not test_path.is_file():
        raise ConfigError(f"{test_path} does not exist; a scenario folder needs it")
    problems: list[Problem] = []
    raw = read_records(test_path)
    users: dict[str, User] = {}
    num_malformed = 0
    kept = [record for record in raw if record.error is None]
    position = {record.index: number for number, record in enumerate(kept)}
    counters: dict[str, int] = {}
    for record in raw:
        before = len(problems)
        for item in _items(record, TEST_FILE, counters, problems, position.get(record.index, -1)):
            user = users.setdefault(item.person.user_hash, User(item.person))
            user.items.append(item)
        num_malformed += len(problems) - before
    if not users:
        shown = "".join(f"\n  {problem}" for problem in problems[:5])
        raise ConfigError(f"{test_path} has no item that can be used{':' if shown else '.'}{shown}")
    digest = hashlib.sha256(test_path.read_bytes())
    if train_path.is_file():
        digest.update(b"\x00" + train_path.read_bytes())
        _add_history(users, train_path, problems)
    return Scenario(
        folder, list(users.values()), [record.value for record in kept], problems, num_malformed,
        digest.hexdigest(),
    )  # fmt: skip


def _add_history(users: dict[str, User], path: Path, problems: list[Problem]) -> None:
    counters: dict[str, int] = {}
    for record in read_records(path):
        for item in _items(record, TRAIN_FILE, counters, problems, record.index):
            if not item.turns and not item.continuation:
                where = _place_name(item.place)
                problems.append(
                    Problem(TRAIN_FILE, record.line, record.index, where, "neither context nor continuation")
                )
            elif item.person.user_hash in users:
                users[item.person.user_hash].history.append(item)
    for user in users.values():
        user.history = _newest_last(user.history)


def _newest_last(items: list[Item]) -> list[Item]:
    """By time where every item has one that can be read; else in the file's order, which is then taken
    for the order in which things happened."""
    times = [_time(item) for item in items]
    if any(time is None for time in times):
        return items
    order = sorted(range(len(items)), key=lambda at: (times[at], at))
    return [items[at] for at in order]


def _time(item: Item) -> float | None:
    """Seconds of the item's own timestamp, or of its last turn's."""
    last = item.turns[-1].timestamp if item.turns else None
    text = item.timestamp or last
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp()


# ---------------------------------------------------------------------- one record


def _items(
    record: RawRecord, file: str, counters: dict[str, int], problems: list[Problem], position: int
) -> Iterator[Item]:
    """The usable items of a record; what is not usable is added to `problems`."""

    def report(where: str, what: str) -> None:
        problems.append(Problem(file, record.line, record.index, where, what))

    if record.error is not None:
        report("", record.error)
        return
    try:
        fields = _object(record.value, "")
        person = _person(fields)
        task = _object(fields.get("task"), "task")
        collections = _list(task.get("task_behavior_collections"), "task.task_behavior_collections")
        description = _text(task.get("description"), "task.description")
    except _Malformed as error:
        report(error.where, error.what)
        return
    for number, collection in enumerate(collections):
        where = f"task.task_behavior_collections[{number}]"
        try:
            entries = _list(_object(collection, where).get("data"), f"{where}.data")
            kind = _text(collection.get("type_desc"), f"{where}.type_desc")
        except _Malformed as error:
            report(error.where, error.what)
            continue
        for entry_number, entry in enumerate(entries):
            index = counters[person.user_hash] = counters.get(person.user_hash, -1) + 1
            place = (position, number, entry_number)
            about = "\n".join(dict.fromkeys(part for part in (description, kind) if part))
            try:
                yield _item(entry, person, index, about, place)
            except _Malformed as error:
                report(error.where, error.what)


def _place_name(place: tuple[int, int, int]) -> str:
    return f"task.task_behavior_collections[{place[1]}].data[{place[2]}]"


def _item(value: Any, person: Person, index: int, about: str, place: tuple[int, int, int]) -> Item:
    where = _place_name(place)
    entry = _object(value, where)
    context = entry.get("context")
    turns = [] if context is None else _list(context, f"{where}.context")
    return Item(
        person,
        index,
        tuple(_turn(turn, f"{where}.context[{number}]") for number, turn in enumerate(turns)),
        _text(entry.get("continuation"), f"{where}.continuation") or None,
        _text(entry.get("continuation_prefix"), f"{where}.continuation_prefix", strip=False),
        _timestamp(entry, where),
        about,
        place,
    )


def _turn(value: Any, where: str) -> Turn:
    turn = _object(value, where)
    content = _text(turn.get("content"), f"{where}.content")
    if not content:
        raise _Malformed(f"{where}.content", "is missing or empty")
    return Turn(_text(turn.get("source"), f"{where}.source"), content, _timestamp(turn, where))


def _timestamp(holder: dict[str, Any], where: str) -> str | None:
    return _text(holder.get("timestamp"), f"{where}.timestamp") or None


def _person(fields: dict[str, Any]) -> Person:
    user = _object(fields.get("user"), "user")
    profile = _object(user.get("profile"), "user.profile")
    personality = user.get("personality")
    traits: tuple[Trait, ...] = ()
    unstructured = ""
    if personality is not None:
        personality = _object(personality, "user.personality")
        where = "user.personality"
        if personality.get("structured") is not None:
            traits = traits_of(_object(personality["structured"], f"{where}.structured"))
        told = personality.get("unstructured")
        parts = told if isinstance(told, list) else [told]
        unstructured = "\n".join(filter(None, (_text(part, f"{where}.unstructured") for part in parts)))
    return Person(_user_hash(fields, profile), profile, traits, unstructured)


def _user_hash(fields: dict[str, Any], profile: dict[str, Any]) -> str:
    given = fields.get("user_hash")
    if given is None or given == "":
        if not profile:
            raise _Malformed("user_hash", "is missing, and there is no profile to make one of")
        return profile_hash(profile)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise _Malformed("user_hash", f"must be a text, not {_kind(given)}")
    return str(given)


def profile_hash(profile: dict[str, Any]) -> str:
    """What stands for the user_hash where a record has none: the same for the same profile, anywhere."""
    text = json.dumps(profile, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def traits_of(structured: dict[str, Any]) -> tuple[Trait, ...]:
    """The figures of a personality, whichever of the three shapes they come in.

    flat        {"Ocean.Extraversion": 90}
    nested      {"Ocean": {"dimensions": {"Extraversion": {"score": 90, "description": "…"}}}}, or
                {"dimensions": …} without a group
    grouped     {"big_five": {"Openness": 3.67}}
    """
    return tuple(_traits(structured, (), "user.personality.structured"))


def _traits(value: Any, path: tuple[str, ...], where: str) -> Iterator[Trait]:
    if value is None:
        return
    if not isinstance(value, dict):
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise _Malformed(where, f"must be a number or a text, not {_kind(value)}")
        yield Trait(path, str(value))
        return
    if path and ("score" in value or "description" in value):
        score = value.get("score")
        if isinstance(score, (dict, list, bool)):
            raise _Malformed(f"{where}.score", f"must be a number or a text, not {_kind(score)}")
        text = _text(value.get("description"), f"{where}.description")
        yield Trait(path, "" if score is None else str(score), text)
        value = {key: part for key, part in value.items() if key == "dimensions"}
    for key, part in value.items():
        if key == "dimensions":
            yield from _traits(_object(part, f"{where}.dimensions"), path, f"{where}.dimensions")
        elif isinstance(part, dict):
            yield from _traits(part, (*path, key), f"{where}.{key}")
        else:
            yield from _traits(part, (*path, *key.split(".")), f"{where}.{key}")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Malformed(where, "is missing" if value is None else f"must be an object, not {_kind(value)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Malformed(where, "is missing" if value is None else f"must be a list, not {_kind(value)}")
    return value


def _text(value: Any, where: str, strip: bool = True) -> str:
    """A text, or a number as one; "" for null."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _Malformed(where, f"must be a text, not {_kind(value)}")
    return str(value).strip() if strip else str(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number" if value is not None else "null")
