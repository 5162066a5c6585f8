"""A job from its options to its files, with workers that cost nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.batch.checkpoint import fingerprint
from octavo.batch.persona.data import read_scenario
from octavo.batch.persona.engines import PersonaEngine
from octavo.batch.persona.job import PersonaOptions, sample_seed
from octavo.batch.persona.results import user_file_name
from octavo.batch.persona.run import run_persona
from octavo.batch.work import WorkItem
from octavo.errors import ConfigError, RequestError
from tests.batch.persona.jobs import (
    example,
    fake_engine,
    files_of,
    options,
    read,
    run_fake,
    samples_of,
    small_model,
)
from tests.batch.persona.records import entry, record, turns, write_scenario

ROOT = Path(__file__).resolve().parents[3]
SUMMARY_KEYS = (
    "checkpoint scenario dataset ablation_config num_users num_items skipped_items num_samples_per_item "
    "total_samples failed_samples truncated_prompts inference_time_seconds load_time_seconds "
    "throughput_samples_per_sec tensor_parallel_size gpu_minutes_per_10k_samples gpu_utilization energy "
    "sampling_params timestamp"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def test_everything_is_written(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcome = run_fake(model, options(model, output, num_samples=3))
    assert outcome.num_left == outcome.num_failed == 0
    summary = read(output / "inference_summary.json")
    assert set(SUMMARY_KEYS.split()) <= set(summary)
    # 11 items, one of them without the context that context_only needs.
    assert (summary["num_users"], summary["num_items"], summary["skipped_items"]) == (3, 10, 1)
    assert summary["total_samples"] == 30
    assert summary["sampling_params"] == {
        "temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_tokens": 8, "ignore_eos": True,
    }  # fmt: skip
    assert summary["seed"] == 42
    assert summary["engine_settings"]["dtype"] == "float32"
    # What was not measured is null, with the reason.
    assert summary["gpu_utilization"] is None
    assert summary["not_measured"]["gpu_utilization"] == "no GPU was used"
    assert summary["energy"]["joules"] is not None or summary["energy"]["reason"]

    user = read(output / "c-okoye.json")
    assert list(user) == ["user_hash", "user_profile", "context", "history", "generated_samples"]
    assert user["user_profile"]["name"] == "Judge Okoye"
    assert len(user["context"]) == 4, "one entry an item, the skipped one too"
    assert user["history"] == [], "context_only shows none"
    samples = user["generated_samples"]
    assert [(s["item_idx"], s["sample_idx"]) for s in samples] == [(i, n) for i in range(3) for n in range(3)]
    assert list(samples[0]) == ["item_idx", "sample_idx", "seed", "generated_text", "finish_reason"]

    filled = read(output / "test_leaderboard.json")
    given = read(example().folder / "test_leaderboard.json")
    texts = []
    for record_there, record_here in zip(filled, given, strict=True):
        for there, here in zip(
            record_there["task"]["task_behavior_collections"][0]["data"],
            record_here["task"]["task_behavior_collections"][0]["data"],
            strict=True,
        ):
            texts += there.pop("continuations")
            assert there == here, "nothing else is changed"
    assert texts == [s["generated_text"] for h in ("c-mara", "c-teo", "c-okoye")
                     for s in read(output / f"{h}.json")["generated_samples"]]  # fmt: skip


def test_history_is_written_where_it_is_shown(model: Path, tmp_path: Path) -> None:
    run_fake(model, options(model, tmp_path / "out", ablation="history_only", num_samples=1))
    user = read(tmp_path / "out" / "c-mara.json")
    assert user["history"][-1]["continuation"] == "Then you've been lucky for thirty years."
    summary = read(tmp_path / "out" / "inference_summary.json")
    assert (summary["num_items"], summary["skipped_items"]) == (11, 0), "no context is needed"


def test_each_sample_has_a_seed_of_its_own(model: Path, tmp_path: Path) -> None:
    run_fake(model, options(model, tmp_path / "out", num_samples=5, seed=7))
    samples = samples_of(tmp_path / "out")
    assert len({sample["seed"] for sample in samples}) == len(samples) == 50
    assert len({sample["generated_text"] for sample in samples}) == 50
    first = read(tmp_path / "out" / "c-mara.json")["generated_samples"][1]
    assert first["seed"] == sample_seed(7, "c-mara", 0, 1)
    assert 0 <= first["seed"] < 2**53
    # Fixed for ever: earlier results are named by it.
    assert sample_seed(42, "c-mara", 0, 0) == 2813068058880419
    assert sample_seed(42, "c-mara", 1, 0) != sample_seed(42, "c-mara", 0, 1)


def test_samples_of_an_item_follow_one_another(model: Path, tmp_path: Path) -> None:
    """So that they share its prompt's blocks."""
    seen: list[WorkItem] = []

    def note(item: WorkItem) -> float:
        seen.append(item)
        return 0.0

    run_fake(model, options(model, tmp_path / "out", num_samples=4), delay=note)
    groups = [item.group for item in seen]
    assert groups == [group for group in dict.fromkeys(groups) for _ in range(4)]
    assert all(seen[at].prompt == seen[at + 1].prompt for at in range(0, len(seen), 4))


def test_a_failure_is_a_failure(model: Path, tmp_path: Path) -> None:
    """It is no copy of another sample, and --retry-failed makes it again."""
    job = options(model, tmp_path / "out", num_samples=3)
    bad = {"c-mara/1/2", "c-teo/0/0"}

    def fault(item: WorkItem, attempt: int) -> Exception | None:
        return RequestError("no luck") if item.key in bad else None

    outcome = run_fake(model, job, fault=fault)
    assert outcome.num_failed == 2
    summary = read(tmp_path / "out" / "inference_summary.json")
    assert (summary["failed_samples"], summary["total_samples"]) == (2, 30)
    failed = [s for s in samples_of(tmp_path / "out") if s["finish_reason"] == "error"]
    assert [(s["generated_text"], s["error"]) for s in failed] == [(None, "no luck")] * 2
    filled = read(tmp_path / "out" / "test_leaderboard.json")
    mara = filled[0]["task"]["task_behavior_collections"][0]["data"][1]["continuations"]
    assert mara[2] is None
    assert all(mara[:2])

    assert run_fake(model, job).num_failed == 2, "what failed stays so"
    assert run_fake(model, dataclasses.replace(job, retries_failed=True)).num_failed == 0
    run_fake(model, dataclasses.replace(job, output=tmp_path / "undisturbed"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_a_prompt_that_cannot_be_made_fails_alone(model: Path, tmp_path: Path) -> None:
    folder = write_scenario(
        tmp_path / "data",
        [record([entry(turns(("Ben", "x" * 5000))), entry(turns(("Ben", "a" * 3000), ("Ben", "b" * 2000)))])],
    )
    outcome = run_fake(model, options(model, tmp_path / "out", num_samples=2), read_scenario(folder))
    assert outcome.num_failed == 2
    summary = outcome.summary
    assert summary is not None
    assert (summary["failed_samples"], summary["truncated_prompts"]) == (2, 1)
    samples = read(tmp_path / "out" / "u1.json")["generated_samples"]
    assert "raise --max-model-len" in samples[0]["error"]
    assert samples[2]["generated_text"]


def test_cleaning_stands_beside_what_was_generated(model: Path, tmp_path: Path) -> None:
    job = options(model, tmp_path / "out", num_samples=1)
    run_fake(model, job)
    before = samples_of(tmp_path / "out")
    # Once more with --clean: no sample is made again, and no model is loaded for it.
    outcome = run_fake(model, dataclasses.replace(job, cleans=True), fault=lambda *_: RuntimeError())
    assert outcome.run is None
    after = samples_of(tmp_path / "out")
    assert [{**s, "cleaned_text": None} for s in before] == [{**s, "cleaned_text": None} for s in after]
    assert all(sample["cleaned_text"] for sample in after)


def test_a_folder_of_another_job_is_refused(model: Path, tmp_path: Path) -> None:
    job = options(model, tmp_path / "out", num_samples=1)
    run_fake(model, job)
    before = files_of(tmp_path / "out")
    changes: dict[str, Any] = {"seed": 43, "num_samples": 2, "max_items": 3, "temperature": 0.5}
    for name, value in changes.items():
        with pytest.raises(ConfigError, match="another job"):
            run_fake(model, options(model, tmp_path / "out", **{"num_samples": 1, name: value}))
    with pytest.raises(ConfigError, match="scenario_sha256"):
        run_fake(model, job, example("DMSC"))
    assert files_of(tmp_path / "out") == before
    # Where the user says so, what was there goes, the files of users who are not in the new one too.
    small = dataclasses.replace(job, max_items=4, overwrite=True)
    run_fake(model, small)
    assert "c-mara.json" in files_of(tmp_path / "out")
    assert "c-teo.json" not in files_of(tmp_path / "out")


def test_what_is_not_ours_is_not_written_over(model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "inference_summary.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a inference_summary\.json and no samples\.jsonl"):
        run_fake(model, options(model, foreign))
    folder = write_scenario(tmp_path / "data", [record([entry(turns(("Ben", "hi")))])])
    with pytest.raises(ConfigError, match="is the scenario itself"):
        run_fake(model, options(model, folder, overwrite=True), read_scenario(folder))
    assert read(folder / "test_leaderboard.json")
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        run_fake(model, options(model, tmp_path / "out", max_tokens=5000))


def test_an_ablation_that_leaves_nothing_to_do_is_refused(model: Path, tmp_path: Path) -> None:
    folder = write_scenario(tmp_path / "data", [record([entry([])])])
    with pytest.raises(ConfigError, match="none of the 1 items"):
        run_fake(model, options(model, tmp_path / "out"), read_scenario(folder))


def test_names_of_users_never_leave_the_folder() -> None:
    assert user_file_name("abc-1.2_X") == "abc-1.2_X.json"
    names = [
        user_file_name(name)
        for name in ("../up", "a/b", "a b", "", ".", "日本", "x" * 500, "inference_summary")
    ]
    assert len(set(names)) == len(names)
    assert all("/" not in name and not name.startswith(".") and len(name) < 140 for name in names)
    assert "inference_summary.json" not in names


def test_a_checkpoint_is_known_by_its_contents(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert fingerprint(copy) == fingerprint(model)
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert fingerprint(copy) != fingerprint(model)


def test_stopped_and_started_again(model: Path, tmp_path: Path) -> None:
    job = options(model, tmp_path / "out")
    first = 12

    async def until_stopped() -> Any:
        stop = asyncio.Event()
        count = 0

        def delay(item: WorkItem) -> float:
            nonlocal count
            count += 1
            if count == first:
                stop.set()
            return 0.0 if count < first else 1e6

        async def load(with_length: PersonaOptions, path: Path) -> PersonaEngine:
            return fake_engine(model, with_length, delay=delay)

        task = asyncio.ensure_future(run_persona(job, example(), stop, load=load))
        await stop.wait()
        while len((job.output / "samples.jsonl").read_bytes().splitlines()) < first - 1:
            await asyncio.sleep(0.01)
        task.cancel()  # a second Ctrl-C, not to wait for what never ends
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(until_stopped())
    assert not (job.output / "inference_summary.json").exists()
    told: list[str] = []

    async def load(with_length: PersonaOptions, path: Path) -> PersonaEngine:
        return fake_engine(model, with_length)

    outcome = asyncio.run(run_persona(job, example(), tell=told.append, load=load))
    assert outcome.run is not None
    assert outcome.run["items"] == 50 - (first - 1), "nothing is made twice"
    assert told[0] == "11 samples are there already, 39 are left"
    run_fake(model, dataclasses.replace(job, output=tmp_path / "undisturbed"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_killed_and_started_again(model: Path, tmp_path: Path) -> None:
    """kill -9 at random moments; what ends at last is what an undisturbed run ends with."""
    command = [
        sys.executable,
        "-m",
        "tests.batch.persona.fake_job",
        str(model),
        str(tmp_path / "out"),
        "0.02",
    ]
    source = random.Random(5)
    journal = tmp_path / "out" / "samples.jsonl"
    for goal in (7, 23):
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= goal:
                break
            time.sleep(0.002)
        time.sleep(source.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was still at work"
    lines = journal.read_bytes()
    # As if the power had failed in the middle of a line.
    journal.write_bytes(lines[: lines.rindex(b"\n") - 30])
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    run_fake(model, options(model, tmp_path / "undisturbed", num_samples=5))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    summary = read(tmp_path / "out" / "inference_summary.json")
    assert summary["num_runs"] == 3
    assert summary["energy"]["joules"] is None
    assert "killed" in summary["energy"]["reason"]
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({each["key"] for each in records}) == len(records) == 50, "no sample was made twice"
