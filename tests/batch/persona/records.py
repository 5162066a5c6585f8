"""Persona records for tests, built from as little as a test wants to say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.batch.persona.data import Scenario, read_scenario


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"source": source, "content": content} for source, content in pairs]


def entry(context: Sequence[dict[str, Any]] | None, continuation: str | None = None, **more: Any) -> Any:
    found: dict[str, Any] = {} if context is None else {"context": list(context)}
    if continuation is not None:
        found["continuation"] = continuation
    return {**found, **more}


def record(
    data: Sequence[Any],
    user_hash: str | None = "u1",
    profile: dict[str, Any] | None = None,
    structured: Any = None,
    unstructured: Any = None,
    description: str = "",
) -> dict[str, Any]:
    """One record with one collection."""
    personality = {"structured": structured, "unstructured": unstructured}
    found: dict[str, Any] = {} if user_hash is None else {"user_hash": user_hash}
    found["user"] = {"profile": {"name": "Anna"} if profile is None else profile, "personality": personality}
    collection = {"type": "dialogue", "type_desc": "", "data": list(data)}
    found["task"] = {"description": description, "task_behavior_collections": [collection]}
    return found


def write_scenario(folder: Path, test: Any, train: Any = None) -> Path:
    """Records, or a text that is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("test_leaderboard.json", test), ("train.json", train)):
        if records is not None:
            text = records if isinstance(records, str) else json.dumps(records, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def scenario(folder: Path, test: Any, train: Any = None) -> Scenario:
    """Written and read."""
    return read_scenario(write_scenario(folder, test, train))
