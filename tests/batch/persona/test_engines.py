"""The two engines on a small model: seeds, resumption, and the same texts from both."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from octavo.batch.persona.job import PersonaOptions
from octavo.batch.persona.run import Outcome, run_persona
from octavo.errors import ConfigError
from tests.batch.persona.jobs import example, files_of, options, read, samples_of, small_model

TRANSFORMERS: dict[str, Any] = {
    "engine": "transformers",
    "engine_kwargs": {"device": "cpu", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def run(job: PersonaOptions, stop_after: int | None = None) -> Outcome:
    """To its end, or until so many samples are in the journal."""

    async def main() -> Outcome:
        stop = asyncio.Event()
        task = asyncio.ensure_future(run_persona(job, example(), stop))
        journal = job.output / "samples.jsonl"
        while not task.done() and stop_after is not None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= stop_after:
                stop.set()
                break
            await asyncio.sleep(0.002)
        return await task

    return asyncio.run(main())


def texts(folder: Path) -> list[str]:
    return [sample["generated_text"] for sample in samples_of(folder)]


@pytest.mark.parametrize("dataset", ["Chameleons", "RealPersonaChat"])
def test_two_runs_are_equal_and_samples_differ(model: Path, tmp_path: Path, dataset: str) -> None:
    job = options(
        model, tmp_path / "one", max_items=4, max_tokens=12, ablation="profile_and_history_and_context"
    )
    assert run(job).num_left == 0
    run(dataclasses.replace(job, output=tmp_path / "two"))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    found = texts(tmp_path / "one")
    assert len(found) == 20
    for at in range(0, 20, 5):
        assert len(set(found[at : at + 5])) == 5, "five samples of an item at temperature 1"
    run(dataclasses.replace(job, output=tmp_path / "three", seed=43))
    assert not set(texts(tmp_path / "three")) & set(found)


def test_a_stopped_job_ends_as_an_undisturbed_one(model: Path, tmp_path: Path) -> None:
    job = options(model, tmp_path / "out", max_tokens=24)
    job = dataclasses.replace(job, engine_kwargs={**job.engine_kwargs, "max_num_seqs": 8})
    first = run(job, stop_after=9)
    assert first.summary is None
    assert 0 < first.num_left <= 41
    assert run(job).num_left == 0
    run(dataclasses.replace(job, output=tmp_path / "undisturbed"))
    here, there = files_of(tmp_path / "out"), files_of(tmp_path / "undisturbed")
    assert here == there
    assert read(tmp_path / "out" / "inference_summary.json")["num_runs"] == 2


@pytest.mark.parity
def test_greedy_texts_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    """The same prompts, the same tokens, the same ends."""
    given: dict[str, Any] = {"temperature": 0.0, "num_samples": 1, "max_tokens": 16, "ignore_eos": False}
    run(options(model, tmp_path / "octavo", **given))
    run(options(model, tmp_path / "loop", **given, **TRANSFORMERS))
    ours, theirs = samples_of(tmp_path / "octavo"), samples_of(tmp_path / "loop")
    assert ours == theirs
    assert any(sample["generated_text"] for sample in ours)


def test_static_batches_keep_their_company(model: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of a batch, they end as undisturbed ones do."""
    given = {**TRANSFORMERS, "max_items": 4, "batch_size": 8, "max_tokens": 24}
    job = options(model, tmp_path / "out", **given)
    assert run(job).num_failed == 0
    summary = read(tmp_path / "out" / "inference_summary.json")
    assert summary["engine"] == "transformers"
    assert summary["engine_settings"]["batch_size"] == 8
    whole = files_of(tmp_path / "out")
    found = texts(tmp_path / "out")
    assert len(set(found)) == 20, "each row draws with its own seed"
    # Three samples of the second batch are lost, and one of the first.
    journal = tmp_path / "out" / "samples.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3] + lines[4:9] + lines[12:]))
    outcome = run(job)
    assert outcome.run is not None
    assert outcome.run["items"] == 4
    assert files_of(tmp_path / "out") == whole
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({each["key"] for each in records}) == len(records) == 20


def test_a_row_of_a_batch_is_drawn_by_its_own_seed(model: Path, tmp_path: Path) -> None:
    """Alone and in a batch of prompts of one length, where nothing is padded, the draws are the same."""
    one = options(model, tmp_path / "one", max_items=1, **TRANSFORMERS)
    run(one)
    run(options(model, tmp_path / "five", max_items=1, batch_size=5, **TRANSFORMERS))
    assert texts(tmp_path / "one") == texts(tmp_path / "five")


def test_options_that_the_baseline_makes_no_use_of_are_named(model: Path, tmp_path: Path) -> None:
    job = options(model, tmp_path / "out", max_items=1, num_samples=1, **TRANSFORMERS)
    job = dataclasses.replace(job, engine_kwargs={**job.engine_kwargs, "kv_cache_memory": "16MB"})
    told: list[str] = []
    outcome = asyncio.run(run_persona(job, example(), tell=told.append))
    assert told == ["note: --engine transformers makes no use of kv_cache_memory"]
    assert outcome.summary is not None
    assert outcome.summary["warnings"] == ["--engine transformers makes no use of kv_cache_memory"]


@pytest.mark.slow
def test_replicas_of_both_engines(model: Path, tmp_path: Path) -> None:
    """Two processes that share the work make what one makes."""
    from octavo import platform

    if platform.usable_cores() < 2:
        pytest.skip("needs two cores")
    for name, given in (("octavo", {}), ("transformers", TRANSFORMERS)):
        one = options(model, tmp_path / f"{name}-1", max_items=4, **given)
        run(one)
        run(dataclasses.replace(one, output=tmp_path / f"{name}-2", num_replicas=2))
        assert texts(tmp_path / f"{name}-1") == texts(tmp_path / f"{name}-2")
        summary = read(tmp_path / f"{name}-2" / "inference_summary.json")
        assert summary["data_parallel_size"] == summary["engine_settings"]["num_replicas"] == 2


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    from tests.checkpoints import make_checkpoint

    bare = make_checkpoint(tmp_path / "bare", vocab_size=320, max_position_embeddings=4096)
    for given in ({}, TRANSFORMERS):
        with pytest.raises(ConfigError, match="has no tokenizer"):
            run(options(bare, tmp_path / "out", overwrite=True, **given))
