"""`octavo verify` on a small checkpoint: what is equal passes, what is not is found and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.verify_runs import NEAR_TIE, Cost, Difference, Run, Verdict, bundled_prompts
from octavo.sampling import sampler
from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Cli

SMALL = ["--dtype", "float32", "--kv-cache-memory", "8MB", "--num-prompts", "10", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("the cat and the hat and the\n\none two one two one\nin the end\n", encoding="utf-8")
    return file


def verify(cli: Cli, folder: Path, prompts: Path, *more: str) -> tuple[int, dict[str, Any]]:
    result = cli("verify", str(folder), *SMALL, "--prompts", str(prompts), "--json", *more)
    return result.code, json.loads(result.out) if result.out else {}


def test_equal_texts_pass(cli: Cli, folder: Path, prompts: Path) -> None:
    code, record = verify(cli, folder, prompts)
    assert code == 0
    assert record["passed"]
    assert record["requirement"] == "near-ties"
    runs = {(run["drafter"], run["batch"], run["mode"]) for run in record["runs"]}
    every = {
        (d, b, m)
        for d in ("prompt_lookup", "suffix", "predicted")
        for b in (1, 8, 64)
        for m in ("greedy", "sampled")
    }
    assert runs == every | {("none", b, m) for b in (8, 64) for m in ("greedy", "sampled")}
    assert all(run["num_prompts"] == (8 if run["batch"] == 1 else 10) for run in record["runs"])
    assert all(run["num_tokens"] == 12 * run["num_prompts"] for run in record["runs"])
    assert set(record["unproven"]) <= {"prompt_lookup"}  # so short a text need not repeat itself


def test_draft_models_are_checked_too(cli: Cli, folder: Path, prompts: Path) -> None:
    code, record = verify(
        cli, folder, prompts, "--draft", str(folder), "--method", "draft_model", "--method", "hybrid"
    )
    assert code == 0
    assert {run["drafter"] for run in record["runs"]} == {"none", "draft_model", "hybrid"}
    drafted = [run for run in record["runs"] if run["drafter"] == "draft_model"]
    assert all(run["accepted"] > 0.9 * run["drafted"] > 0 for run in drafted)  # it drafts for itself


def test_deterministic_must_be_equal_and_says_what_it_costs(cli: Cli, folder: Path, prompts: Path) -> None:
    code, record = verify(cli, folder, prompts, "--deterministic", "--method", "prompt_lookup")
    assert code == 0
    assert record["requirement"] == "bits"
    assert [cost["batch"] for cost in record["deterministic_cost"]] == [1, 8, 64]
    assert all(cost["plain"] > 0 and cost["slowdown"] < 1 for cost in record["deterministic_cost"])
    result = cli(
        "verify", str(folder), *SMALL, "--prompts", str(prompts), "--deterministic", "--method", "ngram"
    )
    assert result.code == 0
    assert "deterministic costs" in result.out
    assert "all " in result.out
    assert "tokens are equal (float32, deterministic)" in result.out


def sabotage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of many rows draw another token now and then: what batching must not do."""
    draw = sampler.Sampler.draw

    def wrong(self: Any, logits: Any, batch: Any) -> Any:
        drawn = draw(self, logits, batch)
        if len(logits) > 6:
            drawn.tokens[5] = (drawn.tokens[5] + 1) % logits.shape[1]
        return drawn

    monkeypatch.setattr(sampler.Sampler, "draw", wrong)


def test_a_changed_token_is_found(
    cli: Cli, folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    code, record = verify(cli, folder, prompts, "--method", "predicted")
    assert code == 1
    assert not record["passed"]
    by_batch = {
        (run["drafter"], run["batch"]): run["differences"]
        for run in record["runs"]
        if run["mode"] == "greedy"
    }
    assert by_batch["predicted", 1] == []  # five rows at most
    assert by_batch["none", 8]
    for difference in by_batch["none", 8]:
        assert difference["logit_gap"] > NEAR_TIE
        assert difference["expected"] != difference["found"]
    sampled = next(r for r in record["runs"] if r["mode"] == "sampled" and r["differences"])
    assert all(d["score_gap"] > 0 for d in sampled["differences"])  # it was the greatest score
    result = cli("verify", str(folder), *SMALL, "--prompts", str(prompts), "--method", "predicted")
    assert result.code == 1
    assert "FAILED" in result.out
    assert "logit gap +" in result.out
    assert "score gap +" in result.out


def test_where_rows_depend_on_each_other_differences_are_reported(
    cli: Cli, folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    arguments = [str(folder), *SMALL, "--prompts", str(prompts), "--method", "prompt_lookup"]
    arguments += ["--dtype", "bfloat16", "--attention-backend", "torch", "--max-tokens", "4"]
    result = cli("verify", *arguments)
    assert result.code == 0
    assert "fell the other way" in result.out
    assert "no failure" in result.out
    record = json.loads(cli("verify", *arguments, "--json").out)
    assert record["requirement"] == "reported"
    assert record["passed"]
    assert any(run["flip_rate"] > 0 for run in record["runs"])


def test_what_must_be_equal() -> None:
    near, far = Difference(0, 3, 1, 2, 5e-4), Difference(0, 3, 1, 2, 0.5)
    sampled = Difference(0, 3, 1, 2, -0.5, 4e-4)  # a tie once the noise is added
    unknown = Difference(0, 3, 1, 2)
    runs = [Run("none", 8, "greedy", 4, 100, differences=[near, far, sampled, unknown])]
    assert runs[0].flip_rate == 0.04
    for requirement, failures in (("bits", 4), ("near-ties", 2), ("reported", 0)):
        assert len(Verdict("float32", False, requirement, runs).failures) == failures  # type: ignore[arg-type]


def test_a_drafter_that_accepted_nothing_proves_nothing() -> None:
    runs = [Run("suffix", 1, "greedy", 4, accepted=0), Run("predicted", 1, "greedy", 4, accepted=3)]
    assert Verdict("float32", False, "bits", runs).unproven == ["suffix"]
    assert Cost(1, 100.0, 97.0).slowdown == pytest.approx(0.03)


def test_the_bundled_prompts_differ() -> None:
    assert len(set(bundled_prompts(64))) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "draft_model"], "needs --draft"),
        (["--speculative-config", "{}"], "makes its own"),
        (["--method", "magic"], "not one of"),
        (["--num-prompts", "0"], "0 is not in the range"),
    ],
)
def test_wrong_usage(cli: Cli, folder: Path, prompts: Path, arguments: list[str], message: str) -> None:
    result = cli(
        "verify",
        str(folder),
        "--num-prompts",
        "1",
        "--max-tokens",
        "1",
        "--prompts",
        str(prompts),
        *arguments,
    )
    assert result.code == 2
    assert message in result.err


def test_prompts_that_are_no_text(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.bin"
    file.write_bytes(b"one\n\xff\n")
    result = cli("verify", "m", "--prompts", str(file))
    assert result.code == 1
    assert f"{file} is not UTF-8 text: byte 0xff in line 2" in result.err


def test_an_unknown_drafter_is_refused_before_the_reference(cli: Cli) -> None:
    result = cli("verify", "m", "--method", "nosuch")
    assert result.code == 2
    assert "'nosuch' is not one of draft_model" in result.err
    assert "reference" not in result.err
