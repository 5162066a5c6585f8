"""What a scenario folder holds, whatever shape it comes in and whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.batch.persona.data import Trait, profile_hash, read_scenario, traits_of
from octavo.batch.persona.datasets import DATASETS, find_scenario
from octavo.errors import ConfigError
from tests.batch.persona.records import entry, record, scenario, turns

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "persona"
HELLO = turns(("Ben", "Hello"))

SHAPES: dict[str, tuple[dict[str, Any], list[Trait]]] = {
    "flat": ({"Ocean.Extraversion": 90}, [Trait(("Ocean", "Extraversion"), "90")]),
    "nested, in a group": (
        {"Ocean": {"dimensions": {"Openness": {"score": 8.5, "description": "curious"}}}},
        [Trait(("Ocean", "Openness"), "8.5", "curious")],
    ),
    "nested, without a group": (
        {"dimensions": {"Openness": {"score": 3, "description": ""}, "Calm": {"description": "very"}}},
        [Trait(("Openness",), "3"), Trait(("Calm",), "", "very")],
    ),
    "grouped": ({"big_five": {"Openness": 3.67}}, [Trait(("big_five", "Openness"), "3.67")]),
    "several at once": (
        {"MBTI": "INTJ", "big_five": {"Openness": 1}, "Ocean.Calm": None},
        [Trait(("MBTI",), "INTJ"), Trait(("big_five", "Openness"), "1")],
    ),
    "a group with a score of its own": (
        {"Ocean": {"score": 5, "dimensions": {"Openness": {"score": 8}}}},
        [Trait(("Ocean",), "5"), Trait(("Ocean", "Openness"), "8")],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_structured(shape: str) -> None:
    structured, expected = SHAPES[shape]
    assert list(traits_of(structured)) == expected


@pytest.mark.parametrize("name", ["Chameleons", "DMSC", "RealPersonaChat"])
def test_the_examples_are_whole(name: str) -> None:
    found = read_scenario(find_scenario(DATASETS[name], None, str(EXAMPLES)))
    assert found.problems == []
    assert len(found.users) == 3
    assert all(user.history and user.person.traits and user.person.name for user in found.users)
    # Each of the three has another shape.
    shapes = {"Chameleons": "Ocean", "DMSC": "大五人格", "RealPersonaChat": "big_five"}
    assert found.users[0].person.traits[0].path[0] == shapes[name]


def test_items_are_numbered_over_records_and_collections(tmp_path: Path) -> None:
    first = record([entry(HELLO), entry(turns(("Ben", "Again")))])
    second = record([entry(HELLO)])
    second["task"]["task_behavior_collections"].append({"data": [entry(turns(("Ben", "Last")))]})
    found = scenario(tmp_path, [first, record([entry(HELLO)], "u2"), second])
    assert [user.user_hash for user in found.users] == ["u1", "u2"]
    items = found.users[0].items
    assert [item.index for item in items] == [0, 1, 2, 3]
    assert [item.place for item in items] == [(0, 0, 0), (0, 0, 1), (2, 0, 0), (2, 1, 0)]
    assert items[3].turns[0].content == "Last"


MALFORMED: list[tuple[Any, str, str]] = [
    (3, "", "must be an object, not a number"),
    ({"user_hash": "x"}, "user", "is missing"),
    (record([entry(HELLO)], profile=[]), "user.profile", "must be an object, not a list"),  # type: ignore[arg-type]
    ({**record([]), "task": None}, "task", "is missing"),
    (record([7]), "task.task_behavior_collections[0].data[0]", "must be an object, not a number"),
    (record([{"context": "hi"}]), "task.task_behavior_collections[0].data[0].context", "must be a list"),
    (
        record([{"context": [{"source": "Ben"}]}]),
        "task.task_behavior_collections[0].data[0].context[0].content",
        "is missing or empty",
    ),
    (record([entry(HELLO)], structured=[1]), "user.personality.structured", "must be an object"),
    (record([entry(HELLO)], structured={"Ocean": [1]}), "user.personality.structured.Ocean", "not a list"),
    (record([entry(HELLO)], user_hash=None, profile={}), "user_hash", "there is no profile"),
    (record([entry(HELLO)], user_hash=True), "user_hash", "not true or false"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("bad", "where", "what"), MALFORMED)
def test_malformed_records_are_placed_and_the_rest_is_used(
    bad: Any, where: str, what: str, tmp_path: Path
) -> None:
    good = record([entry(HELLO)], "good")
    lines = "\n".join(json.dumps(each) for each in (good, bad, good))
    found = scenario(tmp_path, lines)
    assert [user.user_hash for user in found.users] == ["good"]
    assert len(found.users[0].items) == 2
    (problem,) = found.problems
    assert (problem.line, problem.record, problem.where) == (2, 1, where)
    assert what in problem.what
    assert str(problem).startswith("test_leaderboard.json, line 2 (record 1")
    assert found.num_malformed_items == 1


def test_a_malformed_item_keeps_its_number(tmp_path: Path) -> None:
    found = scenario(tmp_path, [record([entry(HELLO), {"context": 1}, entry(HELLO)])])
    assert [item.index for item in found.users[0].items] == [0, 2]


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no item that can be used:\n.*line 1 \(record 0, user\)"):
        scenario(tmp_path, [{"task": {}}])


def test_history_is_the_users_own_newest_last(tmp_path: Path) -> None:
    def past(text: str, when: Any) -> Any:
        return entry(HELLO, text, timestamp=when)

    train = [
        record([past("third", "2024-03-01T00:00:00Z"), past("first", "2023-01-01")]),
        record([past("foreign", "2022-01-01")], "u2"),
        record([past("second", 1690000000)]),
    ]
    found = scenario(tmp_path, [record([entry(HELLO)])], train)
    assert [item.continuation for item in found.users[0].history] == ["first", "second", "third"]


def test_without_times_the_order_of_the_file_counts(tmp_path: Path) -> None:
    train = [record([entry(HELLO, "a", timestamp="2024-01-01"), entry(HELLO, "b")])]
    found = scenario(tmp_path, [record([entry(HELLO)])], train)
    assert [item.continuation for item in found.users[0].history] == ["a", "b"]


def test_the_time_of_the_last_turn_stands_in(tmp_path: Path) -> None:
    late = [{"source": "Ben", "content": "x", "timestamp": "2024"}]
    early = [{"source": "Ben", "content": "y", "timestamp": "2020"}]
    train = [record([entry(late, "late"), entry(early, "early")])]
    found = scenario(tmp_path, [record([entry(HELLO)])], train)
    assert [item.continuation for item in found.users[0].history] == ["early", "late"]


def test_without_user_hash_the_profile_names_the_user(tmp_path: Path) -> None:
    profile = {"name": "Anna", "age": 30}
    turned = {"age": 30, "name": "Anna"}
    found = scenario(
        tmp_path,
        [record([entry(HELLO)], None, profile), record([entry(HELLO)], None, {**profile, "age": 31})],
        [record([entry(HELLO, "mine")], None, turned)],
    )
    assert [user.user_hash for user in found.users] == [
        profile_hash(profile),
        profile_hash({"name": "Anna", "age": 31}),
    ]
    assert [len(user.history) for user in found.users] == [1, 0]
    # Stable: this is what the files of earlier jobs are called.
    assert profile_hash(profile) == "c93bd8677bb60df1"


def test_train_items_that_show_nothing_are_reported(tmp_path: Path) -> None:
    found = scenario(tmp_path, [record([entry(HELLO)])], [record([entry([]), entry([], "alone")])])
    assert [item.continuation for item in found.users[0].history] == ["alone"]
    assert [problem.file for problem in found.problems] == ["train.json"]
    assert found.num_malformed_items == 0


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    test = [record([entry(HELLO)])]
    one = scenario(tmp_path / "1", test)
    same = scenario(tmp_path / "2", test)
    with_train = scenario(tmp_path / "3", test, test)
    assert one.digest == same.digest != with_train.digest


def test_a_folder_without_the_test_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"test_leaderboard\.json does not exist"):
        read_scenario(tmp_path)
