"""A persona job from its options to its files.

    scenario ── plan ── journal ── engine ── samples ── user files, test file, summary

Everything that can be refused is refused before a model is loaded, and a job of which nothing is left to
do loads none: it writes its files again from the journal, for one with another cleaning.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo import hub
from octavo.batch.journal import Journal, read_job
from octavo.batch.persona.baseline import Row, in_batches
from octavo.batch.persona.data import Scenario
from octavo.batch.persona.datasets import TEST_FILE
from octavo.batch.persona.engines import Ended, PersonaEngine, open_engine
from octavo.batch.persona.fitting import PromptMaker
from octavo.batch.persona.gpu_use import GpuUse
from octavo.batch.persona.job import MAX_MODEL_LEN, PersonaOptions, Plan, identity, make_plan
from octavo.batch.persona.results import (
    JOURNAL_FILE,
    SUMMARY_FILE,
    Record,
    Results,
    is_failed,
    sample_record,
    user_file_name,
    write_json,
)
from octavo.batch.persona.summary import EngineFacts, RunNote, make_summary
from octavo.batch.progress import Progress
from octavo.errors import ConfigError, RequestError
from octavo.models.config import ModelConfig
from octavo.sampling_params import SamplingParams


@dataclass(frozen=True)
class Outcome:
    """How a run of a job ended. `summary` is None for a job that was stopped before its end."""

    summary: dict[str, Any] | None
    num_left: int  # samples that are still to be made
    num_failed: int
    run: dict[str, Any] | None  # what this run did (`Progress.close`); None: there was nothing to do


async def run_persona(
    options: PersonaOptions,
    scenario: Scenario,
    stop: asyncio.Event | None = None,
    tell: Callable[[str], None] = lambda text: None,
    load: Callable[[PersonaOptions, Path], Awaitable[PersonaEngine]] = open_engine,
) -> Outcome:
    """Do the job, or what is left of it. `tell` gets lines for the user; `load` makes the engine.

    Raises ConfigError for an output folder that holds something else, and what loading a model raises.
    """
    options = with_context_length(options)
    plan = make_plan(scenario, options)
    if not plan.total_samples:
        raise ConfigError(
            f"none of the {scenario.num_items} items of {scenario.folder} has a context, which "
            f"{options.ablation.name} needs"
        )
    _check_output(options, scenario)
    model_path = hub.resolve(options.checkpoint)
    job = identity(options, scenario, model_path)
    if options.overwrite:
        _remove_results(options.output)
    with Journal.open(
        options.output / JOURNAL_FILE,
        job,
        overwrite=options.overwrite,
        drop=is_failed if options.retries_failed else None,
    ) as journal:
        job_of_run = _Job(options, scenario, plan, journal, tell)
        return await job_of_run.run(lambda: load(options, model_path), stop or asyncio.Event())


def with_context_length(options: PersonaOptions) -> PersonaOptions:
    """The options with max_model_len filled in: prompts are cut by it, so it must not depend on what
    memory happens to be free."""
    kwargs = dict(options.engine_kwargs)
    if kwargs.get("max_model_len") is None:
        config = ModelConfig.from_folder(hub.resolve(options.checkpoint))
        kwargs["max_model_len"] = min(MAX_MODEL_LEN, config.max_position_embeddings)
    assert options.params.max_tokens is not None
    if options.params.max_tokens >= kwargs["max_model_len"]:
        raise ConfigError(
            f"an answer of up to {options.params.max_tokens} tokens leaves no room for a prompt in a context "
            f"of {kwargs['max_model_len']}; lower --max-tokens or raise --max-model-len"
        )
    return dataclasses.replace(options, engine_kwargs=kwargs)


def _check_output(options: PersonaOptions, scenario: Scenario) -> None:
    """Nothing is ever written over the input, or over what another program made."""
    output = options.output
    if output.resolve() == scenario.folder.resolve():
        raise ConfigError(f"{output} is the scenario itself, whose {TEST_FILE} would be written over")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; --output-dir takes a folder")
    if (output / JOURNAL_FILE).exists() or options.overwrite:
        return
    for name in (TEST_FILE, SUMMARY_FILE):
        if (output / name).exists():
            raise ConfigError(
                f"{output} holds a {name} and no {JOURNAL_FILE} that it was made from: it is not a folder of "
                "this program. Name another output, or throw the old results away with --overwrite"
            )


def _remove_results(folder: Path) -> None:
    """The files that were made from the journal there; others are left alone."""
    names = {TEST_FILE, SUMMARY_FILE}
    journal = folder / JOURNAL_FILE
    with contextlib.suppress(OSError), open(journal, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                names.add(user_file_name(json.loads(line)["user_hash"]))
    for name in names:
        (folder / name).unlink(missing_ok=True)


class _Job:
    """What the steps of one run share."""

    def __init__(
        self,
        options: PersonaOptions,
        scenario: Scenario,
        plan: Plan,
        journal: Journal,
        tell: Callable[[str], None],
    ) -> None:
        self._options = options
        self._scenario = scenario
        self._plan = plan
        self._journal = journal
        self._tell = tell
        self._failed_at_once: list[Ended] = []  # whose prompts cannot be made
        self._results = Results(scenario, with_history=options.ablation.history, cleans=options.cleans)
        self._run_number = 1
        for record in journal.records():
            self._results.add(record)
            self._run_number = max(self._run_number, record["run"] + 1)
        for note in self._notes():
            self._run_number = max(self._run_number, note["run"] + 1)
        self._expected = {user.user_hash: len(items) * plan.num_samples for user, items in plan.users}

    async def run(self, load: Callable[[], Awaitable[PersonaEngine]], stop: asyncio.Event) -> Outcome:
        """Make what is missing, then write what can be written."""
        did = None
        missing = self._plan.total_samples - self._journal.num_done
        if missing:
            if self._journal.num_done:
                self._tell(f"{self._journal.num_done:,} samples are there already, {missing:,} are left")
            did = await self._make_samples(load, stop)
        num_left = self._plan.total_samples - self._journal.num_done
        records = list(self._results.records())
        num_failed = sum(map(is_failed, records))
        if num_left:
            return Outcome(None, num_left, num_failed, did)
        folder = self._options.output
        for user, _ in self._plan.users:
            self._results.write_user(folder, user)
        self._results.write_test_file(folder)
        summary = make_summary(self._options, self._scenario, self._plan, records, self._notes())
        write_json(folder / SUMMARY_FILE, summary)
        return Outcome(summary, 0, num_failed, did)

    def _notes(self) -> list[dict[str, Any]]:
        found = read_job(self._journal.path)
        return list(found["runs"]) if found else []

    async def _make_samples(
        self, load: Callable[[], Awaitable[PersonaEngine]], stop: asyncio.Event
    ) -> dict[str, Any]:
        began = time.monotonic()
        engine = await load()
        try:
            load_seconds = time.monotonic() - began
            facts = engine.facts()
            for warning in facts.warnings:
                self._tell(f"note: {warning}")
            return await self._make_with(engine, facts, load_seconds, stop)
        finally:
            await engine.close()

    async def _make_with(
        self, engine: PersonaEngine, facts: EngineFacts, load_seconds: float, stop: asyncio.Event
    ) -> dict[str, Any]:
        maker = engine.prompt_maker(self._options)
        use = GpuUse(facts.num_gpus)
        use.start()
        progress = Progress(
            self._plan.total_samples, self._journal.num_done, unit="samples", quiet=self._options.quiet
        )
        start = time.monotonic()
        try:
            async for ended in engine.samples(self, maker, stop):
                self._take(ended, time.monotonic() - start, progress)
        finally:
            seconds = time.monotonic() - start
            busy, reason = use.stop()
            did = progress.close()
            note = RunNote(
                run=self._run_number,
                load_time_seconds=round(load_seconds, 3),
                inference_time_seconds=round(seconds, 3),
                energy=did["energy"],
                gpu_utilization=busy,
                gpu_reason=reason,
                facts=facts,
            )
            self._journal.note(dataclasses.asdict(note))
        return did

    def _take(self, ended: Ended, elapsed: float, progress: Progress) -> None:
        """Keep one sample; and its user's file, if it was the last of that user."""
        if ended.sample.key in self._journal:
            return  # made again because its batch was
        record: Record = sample_record(
            ended.sample,
            ended.output,
            ended.error,
            num_dropped=ended.num_dropped,
            run=self._run_number,
            elapsed=elapsed,
        )
        self._journal.append(record)
        self._results.add(record)
        progress.note(ended.num_tokens, failed=ended.error is not None)
        user = ended.sample.user
        if self._results.count_of(user.user_hash) == self._expected[user.user_hash]:
            self._results.write_user(self._options.output, user)

    # ------------------------------------------------------------------ what the engines ask for

    def rows(self, maker: PromptMaker, *, only_missing: bool) -> Iterator[Row]:
        """Samples with their prompts in the job's order; those whose prompt cannot be made end here."""
        for user, item in self._plan.items():
            samples = self._plan.samples_of(user, item)
            if only_missing:
                samples = [sample for sample in samples if sample.key not in self._journal]
                if not samples:
                    continue
            try:
                prompt = maker.make(item, user.history)
            except RequestError as error:
                self._failed_at_once += [Ended(sample, None, str(error), 0, 0) for sample in samples]
                continue
            for sample in samples:
                yield Row(sample, prompt.token_ids, prompt.num_dropped)

    def batches(self, maker: PromptMaker, size: int) -> Iterator[list[Row]]:
        """Batches that do not depend on what is there, less those that are."""
        for batch in in_batches(self.rows(maker, only_missing=False), size):
            if any(row.sample.key not in self._journal for row in batch):
                yield batch

    def failed_at_once(self) -> list[Ended]:
        """Samples whose prompts could not be made, since the last call."""
        failed, self._failed_at_once = self._failed_at_once, []
        return failed


def used_up(params: SamplingParams, num_samples: int) -> str | None:
    """A remark on parameters that make several samples pointless."""
    if params.is_greedy and num_samples > 1:
        return (
            f"temperature {params.temperature} is greedy: the {num_samples} samples of an item are the same"
        )
    return None
