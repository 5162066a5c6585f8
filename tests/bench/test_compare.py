"""`octavo compare`: runs in processes of their own, outputs checked, one report; and what it refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo.bench import compare, compare_child
from octavo.bench.prompts import load_prompts, parse_source
from octavo.bench.record import load, save
from octavo.bench.rendering import Renderer
from octavo.bench.spec import LoadSpec, RunSpec, SamplingSpec
from octavo.cli.main import main
from tests.bench.fake_results import fake_result
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=True))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    texts = ("one", "the other the other the other the", "and on and on")
    path.write_text("".join(json.dumps({"id": t[:3], "prompt": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def flags(model: str, prompts: str) -> list[str]:
    return ["--model", model, "--prompts", prompts, "--num-prompts", "3", "--dtype", "float32",
            "--device", "cpu", "--max-tokens", "24", "--ignore-eos", "--engine-option", "kv_cache_memory=4MB",
            "--engine-option", "max_num_seqs=4", "--warmup", "1", "--no-monitor", "--quiet"]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Jobs are done by the child's own code, but here: a process that loads torch takes seconds."""
    import pickle

    kinds: list[str] = []
    monkeypatch.setattr("octavo.bench.metrics.LAG_LIMIT", 60.0)  # a busy machine is no failure of this test
    monkeypatch.setattr("octavo.bench.utilisation.Ceiling.measure", lambda options: None)  # takes seconds

    def do(job: dict[str, Any]) -> str | None:
        kinds.append(job["kind"])
        task, answer = tmp_path / "job.pickle", tmp_path / "answer.json"
        task.write_bytes(pickle.dumps({**job, "answer": answer}))
        compare_child.main(str(task))
        job["told"] = json.loads(answer.read_text(encoding="utf-8"))
        error = job["told"].get("error")
        return None if error is None else str(error)

    monkeypatch.setattr(compare, "_in_process", do)
    return kinds


def test_engines_and_methods_say_the_same(
    model: str, prompts: str, here: Path, in_this_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["compare", "--engine", "octavo", "--engine", "transformers", "--require-equal",
                 "--output", "c.json", *flags(model, prompts)])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0, out
    assert in_this_process == ["run"] * 4
    assert "kv_cache_memory, max_num_seqs" in load(here / "c_target_ar.json").warnings[0]
    assert out.count("all 3 equal") == 3
    names = ("c_target_ar_octavo", "c_prompt_lookup_octavo", "c_target_ar", "c_prompt_lookup")
    results = [load(here / f"{name}.json") for name in names]
    digests = {result.effective_config["prompts"]["digest"] for result in results}
    assert len(digests) == 1
    assert len({tuple(r.output_token_ids or ()) for result in results for r in result.requests}) == 3
    summary = json.loads((here / "c.json").read_text(encoding="utf-8"))
    assert [each["all_equal"] for each in summary["comparisons"]] == [True] * 3
    assert summary["runs"][0]["overall_throughput"] > 0
    assert "Do the outputs agree?" in (here / "c.html").read_text(encoding="utf-8")
    # Once more into the same files, and against one of them as the baseline.
    assert main(["compare", "--engine", "octavo", "--output", "c.json", *flags(model, prompts)]) == 2
    assert "exists already" in capsys.readouterr().err
    code = main(
        ["compare", "--baseline", "c_target_ar.json", "c_target_ar_octavo.json", "--output", "d.json"]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "transformers target_ar (baseline)" in out
    assert "all 3 equal" in out
    assert (here / "d.html").exists()


def test_the_gap_where_outputs_part_is_the_models(
    model: str, prompts: str, tmp_path: Path, in_this_process: list[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": "float32", "device": "cpu", "kv_cache_memory": "4MB", "max_num_seqs": 4}
    spec = RunSpec(model=model, engine_options=options, sampling=SamplingSpec(max_tokens=8, ignore_eos=True),
                   load=LoadSpec("closed", num_prompts=3), warmup_requests=0, monitor=False)  # fmt: skip
    chosen = load_prompts(parse_source(prompts), count=None, seed=0)
    planned = [compare.Planned(spec, tmp_path / "a.json")]
    results, _, not_run = compare.run_all(planned, chosen, force=False, quiet=True, tell=lambda _: None)
    assert not not_run
    other = load(tmp_path / "a.json")
    changed = other.requests[1]
    assert changed.output_token_ids is not None
    truth = changed.output_token_ids[5]
    changed.output_token_ids[5] = (truth + 1) % 60
    comparisons = compare.compare_results([results[0], other], prompts=chosen, spec=compare.gap_spec([spec]))
    difference = comparisons[0].differences[0]
    assert (difference.position, difference.expected, difference.found) == (5, truth, (truth + 1) % 60)

    prompt = next(each for each in chosen if each.prompt_id == changed.prompt_id)
    request = Renderer.of(spec).requests(spec, [prompt], None)[0][0]
    before = [*(request.prompt_token_ids or ()), *changed.output_token_ids[:5]]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([before])).logits[0, -1]
    assert difference.logit_gap == pytest.approx(float(logits[truth] - logits[(truth + 1) % 60]), abs=1e-3)
    assert difference.logit_gap is not None
    assert difference.logit_gap > 0


def test_a_run_that_cannot_be_made_is_reported_and_the_others_go_on(
    model: str, prompts: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def do(job: dict[str, Any]) -> str | None:
        if job["spec"].method == "prompt_lookup":
            return "it fell over"
        save(fake_result(), job["path"])
        return None

    monkeypatch.setattr(compare, "_in_process", do)
    assert main(["compare", "--output", "c.json", *flags(model, prompts)]) == 1
    assert "NOT MEASURED: octavo prompt_lookup: it fell over" in capsys.readouterr().out
    assert "it fell over" in (here / "c.html").read_text(encoding="utf-8")
    monkeypatch.setattr(compare, "_in_process", lambda job: "nor this one")
    assert main(["compare", "--output", "e.json", *flags(model, prompts)]) == 2
    assert "not one run could be made" in capsys.readouterr().err


class _Exits:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (3,)


def test_a_process_that_dies_or_raises_leaves_a_reason() -> None:
    assert "ended with code 3 and left no answer" in str(
        compare._in_process({"kind": "run", "spec": _Exits()})
    )
    assert "KeyError" in str(compare._in_process({"kind": "gaps"}))


def test_unequal_outputs_fail_only_where_they_must_be_equal(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(fake_result(), here / "a.json")
    save(fake_result("transformers", differ=(2,)), here / "b.json")
    assert main(["compare", "a.json", "b.json", "--output", "c.json"]) == 0
    assert "1 of 12 differ" in capsys.readouterr().out
    assert main(["compare", "a.json", "b.json", "--output", "d.json", "--require-equal"]) == 1
    plain = json.loads((here / "d.json").read_text(encoding="utf-8"))["comparisons"][0]
    assert plain["differences"][0]["gap_reason"] == "not measured"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json"], "nothing to compare"),
        (["a.json", "a.json", "--max-tokens", "3"], "nothing is run"),
        (["missing.json", "a.json"], "no result file missing.json"),
        (["--engine", "octvo"], "did you mean octavo"),
        (["--method", "magic"], "magic"),
        (["--engine", "url=ftp://x"], "must be like http"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
        (["--rate", "0"], "none would ever come"),
        (["--output", "no/such/c.json"], "does not exist"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    def never(job: dict[str, Any]) -> str | None:
        raise AssertionError("something was run")

    monkeypatch.setattr(compare, "_in_process", never)
    save(fake_result(), here / "a.json")
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_two_runs_of_one_name_get_files_of_their_own(tmp_path: Path) -> None:
    specs = [RunSpec(engine="url", url=f"http://127.0.0.1:{port}", tokenizer=None) for port in (1, 2, 3)]
    names = [item.path.name for item in compare.plan(specs, tmp_path / "c.json", force=False)]
    assert names == ["c_target_ar_url.json", "c_target_ar_url-2.json", "c_target_ar_url-3.json"]
    assert compare.gap_spec(specs) is None
    mixed = compare.gap_spec([*specs, replace(specs[0], engine="octavo", method="prompt_lookup", url=None)])
    assert mixed is not None
    assert (mixed.engine, mixed.method) == ("octavo", "target_ar")


@pytest.mark.slow
def test_in_real_processes(model: str, prompts: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["compare", "--engine", "octavo", "--engine", "transformers", "--require-equal",
                 *flags(model, prompts)])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert (here / "comparison.html").exists()
