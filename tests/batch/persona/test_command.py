"""`octavo batch persona` as it is typed, and the scripts that stand for it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from octavo.cli.main import main
from tests.batch.persona.jobs import files_of, read, small_model
from tests.batch.persona.records import entry, record, turns, write_scenario

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples" / "persona"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def flags(model: Path, output: Path, **changes: str) -> list[str]:
    given = {
        "checkpoint-dir": str(model),
        "dataset": "Chameleons",
        "ablation-config": "context_only",
        "output-dir": str(output),
        "data-root": str(EXAMPLES),
        "max-tokens": "4",
        "num-samples": "1",
        "device": "cpu",
        "kv-cache-memory": "16MB",
        **changes,
    }
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def test_done_is_0_and_again_there_is_nothing_to_do(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["batch", "persona", *flags(model, tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "10 samples of 10 items" in said
    assert "1 skipped, having no context" in said
    before = files_of(tmp_path / "out")
    assert main(arguments) == 0
    assert "nothing was left to do" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before


def test_malformed_records_are_told_and_the_code_is_1(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps(record([entry(turns(("Ben", "hi")))]))
    folder = write_scenario(tmp_path / "data", f'{good}\n{{"user_hash": 3\n{good}\n')
    arguments = flags(model, tmp_path / "out")
    assert main(["batch", "persona", *arguments, "--scenario-path", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "left out: test_leaderboard.json, line 2 (record 1): not valid JSON" in said
    assert "2 samples of 2 items" in said
    assert read(tmp_path / "out" / "inference_summary.json")["malformed_items"] == 1


WRONG = {
    "dataset": ("Chamelons", ["Did you mean Chameleons?", "REALTALK", "DMSC"]),
    "ablation-config": ("context", ["context_only", "profile_and_history_and_context"]),
    "data-root": ("nowhere", ["nowhere/Chameleons", "RealSelf", "examples/persona/Chameleons"]),
    "temperature": ("-1", ["temperature must be a number"]),
    "batch-size": ("4", ["--batch-size is for --engine transformers"]),
    "max-tokens": ("100000", ["leaves no room for a prompt"]),
    "engine-seed": ("1", ["use --seed"]),
}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_usage_is_2_and_says_what_to_change(
    flag: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, expected = WRONG[flag]
    assert main(["batch", "persona", *flags(model, tmp_path / "out", **{flag: value})]) == 2
    said = capsys.readouterr().err
    assert all(each in said for each in expected), said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_the_data_root_of_the_environment(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCTAVO_DATA_ROOT", str(tmp_path / "from-environment"))
    arguments = flags(model, tmp_path / "out")
    at = arguments.index("--data-root")
    assert main(["batch", "persona", *arguments[:at], *arguments[at + 2 :]]) == 2
    assert str(tmp_path / "from-environment" / "Chameleons") in capsys.readouterr().err


def test_greedy_samples_are_said_to_be_equal(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(model, tmp_path / "out", temperature="0", **{"num-samples": "2", "max-items": "1"})
    assert main(["batch", "persona", *arguments]) == 0
    assert "the 2 samples of an item are the same" in capsys.readouterr().err


def run_script(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False, timeout=600
    )


def test_the_old_spelling_is_the_same_command(model: Path, tmp_path: Path) -> None:
    arguments = flags(model, tmp_path)
    arguments[::2] = ["--" + flag[2:].replace("-", "_") for flag in arguments[::2]]
    assert "--checkpoint_dir" in arguments
    done = run_script(sys.executable, "inference_vllm.py", *arguments, "--max_items", "2")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "inference_summary.json")["num_items"] == 2


def test_recipes(model: Path, tmp_path: Path) -> None:
    variables = {"CHECKPOINT_DIR": str(model), "OUTPUT_ROOT": str(tmp_path), "PYTHON": sys.executable}
    quick = ("--max_tokens", "2", "--max_items", "1", "--device", "cpu", "--kv_cache_memory", "16MB")
    done = run_script("bash", "inference_with_vllm.sh", "quick", *quick, **variables)
    assert done.returncode == 0, done.stderr
    summary = read(tmp_path / "Chameleons_quick" / "inference_summary.json")
    assert (summary["num_samples_per_item"], summary["ablation_config"]) == (1, "context_only")
    wrong = run_script("bash", "inference_with_vllm.sh", "quicker", **variables)
    assert wrong.returncode == 2
    assert "quick, production, quality" in wrong.stderr


@pytest.mark.slow
def test_killed_ten_times(model: Path, tmp_path: Path) -> None:
    """The whole command, killed at random moments; its files end as those of an undisturbed run."""
    changes = {
        "num-samples": "30",
        "max-tokens": "64",
        "max-num-seqs": "16",
        "ablation-config": "history_only",
    }
    command = [sys.executable, "-m", "octavo", "batch", "persona", "--ignore-eos", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    source = random.Random(11)
    journal = tmp_path / "out" / "samples.jsonl"

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    for _ in range(10):
        goal = lines() + source.randrange(1, 20)
        disturbed = [*command, *flags(model, tmp_path / "out", **changes)]
        process = subprocess.Popen(disturbed, cwd=ROOT, env=environment)
        while process.poll() is None and lines() < goal:
            time.sleep(0.01)
        time.sleep(source.random() * 0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was still at work"
    for folder in ("out", "undisturbed"):
        done = run_script(*command, *flags(model, tmp_path / folder, **changes))
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    assert read(tmp_path / "out" / "inference_summary.json")["num_runs"] == 11


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["production", "quality"])
def test_the_other_recipes(recipe: str, model: Path, tmp_path: Path) -> None:
    variables = {"CHECKPOINT_DIR": str(model), "OUTPUT_ROOT": str(tmp_path), "PYTHON": sys.executable}
    quick = ("--max_tokens", "2", "--max_items", "1", "--device", "cpu", "--kv_cache_memory", "16MB")
    done = run_script("bash", "inference_with_vllm.sh", recipe, *quick, **variables)
    assert done.returncode == 0, done.stderr
    summary = read(tmp_path / f"Chameleons_{recipe}" / "inference_summary.json")
    assert summary["total_samples"] == 5
    assert summary["sampling_params"]["temperature"] == (1.0 if recipe == "production" else 0.8)


@pytest.mark.slow
def test_the_baseline_plainly_and_under_torchrun(model: Path, tmp_path: Path) -> None:
    arguments = ["--max_items", "2", "--max_tokens", "4", "--device", "cpu", "--data_root", str(EXAMPLES)]
    arguments += [
        "--checkpoint_dir",
        str(model),
        "--dataset",
        "Chameleons",
        "--ablation_config",
        "context_only",
    ]
    plain = run_script(
        sys.executable, "inference_distributed.py", *arguments, "--output_dir", str(tmp_path / "plain")
    )
    assert plain.returncode == 0, plain.stderr
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    ranks = run_script(
        *torchrun, "inference_distributed.py", *arguments, "--output_dir", str(tmp_path / "ranks")
    )
    assert ranks.returncode == 0, ranks.stderr
    summary = read(tmp_path / "ranks" / "inference_summary.json")
    assert summary["engine"] == "transformers"
    assert summary["data_parallel_size"] == 2
    here, there = (files_of(tmp_path / name) for name in ("plain", "ranks"))
    assert here["c-mara.json"] == there["c-mara.json"]
