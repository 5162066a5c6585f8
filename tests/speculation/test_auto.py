"""num_speculative_tokens="auto": the budget drafts where it pays, and stops where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo import LLM, SamplingParams
from octavo.core.draft_planner import BudgetPlanner
from tests.checkpoints import make_checkpoint
from tests.speculation.drafters import Noisy

DRAFTERS = "tests.speculation.drafters"
GREEDY = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Large enough that a second row costs little, as in any real model.
    return make_checkpoint(
        tmp_path_factory.mktemp("model") / "m",
        tokenizer=True,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        vocab_size=4000,
        num_attention_heads=8,
        max_position_embeddings=256,
    )


def run(folder: Path, method: str | None, prompts: list[str]) -> tuple[list[list[int]], int, int, float]:
    """Tokens, steps, drafts and the reported net speed-up."""
    speculative = None if method is None else {"method": method}
    with LLM(str(folder), dtype="float32", kv_cache_memory="32MB", speculative=speculative) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        scheduler = llm._engine_parts().engine.scheduler
        speedup = 1.0
        if isinstance(scheduler.planner, BudgetPlanner):
            speedup = scheduler.planner.budget.report.net_speedup
        drafted = sum(o.metrics.speculation.drafted for o in outputs if o.metrics and o.metrics.speculation)
        return [o.outputs[0].token_ids for o in outputs], scheduler.stats.num_steps, drafted, speedup


def test_a_trace_tells_what_was_drafted_and_why(folder: Path) -> None:
    params = GREEDY.replace(trace=True)
    for depth in (0, 1):
        speculative = {"method": "prompt_lookup", "num_speculative_tokens": "auto"}
        with LLM(
            str(folder),
            dtype="float32",
            kv_cache_memory="32MB",
            speculative=speculative,
            pipeline_depth=depth,
        ) as llm:
            (output,) = llm.generate("one two one two one two one", params, use_tqdm=False)
        assert output.metrics is not None
        metrics = output.metrics.speculation
        assert metrics is not None
        assert metrics.steps is not None
        assert len(metrics.steps) == metrics.num_steps
        assert sum(len(step.drafted_ids) for step in metrics.steps) == metrics.drafted
        tokens, at = output.outputs[0].token_ids, 1  # the first token is the prompt's
        for step in metrics.steps:
            assert step.reason
            assert tokens[at : at + step.num_accepted] == step.drafted_ids[: step.num_accepted]
            at += step.num_accepted + 1


@pytest.mark.usefixtures("steady_machine")
def test_good_drafts_are_used_and_bad_ones_are_not(folder: Path) -> None:
    prompts = ["the cat and the hat"]
    plain, plain_steps, _, _ = run(folder, None, prompts)
    tokenizer_free = LLM(str(folder), dtype="float32", kv_cache_memory="32MB")
    ids = tokenizer_free.generate(prompts, GREEDY, use_tqdm=False)[0].prompt_token_ids
    tokenizer_free.shutdown()
    Noisy.known, Noisy.wrong = [ids + plain[0]], 0.0
    try:
        good, good_steps, _, speedup = run(folder, f"{DRAFTERS}:Noisy", prompts)
    finally:
        Noisy.known, Noisy.wrong = [], 0.3
    bad, bad_steps, bad_drafts, _ = run(folder, f"{DRAFTERS}:Wrong", prompts)
    assert good == plain
    assert bad == plain
    assert good_steps < plain_steps / 2
    assert speedup > 1.0
    assert bad_steps == plain_steps
    assert bad_drafts < plain_steps  # it tries at first, and gives up
