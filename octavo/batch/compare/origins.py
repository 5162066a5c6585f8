"""The prompts behind results, made again as the job made them: from the input file, or the scenario."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.batch.compare.check import TextDifference
from octavo.batch.compare.entries import AnswerFile, PersonaFolder
from octavo.batch.compare.explain import Prompt
from octavo.batch.keys import digest_of
from octavo.batch.openai.lines import read_facts
from octavo.batch.persona.data import Item, Scenario, User, read_scenario
from octavo.batch.persona.datasets import ablation_named, dataset_named
from octavo.batch.persona.fitting import PromptMaker
from octavo.batch.workers import EngineWorkers
from octavo.errors import ConfigError, RequestError
from octavo.sampling_params import SamplingParams


def is_greedy(temperature: Any) -> bool:
    """True for a temperature that takes the most probable token; None stands for 1."""
    return SamplingParams(temperature=1.0 if temperature is None else temperature).is_greedy


class RequestFile:
    """The requests of a batch file, found by custom_id; holds a place for each line and no line."""

    def __init__(self, path: Path, workers: EngineWorkers | None = None) -> None:
        self._path = path
        self._workers = workers
        self._places: dict[bytes, int] = {}
        place = 0
        with open(path, "rb") as file:
            for line in file:
                try:
                    custom_id = json.loads(line)["custom_id"]
                    self._places.setdefault(digest_of(custom_id), place)
                except (ValueError, KeyError, TypeError, AttributeError):
                    pass  # the job has an error record for it, and nothing is asked about it
                place += len(line)

    @classmethod
    def of(
        cls, results: AnswerFile, given: Path | None, workers: EngineWorkers | None = None
    ) -> RequestFile | None:
        """Of `given`, or of the file that the job has noted. Raises ConfigError for another file."""
        path = given or results.input_file
        if path is None:
            return None
        expected = results.settings.get("input_sha256")
        if expected is not None and read_facts(path).sha256 != expected:
            if given is None:
                return None
            raise ConfigError(f"{path} is not the file that {results.path} was made from")
        return cls(path, workers)

    def is_greedy(self, difference: TextDifference) -> bool | None:
        """See Origins."""
        found = self._line(difference.key)
        try:
            return None if found is None else is_greedy(found["body"].get("temperature"))
        except RequestError:
            return None

    def prompt(self, difference: TextDifference) -> Prompt | None:
        """See Origins."""
        found = self._line(difference.key)
        if found is None or self._workers is None:
            return None
        from octavo.batch.openai.prompts import prompts_of

        made = prompts_of(self._workers, found["url"], found["body"])
        number = int(difference.part.removeprefix("choice ") or 0)
        each = max(1, found["body"].get("n") or 1)
        return Prompt(made[number // each].token_ids, made[number // each].echoed)

    def _line(self, key: str) -> dict[str, Any] | None:
        if not key.startswith("custom_id "):
            return None
        place = self._places.get(digest_of(json.loads(key.removeprefix("custom_id "))))
        if place is None:
            return None
        with open(self._path, "rb") as file:
            file.seek(place)
            found = json.loads(file.readline())
        return found if isinstance(found.get("body"), dict) else None


class PersonaItems:
    """The items of a persona job, from its summary and its scenario."""

    def __init__(self, folder: PersonaFolder, workers: EngineWorkers | None = None) -> None:
        self._folder = folder
        self._workers = workers
        self._summary = folder.summary
        self._scenario: Scenario | None = None
        self._maker: PromptMaker | None = None

    def is_greedy(self, difference: TextDifference) -> bool | None:
        """See Origins."""
        found = self._summary.get("sampling_params")
        return is_greedy(found.get("temperature")) if isinstance(found, dict) else None

    def prompt(self, difference: TextDifference) -> Prompt | None:
        """See Origins."""
        if self._workers is None or not self._summary:
            return None
        user_hash, item_idx = self._folder.place(difference.key)
        found = self._item(user_hash, item_idx)
        if found is None:
            return None
        user, item = found
        return Prompt(self._prompt_maker(self._workers).make(item, user.history).token_ids)

    def _item(self, user_hash: str, item_idx: int) -> tuple[User, Item] | None:
        if self._scenario is None:
            self._scenario = read_scenario(Path(self._summary["scenario"]))
        for user in self._scenario.users:
            if user.user_hash == user_hash:
                return next(((user, item) for item in user.items if item.index == item_idx), None)
        return None

    def _prompt_maker(self, workers: EngineWorkers) -> PromptMaker:
        if self._maker is None:
            if workers.tokenizer is None:
                raise ConfigError(f"{workers.info.model} has no tokenizer")
            length = (
                self._summary.get("engine_settings", {}).get("max_model_len") or workers.info.max_model_len
            )
            self._maker = PromptMaker(
                dataset_named(self._summary["dataset"]),
                ablation_named(self._summary["ablation_config"]),
                workers.tokenizer,
                workers.template,
                length - self._summary["sampling_params"]["max_tokens"],
            )
        return self._maker
