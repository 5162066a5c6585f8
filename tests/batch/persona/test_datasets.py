"""The table of datasets, the ablations, and where data are looked for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from octavo.batch.persona.datasets import (
    ABLATIONS,
    DATASETS,
    ablation_named,
    dataset_named,
    find_scenario,
)
from octavo.errors import ConfigError

NAMES = (
    "Chameleons DMSC MovieReview MovieLens LovinkDialogue LovinkQuestionnaire RealPersonaChat PERSONA-Bench "
    "REALTALK"
)


def test_all_nine_are_there_each_with_its_settings() -> None:
    assert " ".join(DATASETS) == NAMES
    for dataset in DATASETS.values():
        assert dataset.task.count("{name}") >= 1
        assert 0 < dataset.max_tokens <= 512
    assert {dataset.language for dataset in DATASETS.values()} == {"en", "zh", "ja"}


@pytest.mark.parametrize("spelling", ["PERSONA-Bench", "PERSONA_Bench", "persona_bench"])
def test_spellings_of_one_name(spelling: str) -> None:
    assert dataset_named(spelling).name == "PERSONA-Bench"


def test_an_unknown_dataset_shows_the_list() -> None:
    with pytest.raises(ConfigError) as error:
        dataset_named("Chameleon")
    assert "Did you mean Chameleons?" in str(error.value)
    assert all(name in str(error.value) for name in DATASETS)


def test_the_ablations_are_all_combinations_but_none() -> None:
    shown = {(a.profile, a.history, a.context) for a in ABLATIONS.values()}
    assert shown == set(itertools.product((True, False), repeat=3)) - {(False, False, False)}
    assert all(ablation.name == name for name, ablation in ABLATIONS.items())
    assert next(iter(ABLATIONS)) == "profile_only"
    assert "profile_and_history_and_context" in ABLATIONS


def test_an_unknown_ablation_shows_the_list() -> None:
    assert ablation_named("context-only") is ABLATIONS["context_only"]
    with pytest.raises(ConfigError) as error:
        ablation_named("history_and_profile")
    assert all(name in str(error.value) for name in ABLATIONS)


def put(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "test_leaderboard.json").write_text("[]")
    return folder


def test_the_order_of_places(tmp_path: Path) -> None:
    dataset = DATASETS["REALTALK"]
    expected = [tmp_path / group / "REALTALK" for group in ("", "RealSelf", "IdealSelf")]
    for folder in reversed(expected):
        put(folder)
        assert find_scenario(dataset, None, str(tmp_path)) == folder
    other = put(tmp_path / "elsewhere")
    assert find_scenario(dataset, str(other), str(tmp_path)) == other


def test_both_spellings_of_a_folder(tmp_path: Path) -> None:
    folder = put(tmp_path / "IdealSelf" / "PERSONA_Bench")
    assert find_scenario(DATASETS["PERSONA-Bench"], None, str(tmp_path)) == folder


def test_nothing_found_names_the_places_and_an_example(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        find_scenario(DATASETS["DMSC"], None, str(tmp_path))
    for place in ("DMSC", "RealSelf/DMSC", "IdealSelf/DMSC"):
        assert str(tmp_path / place / "test_leaderboard.json") in str(error.value)
    assert "examples/persona/DMSC" in str(error.value)
    assert "--data-root" in str(error.value)


def test_a_given_path_is_the_only_one_tried(tmp_path: Path) -> None:
    put(tmp_path / "DMSC")
    with pytest.raises(ConfigError, match="--scenario-path takes the folder"):
        find_scenario(DATASETS["DMSC"], str(tmp_path / "wrong"), str(tmp_path))
