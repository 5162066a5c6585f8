"""The real engines on a tiny checkpoint: the same tokens from each, and figures that belong together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import octavo
from octavo.bench.prompts import Prompt
from octavo.bench.record import RunResult
from octavo.bench.runner import run
from octavo.bench.spec import BatchSpec, LoadSpec, RunSpec, SamplingSpec
from octavo.bench.utilisation import Ceiling
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS = 32
# The second repeats itself, so that prompt lookup has something to find.
PROMPTS = [
    Prompt("short", messages=({"role": "user", "content": "one"},)),
    Prompt("copy", messages=({"role": "user", "content": "the other the other the other the"},)),
    Prompt("text", text="and on and on"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_look_at_the_machine() -> Iterator[None]:
    """The ceiling is measured once, not for every run."""
    ceiling = Ceiling.measure({"dtype": "float32", "device": "cpu"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ceiling, "measure", lambda _: ceiling)
        patch.setattr(Ceiling, "again", lambda self: self)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=True))


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        make_checkpoint(tmp_path_factory.mktemp("drafter"), tokenizer=True, seed=3, num_hidden_layers=1)
    )


def measured(model: str, engine: str, method: str, **more: object) -> RunResult:
    options: dict[str, object] = {"dtype": "float32", "device": "cpu"}
    if engine == "octavo":
        options |= {"kv_cache_memory": "4MB", "max_num_seqs": 4}
    load = more.pop("load", LoadSpec(num_prompts=len(PROMPTS), rate=float("inf")))
    spec = RunSpec(
        engine=engine, method=method, model=model, engine_options=options, load=load,  # type: ignore[arg-type]
        sampling=SamplingSpec(max_tokens=TOKENS, ignore_eos=True), warmup_requests=1, monitor=False, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return run(spec, PROMPTS)


@pytest.fixture(scope="module")
def reference(model: str) -> RunResult:
    result = measured(model, "octavo", "target_ar")
    assert result.failures == []
    return result


def tokens(result: RunResult) -> list[list[int] | None]:
    assert [record.error for record in result.requests] == [None] * len(PROMPTS)
    return [record.output_token_ids for record in result.requests]


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("octavo", "prompt_lookup"),
        ("octavo", "speculative"),
        ("transformers", "target_ar"),
        ("transformers", "prompt_lookup"),
        ("transformers", "speculative"),
    ],
)
def test_all_engines_and_methods_say_the_same(
    model: str, drafter: str, reference: RunResult, engine: str, method: str
) -> None:
    result = measured(model, engine, method, drafter=drafter, num_speculative_tokens=3)
    assert tokens(result) == tokens(reference)
    assert [r.output_sha256 for r in result.requests] == [r.output_sha256 for r in reference.requests]
    assert [r.prompt_tokens for r in result.requests] == [r.prompt_tokens for r in reference.requests]
    summary = result.summary
    assert summary["total_tokens"] == len(PROMPTS) * TOKENS
    for r in result.requests:
        assert sum(count for _, count in r.arrivals) == r.generated_tokens == TOKENS
        assert r.finish_reason == "length"
        assert r.ttft is not None
        assert r.latency is not None
        assert 0 < r.ttft <= r.latency
        assert r.queue_time is not None
        assert r.queue_time <= r.ttft
    if method == "target_ar":
        assert summary["total_drafted"] is None
        assert summary["acceptance_by_position"] == []
        return
    assert summary["total_drafted"] > 0
    assert 0 <= summary["total_accepted"] <= summary["total_drafted"]
    assert len(summary["acceptance_by_position"]) <= 3
    drafted = [r.drafted_by_position for r in result.requests if r.drafted]
    assert sum(map(sum, drafted)) == summary["total_drafted"]
    if engine == "transformers":
        assert result.effective_config["effective_batch_size"] == 1
        assert any("one request at a time" in warning for warning in result.warnings)
        # Each round brings its accepted drafts and one token of the target's own.
        copy = result.requests[1]
        assert copy.num_verifications == len(copy.arrivals)


def test_what_octavo_tells_of_itself(reference: RunResult) -> None:
    engine = reference.engine_metrics
    assert engine["source"] == "the engine"
    assert engine["decode_rows"] >= len(PROMPTS) * (TOKENS - 1)
    # One salt a run is not set: but nobody asked these prompts before, so nothing was found.
    assert engine["prefix_cache"]["hits"] == 0
    used = reference.summary["utilisation"]
    assert used["reason"] is None
    assert used["bandwidth"] > 0
    assert reference.effective_config["engine_version"]
    assert reference.effective_config["load_seconds"] > 0


def test_static_batches_run_together_and_long_prompts_alone(model: str) -> None:
    result = measured(model, "transformers", "target_ar", batch=BatchSpec(size=8, max_length=512))
    assert result.engine_metrics["steps"] == TOKENS  # one batch
    alone = measured(model, "transformers", "target_ar", batch=BatchSpec(size=8, max_length=2))
    assert alone.engine_metrics["steps"] == TOKENS * len(PROMPTS)
    single = measured(model, "transformers", "target_ar", batch=BatchSpec(enabled=False))
    assert single.engine_metrics["steps"] == TOKENS * len(PROMPTS)
    assert tokens(result) == tokens(alone) == tokens(single)


def test_the_drafter_alone(model: str, drafter: str) -> None:
    result = measured(model, "octavo", "drafter_ar", drafter=drafter)
    assert tokens(result) == tokens(measured(drafter, "octavo", "target_ar"))


def test_served_gives_the_same_tokens(model: str, reference: RunResult) -> None:
    result = measured(model, "octavo", "prompt_lookup", served=True, num_speculative_tokens=3)
    assert tokens(result) == tokens(reference)
    assert not result.summary["tokens_estimated"]
    assert result.summary["total_drafted"] > 0  # from usage.speculation
    assert result.effective_config["engine_version"] == octavo.__version__
    assert result.engine_metrics["source"] == "its /metrics page"
    assert result.engine_metrics["decode_rows"] > 0
    # A reader that is behind gets several tokens in one chunk: they are counted all the same.
    assert all(sum(count for _, count in r.arrivals) == TOKENS for r in result.requests)


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path, model: str) -> None:
    from octavo.errors import OctavoError

    broken = make_checkpoint(tmp_path / "broken", tokenizer=True)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(OctavoError, match="ended with code 1 before it was ready"):
        measured(str(broken), "octavo", "target_ar", served=True)


@pytest.mark.slow
def test_startup_is_measured_in_fresh_processes(model: str) -> None:
    from octavo.bench.runner import Silent
    from octavo.bench.startup import measure_startup

    options = {"dtype": "float32", "device": "cpu", "kv_cache_memory": "4MB", "max_num_seqs": 4}
    result = measure_startup(RunSpec(model=model, engine_options=options), Silent())
    assert result.failures == []
    startup = result.summary["startup"]
    assert 0 < startup["imported"]["mean"] < startup["ready"]["mean"] < startup["first_token"]["mean"]
    wrong = measure_startup(RunSpec(model=model, engine_options={**options, "kv_cache_memory": 1}), Silent())
    assert wrong.exit_code == 1
    assert "InsufficientMemoryError" in (wrong.failures[0].error or "")


def test_an_engine_is_imported_only_when_it_is_chosen() -> None:
    code = (
        "import octavo.bench.runner, octavo.bench.targets, octavo.bench.targets.transformers_engine, "
        "octavo.bench.targets.vllm_engine, octavo.cli.bench, sys\n"
        "print([m for m in ('transformers', 'vllm', 'torch', 'aiohttp', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_client_process_loads_no_engine() -> None:
    code = (
        "import octavo.bench.client, sys\n"
        "print([m for m in ('transformers', 'torch', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
