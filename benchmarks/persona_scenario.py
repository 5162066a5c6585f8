"""A persona scenario as large as one likes, made from the example in examples/persona/Chameleons.

Each user is one of the example's people under another name and with a few facts of their own, so that no
two users' prompts begin alike; their items and their history are the example's scenes, dealt out by a
fixed seed. Eight items a user. The same number of items always gives the same bytes.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

ITEMS_OF_A_USER = 8
HISTORY_OF_A_USER = 5
NAMES = (
    "Ada", "Bela", "Ciro", "Dunja", "Edda", "Faro", "Gita", "Hale", "Ines", "Jory", "Kaya", "Lior", "Mina",
    "Nilo", "Orla", "Pavel", "Quin", "Rhea", "Sami", "Tove", "Una", "Vito", "Wren", "Xenia", "Yago", "Zora",
)  # fmt: skip
TOWNS = ("Lindau", "Ostend", "Split", "Porto", "Galway", "Bergen", "Visby", "Trieste", "Cadiz", "Gdansk")


def make_scenario(folder: Path, num_items: int, example: Path) -> None:
    """Write test_leaderboard.json and train.json with `num_items` items into `folder`."""
    source = random.Random(2026)
    people = _read(example / "test_leaderboard.json")
    scenes = [(name, entry) for name, entry in _scenes(people) if entry["context"]]
    earlier = list(_scenes(_read(example / "train.json")))
    test, train = [], []
    for number in range((num_items + ITEMS_OF_A_USER - 1) // ITEMS_OF_A_USER):
        count = min(ITEMS_OF_A_USER, num_items - number * ITEMS_OF_A_USER)
        record = copy.deepcopy(people[number % len(people)])
        record["user_hash"] = f"user-{number:04}"
        profile = record["user"]["profile"]
        profile["name"] = f"{NAMES[number % len(NAMES)]} {number // len(NAMES) + 1}"
        profile["age"] = source.randrange(18, 80)
        profile["town"] = source.choice(TOWNS)
        name = profile["name"]
        deal = [source.choice(scenes) for _ in range(count)]
        test.append(_with_data(record, [_renamed(entry, old, name, source) for old, entry in deal]))
        past = source.sample(earlier, HISTORY_OF_A_USER)
        train.append(_with_data(record, [_renamed(entry, old, name, source) for old, entry in past]))
    folder.mkdir(parents=True, exist_ok=True)
    for file, records in (("test_leaderboard.json", test), ("train.json", train)):
        (folder / file).write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")


def _read(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return records


def _scenes(records: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(whose it is, the item) of everything in some records."""
    return [
        (record["user"]["profile"]["name"], entry)
        for record in records
        for collection in record["task"]["task_behavior_collections"]
        for entry in collection["data"]
    ]


def _with_data(record: dict[str, Any], data: list[dict[str, Any]]) -> dict[str, Any]:
    filled = copy.deepcopy(record)
    filled["task"]["task_behavior_collections"][0]["data"] = data
    return filled


def _renamed(entry: dict[str, Any], old: str, new: str, source: random.Random) -> dict[str, Any]:
    """A scene with another speaker, and a line in front of it that makes it one of its own."""
    turns = [
        {**turn, "source": new if turn["source"] == old else turn["source"]} for turn in entry["context"]
    ]
    where = f"Scene {source.randrange(1000)}, {source.choice(TOWNS)}, {source.randrange(1, 24)} o'clock."
    return {**entry, "context": [{"source": "Script", "content": where}, *turns]}
