"""The draft model: its cache, its vocabulary, its limits. That it keeps the text is the matrix's subject."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.core.draft_kv import DraftKV
from octavo.core.draft_planner import BudgetPlanner
from octavo.core.scheduler import Scheduler
from octavo.errors import ConfigError, InsufficientMemoryError, RequestError
from octavo.outputs import RequestOutput
from tests.checkpoints import make_checkpoint
from tests.speculation.draft_models import make_draft_models

PROMPTS = ["the cat and the hat and the cat and", "one two one two one two", "in the end", "a"] * 2
SAMPLED = SamplingParams(temperature=0.7, max_tokens=40, ignore_eos=True, seed=3)
METHODS = ["draft_model", "hybrid"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with target, near and stranger."""
    parent = tmp_path_factory.mktemp("models")
    make_checkpoint(parent / "target", tokenizer=True)
    make_draft_models(parent)
    return parent


def engine(models: Path, draft: str | Path | None, **more: Any) -> LLM:
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "8MB"}
    if draft is not None:
        options["speculative"] = {
            "method": more.pop("method", "draft_model"),
            "model": str(models / draft),
            "num_speculative_tokens": more.pop("count", 4),
            "draft_kv_share": more.pop("share", 1.0),
            **more.pop("speculative", {}),
        }
    return LLM(str(models / "target"), **{**options, **more})


def scheduler_of(llm: LLM) -> Scheduler:
    return llm._engine_parts().engine.scheduler


def draft_kv_of(llm: LLM) -> DraftKV:
    draft_kv = scheduler_of(llm).draft_kv
    assert draft_kv is not None
    return draft_kv


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def counts(outputs: list[RequestOutput]) -> tuple[int, int]:
    """Drafts verified, and accepted."""
    found = [o.metrics.speculation for o in outputs if o.metrics and o.metrics.speculation]
    return sum(m.drafted for m in found), sum(m.accepted for m in found)


def plain(models: Path, params: SamplingParams = SAMPLED, prompts: list[str] = PROMPTS) -> list[list[int]]:
    with engine(models, None) as llm:
        return tokens(llm.generate(prompts, params, use_tqdm=False))


# ---------------------------------------------------------------------- its memory


def test_plain_decoding_keeps_its_blocks(models: Path) -> None:
    with engine(models, None) as llm:
        before = len(scheduler_of(llm).kv.pool.blocks)
    with engine(models, "near", share=0.1) as llm:
        assert len(scheduler_of(llm).kv.pool.blocks) == before
        assert len(draft_kv_of(llm).kv.pool.blocks) == before // 10
        plan = llm._engine_parts().plan
        assert plan.draft_kv == pytest.approx(plan.kv / 10, rel=0.02)
        text = plan.describe()
    assert "draft model" in text
    assert "draft KV cache" in text
    with engine(models, "stranger", share=1.0) as llm:  # smaller blocks: never more tokens than the target
        assert len(draft_kv_of(llm).kv.pool.blocks) == before


def test_a_draft_cache_that_does_not_fit(models: Path) -> None:
    with engine(models, None) as llm:
        plan = llm._engine_parts().plan
    room = (plan.request.budget - plan.request.fixed) // 2**20
    with pytest.raises(InsufficientMemoryError, match="lower draft_kv_share"):
        engine(models, "near", kv_cache_memory=f"{int(room * 0.7)}MB")


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_a_pool_so_small_that_it_is_always_full(models: Path, method: str, depth: int) -> None:
    with engine(models, None) as llm:
        block_bytes = llm._engine_parts().plan.request.block_bytes
    options: dict[str, Any] = {"kv_cache_memory": 64 * block_bytes, "pipeline_depth": depth, "method": method}
    with engine(models, "near", share=9.5 / 64, **options) as llm:
        found = llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
        kv = draft_kv_of(llm)
        scheduler_of(llm).check_integrity()
        assert len(kv.kv.pool.blocks) == 9
        assert kv.stats.num_evictions > 0
        assert kv.kv.pool.num_used == 0
        assert scheduler_of(llm).stats.num_preemptions == 0
    assert tokens(found) == plain(models)
    drafted, accepted = counts(found)
    assert drafted > accepted > 0


def test_samples_share_the_prompt(models: Path) -> None:
    prompt = "the cat and the hat and the dog in the inn on and on and " * 2
    params = SAMPLED.replace(n=4, max_tokens=10)
    with engine(models, "near") as llm:
        found = llm.generate([prompt], params, use_tqdm=False)
        kv, rows = draft_kv_of(llm).kv, draft_kv_of(llm).stats.num_catch_up_rows
    length = len(found[0].prompt_token_ids)
    assert kv.num_prefix_hits == 3 * (length // 16 * 16)
    assert rows < length + 3 * 16 + 4 * 10
    assert tokens(found) == plain(models, params, [prompt])


# ---------------------------------------------------------------------- its vocabulary and tokenizer


@pytest.mark.parametrize("vocab_size", [290, 320])
@pytest.mark.parametrize("method", METHODS)
def test_a_vocabulary_padded_to_another_size(
    models: Path, tmp_path: Path, vocab_size: int, method: str
) -> None:
    draft = make_checkpoint(tmp_path / "padded", tokenizer=True, vocab_size=vocab_size, seed=4)
    params = SAMPLED.replace(
        temperature=1.5,
        allowed_token_ids=[*range(40, 60), 299],
        logit_bias={298: 2.0},
        repetition_penalty=1.1,
    )
    prompts = [[5, 7, 299, 295, 9], [291, 12, 13], [298] * 20]  # tokens the smaller vocabulary lacks
    with engine(models, None) as llm:
        expected = llm.generate(prompts, [params, SAMPLED, SAMPLED], use_tqdm=False)
    with engine(models, draft, method=method) as llm:
        found = llm.generate(prompts, [params, SAMPLED, SAMPLED], use_tqdm=False)
    assert tokens(found) == tokens(expected)
    assert counts(found)[0] > 20


def test_another_tokenizer_is_refused(models: Path, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(models / "near", tmp_path / "other"))
    path = draft / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="another tokenizer"):
        engine(models, draft)
    del vocabulary[first]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="tokens instead of"):
        engine(models, draft)


def test_added_tokens_may_have_other_names(models: Path, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(models / "near", tmp_path / "base"))
    path = draft / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"][-1]["content"] = "<|renamed|>"
    path.write_text(json.dumps(content), encoding="utf-8")
    engine(models, draft).shutdown()


def test_without_tokenizers_the_sizes_are_compared(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path / "target")
    same = make_checkpoint(tmp_path / "same", seed=1)
    other = make_checkpoint(tmp_path / "other", vocab_size=140)
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "4MB"}
    with LLM(str(target), speculative={"method": "draft_model", "model": str(same)}, **options) as llm:
        llm.generate([[3, 4, 5]], SamplingParams(max_tokens=4), use_tqdm=False)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        LLM(str(target), speculative={"method": "draft_model", "model": str(other)}, **options)


# ---------------------------------------------------------------------- its limits


@pytest.mark.parametrize("method", METHODS)
def test_beyond_its_context_a_request_goes_on_without_it(models: Path, tmp_path: Path, method: str) -> None:
    draft = make_checkpoint(tmp_path / "short", tokenizer=True, seed=0, max_position_embeddings=40)
    params = SAMPLED.replace(max_tokens=60, trace=True)
    for depth in (0, 1):
        with engine(models, draft, method=method, pipeline_depth=depth) as llm:
            notes = llm._engine_parts().notes
            found = llm.generate(PROMPTS, params, use_tqdm=False)
            assert draft_kv_of(llm).kv.pool.num_used == 0
        assert any("40 tokens" in note and "without drafts" in note for note in notes)
        assert tokens(found) == plain(models, params.replace(trace=False))
        if method == "hybrid":
            continue
        for output in found:
            assert output.metrics is not None
            assert output.metrics.speculation is not None
            steps, length = output.metrics.speculation.steps, len(output.prompt_token_ids) + 1
            assert steps is not None
            for step in steps:
                if step.drafted_ids:  # the last of them is not computed
                    assert length + len(step.drafted_ids) <= 41
                length += 1 + step.num_accepted
            assert steps[-1].reason == "plain: beyond the draft model's context of 40 tokens"
            assert any(step.drafted_ids for step in steps)


def test_a_prediction_needs_somebody_who_follows_it(models: Path) -> None:
    with engine(models, "near") as llm, pytest.raises(RequestError, match="hybrid"):
        llm.generate("a", SamplingParams(prediction="b"), use_tqdm=False)
    expected = plain(models, SAMPLED, ["a"])
    params = SAMPLED.replace(prediction=expected[0])
    with engine(models, "stranger", method="hybrid") as llm:
        found = llm.generate("a", params, use_tqdm=False)
    assert tokens(found) == expected
    assert counts(found)[1] > 25  # the stranger alone is never right


def test_a_request_may_ask_for_its_own_number(models: Path) -> None:
    params = [SAMPLED.replace(num_speculative_tokens=count) for count in (0, 1, 16)]
    with engine(models, "target") as llm:
        found = llm.generate(["in the end"] * 3, params, use_tqdm=False)
    speculation = [o.metrics.speculation for o in found if o.metrics and o.metrics.speculation]
    assert [len(each.drafted_by_position) for each in speculation] == [0, 1, 16]
    assert len({tuple(t) for t in tokens(found)}) == 1


# ---------------------------------------------------------------------- hybrid, rejection, auto


def test_hybrid_uses_both_and_judges_each_by_its_own_drafts(models: Path) -> None:
    params = SAMPLED.replace(max_tokens=80)
    expected = plain(models, params, PROMPTS[:4])
    half = [params.replace(prediction=text[:40]) for text in expected]
    for depth in (0, 1):
        with engine(models, "stranger", method="hybrid", pipeline_depth=depth) as llm:
            found = llm.generate(PROMPTS[:4], half, use_tqdm=False)
            planner = scheduler_of(llm).planner
            assert isinstance(planner, BudgetPlanner)
            seen = {name: shared.rates[1] for name, shared in planner.budget._shared.items()}
            assert draft_kv_of(llm).stats.num_catch_up_rows > 4 * 40  # what the lookup had drafted
        assert tokens(found) == expected
        drafted, accepted = counts(found)
        assert drafted > 250 > accepted > 100
        assert seen["draft_model"] < 0.2
        assert seen["hybrid/prediction"] > 0.75


@pytest.mark.parametrize("method", METHODS)
def test_rejection_sampling_keeps_the_distribution(models: Path, method: str) -> None:
    params = SamplingParams(temperature=1.0, top_k=3, max_tokens=3, ignore_eos=True)
    prompts = ["one two one two one two"] * 1500
    seen: list[Counter[tuple[int, ...]]] = []
    for draft in (None, "near"):
        more: dict[str, Any] = {"seed": 1, "max_num_seqs": 64}
        if draft:
            more |= {"method": method, "speculative": {"acceptance": "rejection"}}
        with engine(models, draft, **more) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        seen.append(Counter(tuple(t) for t in tokens(outputs)))
    drafted, accepted = counts(outputs)
    assert 0.1 * drafted < accepted < 0.95 * drafted
    # Two samples of the same distribution: chi squared over the common texts, the rare ones together.
    often = [text for text in seen[0] | seen[1] if seen[0][text] + seen[1][text] >= 20]
    pairs = [(seen[0][text], seen[1][text]) for text in often]
    pairs.append((1500 - sum(a for a, _ in pairs), 1500 - sum(b for _, b in pairs)))
    chi2 = sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b)
    assert len(often) > 8
    assert chi2 < len(pairs) + 4 * (2 * len(pairs)) ** 0.5


@pytest.mark.usefixtures("steady_machine")
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_auto_drafts_where_it_pays(tmp_path: Path, rate: float) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "max_position_embeddings": 256,
        "vocab_size": 4000,
    }
    target = make_checkpoint(tmp_path / "target", tokenizer=True, num_hidden_layers=8, **shape)
    shape |= {"hidden_size": 64, "intermediate_size": 128}
    draft = make_checkpoint(tmp_path / "draft", tokenizer=True, num_hidden_layers=1, **shape)
    speculative = {"method": "draft_model", "model": str(draft), "synthetic_acceptance_rates": [rate]}
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    with LLM(str(target), dtype="float32", kv_cache_memory="32MB", speculative=speculative) as llm:
        found = llm.generate(["the cat and the hat"], params, use_tqdm=False)
        steps = scheduler_of(llm).stats.num_steps
        planner = scheduler_of(llm).planner
        assert isinstance(planner, BudgetPlanner)
        speedup = planner.budget.report.net_speedup
    drafted, accepted = counts(found)
    if rate:
        assert steps < 60
        assert speedup > 1.2
        assert accepted > 90
    else:
        assert accepted == 0
        assert drafted < 60  # it tries at first, and gives up
        assert speedup > 0.8
