"""What a request, and the engine, report about speculation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.outputs import RequestOutput, SpeculationMetrics
from tests.checkpoints import make_checkpoint

PROMPTS = ["one two one two one two one two", "the cat and the hat and the cat and", "in the end", "a"]
GREEDY = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


def run(
    folder: Path, count: Any, params: SamplingParams = GREEDY, **more: Any
) -> tuple[list[RequestOutput], SpeculationMetrics]:
    speculative = {"method": "prompt_lookup", "num_speculative_tokens": count}
    options = {"dtype": "float32", "kv_cache_memory": "8MB", "speculative": speculative, **more}
    with LLM(str(folder), **options) as llm:
        outputs = llm.generate(PROMPTS * 2, params, use_tqdm=False)
        total = llm._engine_parts().engine.speculation
    assert total is not None
    return outputs, total


def of(output: RequestOutput) -> SpeculationMetrics:
    assert output.metrics is not None
    assert output.metrics.speculation is not None
    return output.metrics.speculation


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("count", [3, "auto"])
def test_the_requests_add_up_to_the_total(folder: Path, count: Any, depth: int) -> None:
    outputs, total = run(folder, count, pipeline_depth=depth)
    every = [of(output) for output in outputs]
    assert total.drafted == sum(one.drafted for one in every)
    if count == "auto" and not total.drafted:
        return  # nothing pays in a model this small on a slow day
    assert total.drafted > 0
    assert total.accepted == sum(one.accepted for one in every)
    assert total.num_steps == sum(one.num_steps for one in every)
    for position, drafted in enumerate(total.drafted_by_position):
        columns = [one.drafted_by_position[position : position + 1] or [0] for one in every]
        assert drafted == sum(value for (value,) in columns)
    assert total.verify_seconds > 0
    assert total.draft_seconds > 0
    # A step that was read after the request's own end is in the total alone.
    verifying, drafting = sum(one.verify_seconds for one in every), sum(one.draft_seconds for one in every)
    assert 0.5 * total.verify_seconds < verifying <= 1.001 * total.verify_seconds
    assert 0.5 * total.draft_seconds < drafting <= 1.001 * total.draft_seconds
    assert total.net_speedup is not None
    for output, one in zip(outputs, every, strict=True):
        assert one.net_speedup is not None
        assert 0.05 < one.net_speedup < 20
        assert not one.synthetic
        assert "SYNTHETIC" not in repr(output) + repr(output.metrics)
        assert output.metrics is not None
        assert output.metrics.e2e is not None
        assert 0 <= one.verify_seconds + one.draft_seconds <= output.metrics.e2e
        assert len(output.outputs[0].token_ids) == 1 + one.num_steps + one.accepted


def test_without_speculation_nothing_is_reported(folder: Path) -> None:
    with LLM(str(folder), dtype="float32", kv_cache_memory="8MB") as llm:
        (output,) = llm.generate("a", GREEDY, use_tqdm=False)
        assert llm._engine_parts().engine.speculation is None
    assert output.metrics is not None
    assert output.metrics.speculation is None


def test_what_the_token_budget_cuts_is_counted(folder: Path) -> None:
    outputs, total = run(folder, 4, max_num_batched_tokens=12)
    assert total.num_cut == sum(of(output).num_cut for output in outputs) > 0
    params = GREEDY.replace(trace=True)
    outputs, total = run(folder, 4, params, max_num_batched_tokens=12)
    steps = [step for output in outputs for step in of(output).steps or []]
    cut = [step for step in steps if "cut by the token budget" in step.reason]
    assert cut
    assert all(step.num_speculative_tokens < 4 for step in cut)
    assert any("of 4" in step.reason for step in cut)
    outputs, total = run(folder, 4)
    assert total.num_cut == 0


def test_samples_are_reported_together(folder: Path) -> None:
    params = GREEDY.replace(temperature=0.4, n=3, seed=1)
    outputs, total = run(folder, 3, params)
    for output in outputs:
        tokens = sum(len(answer.token_ids) for answer in output.outputs)
        assert tokens == 3 + of(output).num_steps + of(output).accepted
    assert total.drafted == sum(of(output).drafted for output in outputs)


def test_an_aborted_request_reports_what_it_has(folder: Path) -> None:
    speculative = {"method": "prompt_lookup", "num_speculative_tokens": 3}
    with LLM(str(folder), dtype="float32", kv_cache_memory="8MB", speculative=speculative) as llm:
        engine = llm._engine_parts().engine
        engine.add_request("x", PROMPTS[0], GREEDY)
        for _ in range(8):
            engine.step()
        output = engine.abort("x")
    assert output is not None
    assert of(output).num_steps >= 6
    assert of(output).net_speedup is not None
