"""The nine datasets: their language, what is asked for in each, and how long an answer may be.

The data themselves are not here, and nothing about them is guessed from their contents: a folder of
one of these names is looked for (`find_scenario`), and what its records are made of is the same for all
(`data`). To add a dataset, add a row to `DATASETS`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from octavo.errors import ConfigError

Language = Literal["en", "zh", "ja"]

DEFAULT_MAX_TOKENS = 512
TEST_FILE, TRAIN_FILE = "test_leaderboard.json", "train.json"
# Some collections keep people as they are and as they would like to be in folders of their own.
_GROUPS = ("RealSelf", "IdealSelf")
# Where the examples lie in a source tree; an installed package does not bring them.
_EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "persona"


@dataclass(frozen=True)
class Dataset:
    """One dataset. `task` is a sentence of its language; {name} is the person to be imitated."""

    name: str
    language: Language
    task: str
    is_dialogue: bool  # an answer is the next turn of a conversation, not a text of its own
    max_tokens: int = DEFAULT_MAX_TOKENS  # of an answer, where the user does not say


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "Chameleons",
            "en",
            "You play {name}, a character of a film. Say what {name} says next, as {name} would say it.",
            is_dialogue=True,
            max_tokens=256,
        ),
        Dataset(
            "DMSC",
            "zh",
            "你是电影观众{name}。请以{name}的口吻和立场写一条电影短评。",
            is_dialogue=False,
            max_tokens=256,
        ),
        Dataset(
            "MovieReview",
            "en",
            "You are {name}, who writes film reviews. Write the review that {name} would write.",
            is_dialogue=False,
        ),
        Dataset(
            "MovieLens",
            "en",
            "You are {name}, who rates films. Give the rating or the tags that {name} would give.",
            is_dialogue=False,
            max_tokens=64,
        ),
        Dataset(
            "LovinkDialogue",
            "zh",
            "你是{name}，正在和别人聊天。请以{name}的身份说出下一句话。",
            is_dialogue=True,
            max_tokens=256,
        ),
        Dataset(
            "LovinkQuestionnaire",
            "zh",
            "你是{name}，正在填写一份问卷。请以{name}的身份回答问题。",
            is_dialogue=False,
            max_tokens=256,
        ),
        Dataset(
            "RealPersonaChat",
            "ja",
            "あなたは{name}です。雑談の続きとして、{name}の次の発言だけを書いてください。",
            is_dialogue=True,
            max_tokens=256,
        ),
        Dataset(
            "PERSONA-Bench",
            "en",
            "You are {name}. Answer as {name} would, with the opinions and in the words of {name}.",
            is_dialogue=False,
        ),
        Dataset(
            "REALTALK",
            "en",
            "You are {name}, in a chat with a friend over several weeks. Write the next message of {name}.",
            is_dialogue=True,
            max_tokens=256,
        ),
    )
}


def _key(name: str) -> str:
    return name.replace("_", "-").lower()


_BY_KEY = {_key(name): dataset for name, dataset in DATASETS.items()}


def dataset_named(name: str) -> Dataset:
    """The dataset of that name, in any case and with _ for - (PERSONA_Bench). ConfigError with the list."""
    found = _BY_KEY.get(_key(name))
    if found is None:
        near = difflib.get_close_matches(_key(name), _BY_KEY, n=1)
        hint = f" Did you mean {_BY_KEY[near[0]].name}?" if near else ""
        raise ConfigError(f"there is no dataset {name!r}.{hint} There are: {', '.join(DATASETS)}")
    return found


@dataclass(frozen=True)
class Ablation:
    """What of a person a prompt shows."""

    profile: bool
    history: bool
    context: bool

    @property
    def name(self) -> str:
        """As the command line spells it: profile_only, profile_and_history, …"""
        parts = [part for part in ("profile", "history", "context") if getattr(self, part)]
        return f"{parts[0]}_only" if len(parts) == 1 else "_and_".join(parts)


# Every combination but none at all.
ABLATIONS = {
    ablation.name: ablation
    for ablation in (
        Ablation(profile=True, history=False, context=False),
        Ablation(profile=False, history=True, context=False),
        Ablation(profile=False, history=False, context=True),
        Ablation(profile=True, history=True, context=False),
        Ablation(profile=True, history=False, context=True),
        Ablation(profile=False, history=True, context=True),
        Ablation(profile=True, history=True, context=True),
    )
}


def ablation_named(name: str) -> Ablation:
    """The ablation of that name; - may stand for _. ConfigError with the list."""
    found = ABLATIONS.get(name.replace("-", "_").lower())
    if found is None:
        near = difflib.get_close_matches(name.replace("-", "_").lower(), ABLATIONS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no ablation {name!r}.{hint} There are: {', '.join(ABLATIONS)}")
    return found


def find_scenario(dataset: Dataset, scenario_path: str | None, data_root: str) -> Path:
    """The folder with the dataset's records.

    `scenario_path` is taken as it is; otherwise `data_root` is searched for a folder of the dataset's
    name, in itself and then in its groups RealSelf and IdealSelf. Raises ConfigError with the places
    that were tried, if none has a test_leaderboard.json.
    """
    if scenario_path is not None:
        tried = [Path(scenario_path)]
    else:
        root = Path(data_root)
        spellings = dict.fromkeys((dataset.name, dataset.name.replace("-", "_")))
        tried = [root / group / name for group in ("", *_GROUPS) for name in spellings]
    for folder in tried:
        if (folder / TEST_FILE).is_file():
            return folder
    places = "".join(f"\n  {folder / TEST_FILE}" for folder in tried)
    advice = (
        "--scenario-path takes the folder that holds it"
        if scenario_path is not None
        else "name the folder with --scenario-path, or the one above it with --data-root"
    )
    raise ConfigError(
        f"no records of {dataset.name}: none of these files exists:{places}\n{advice}. {_example_of(dataset)}"
    )


def _example_of(dataset: Dataset) -> str:
    """Where a reader finds what such a folder looks like."""
    own = _EXAMPLES / dataset.name
    nearest = own if own.is_dir() else _EXAMPLES / "Chameleons"
    if nearest.is_dir():
        return f"An example is {nearest}"
    return f"An example is examples/persona/{nearest.name} of Octavo's source"
