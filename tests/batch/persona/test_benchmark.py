"""The scenario that benchmarks/persona.py measures with."""

from __future__ import annotations

from pathlib import Path

from benchmarks.persona_scenario import make_scenario
from octavo.batch.persona.data import read_scenario
from octavo.batch.persona.datasets import ABLATIONS, DATASETS
from octavo.batch.persona.prompts import draft
from tests.batch.persona.jobs import EXAMPLES


def test_it_has_as_many_items_as_asked_for_and_all_differ(tmp_path: Path) -> None:
    make_scenario(tmp_path / "one", 200, EXAMPLES / "Chameleons")
    make_scenario(tmp_path / "two", 200, EXAMPLES / "Chameleons")
    for name in ("test_leaderboard.json", "train.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    found = read_scenario(tmp_path / "one")
    assert found.problems == []
    assert (len(found.users), found.num_items) == (25, 200)
    dataset, ablation = DATASETS["Chameleons"], ABLATIONS["profile_and_history_and_context"]
    drafts = [draft(dataset, ablation, item, user.history) for user in found.users for item in user.items]
    assert len({(each.instructions, each.request) for each in drafts}) == 200
    assert len({each.instructions for each in drafts}) == 25
    assert all(any(turn.source == item.person.name for turn in item.turns) or len(item.turns) > 1
               for user in found.users for item in user.items)  # fmt: skip
