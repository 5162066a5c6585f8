"""`octavo batch` from the command line, with a model that is there and one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.batch import workers
from octavo.cli import main as cli_main
from tests.batch.fakes import FakeWorkers
from tests.batch.normal import completion, write_lines
from tests.checkpoints import make_checkpoint

NAMED = ("--served-model-name", "fake")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint, which is looked at before it is loaded."""
    return str(make_checkpoint(tmp_path_factory.mktemp("m")))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], int]]:
    """Engine options and replicas of every model that is loaded; it is a fake."""
    calls: list[tuple[dict[str, Any], int]] = []

    async def open_workers(kwargs: dict[str, Any], *, data_parallel_size: int, log_level: str) -> FakeWorkers:
        calls.append((kwargs, data_parallel_size))
        return FakeWorkers()

    monkeypatch.setattr(workers, "open_workers", open_workers)
    return calls


def test_vllms_spelling_works_and_the_code_says_whether_all_succeeded(
    tmp_path: Path, model: str, opened: list[tuple[dict[str, Any], int]], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [completion("a"), completion("b")])
    target = tmp_path / "out.jsonl"
    arguments = ["batch", "openai", "-i", str(source), "-o", str(target), "--model", model, *NAMED]
    more = ["--data-parallel-size", "2", "--max-num-seqs", "4", "--dtype", "float32"]
    assert cli_main.main([*arguments, *more]) == 0
    assert opened == [({"model": model, "max_num_seqs": 4, "dtype": "float32"}, 2)]
    assert "2 of 2 requests have their result" in capsys.readouterr().err
    assert {json.loads(line)["custom_id"] for line in target.read_text().splitlines()} == {"a", "b"}
    # Other limits are the same job, other results are not.
    assert cli_main.main([*arguments, "--dtype", "float32", "--max-num-seqs", "8"]) == 0
    assert cli_main.main(arguments) == 2
    assert "dtype" in capsys.readouterr().err
    assert len(opened) == 1
    write_lines(source, ["{"])
    assert cli_main.main([*arguments, "--overwrite", "--quiet"]) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["openai"], 2, "Missing option"),
        (["openai", "-i", "none.jsonl", "-o", "out.jsonl"], 2, "none.jsonl cannot be read: No such file"),
        (["openai", "-i", "x", "-o", "y", "--engine-seed", "1"], 2, "use --seed"),
        (["openai", "-i", "x", "-o", "y", "--overwrite", "--retry-failed"], 2, "leave --retry-failed out"),
        (["openai", "-i", "x", "-o", "y", "--data-parallel-size", "0"], 2, "at least 1"),
        (["openai", "-i", "x", "-o", "y", "--dtype", "int3"], 2, "int3"),
        (["openapi"], 2, "Did you mean openai?"),
        (["check", "none", "none"], 2, "no such file or folder"),
        (["check", "none", "none", "--dtype", "float32"], 2, "give --model"),
    ],
)
def test_wrong_usage_is_one_readable_block(
    arguments: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli_main.main(["batch", *arguments]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main.main(["batch", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("openai", "persona", "check"))
    for name in ("openai", "check"):
        assert cli_main.main(["batch", name, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out


def test_check_compares_two_results(
    tmp_path: Path, model: str, opened: list[tuple[dict[str, Any], int]], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in", [completion("a"), completion("b", seed=3)])
    for name, seed in (("one", "1"), ("two", "1"), ("other", "2")):
        run = ["batch", "openai", "-i", str(source), "-o", str(tmp_path / name), "--model", model, *NAMED]
        assert cli_main.main([*run, "--seed", seed, "--quiet"]) == 0
    assert cli_main.main(["batch", "check", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "the same: 2 of 2 pairs are equal" in capsys.readouterr().out
    assert cli_main.main(["batch", "check", str(tmp_path / "one"), str(tmp_path / "other")]) == 1
    shown = capsys.readouterr().out
    assert "setting seed: 1 in A, 2 in B" in shown
    assert 'custom_id "a": seed' in shown
    assert "1 of 2 pairs are equal" in shown
    assert cli_main.main(["batch", "check", "--json", str(tmp_path / "one"), str(tmp_path / "other")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"seed": 1}
    assert cli_main.main(["batch", "check", str(tmp_path / "one"), str(tmp_path)]) == 2
    (tmp_path / "nothing").touch()
    capsys.readouterr()
    assert cli_main.main(["batch", "check", str(tmp_path / "nothing"), str(tmp_path / "nothing")]) == 2
    assert "there is nothing to compare" in capsys.readouterr().err
