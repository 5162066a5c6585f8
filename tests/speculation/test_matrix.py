"""Every drafter times everything else: the text with drafts is the text without.

float32 with the C kernels, whose rows do not depend on each other, so "the same" means the same
tokens, greedy and sampled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, ModelNotFoundError, RequestError
from octavo.outputs import RequestOutput
from tests.checkpoints import make_checkpoint
from tests.speculation.draft_models import make_draft_models
from tests.speculation.drafters import Noisy

DRAFTERS = "tests.speculation.drafters"
METHODS = ["prompt_lookup", "suffix", "predicted", f"{DRAFTERS}:Noisy", f"{DRAFTERS}:Wrong"]
# method, and which draft model: the target itself, a noised copy of it, a smaller one that knows nothing
MODELS = ["draft_model itself", "draft_model near", "draft_model stranger", "hybrid near"]
METHODS += MODELS
PROMPTS = ["the cat and the hat and the cat and", "one two one two one two", "in the end", "a"] * 2

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "cold": {"temperature": 0.2},
    "samples": {"temperature": 0.3, "n": 3},
    "best-of": {"temperature": 0.5, "n": 1, "best_of": 3},
    "penalties": {
        "temperature": 0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
    "bias": {"temperature": 0.5, "logit_bias": {40: 3.0, 41: -100.0}, "bad_words": ["the"]},
    "logprobs": {"temperature": 0.3, "logprobs": 3, "prompt_logprobs": 1},
    "min-tokens": {"temperature": 0, "min_tokens": 15, "ignore_eos": False},
    "grammar": {
        "temperature": 0.3,
        "structured_outputs": {"regex": "(the cat |and )+[ab]{4,20}"},
        "ignore_eos": False,
    },
}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-step-late": {"pipeline_depth": 1},
    "chunks": {"max_chunk_tokens": 5, "enable_prefix_caching": False},
    "preempted": {"num_blocks": 11, "pipeline_depth": 1},
    "small-steps": {"max_num_batched_tokens": 12},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("model")
    make_draft_models(parent)
    return make_checkpoint(parent / "tiny", tokenizer=True)


def settings(folder: Path, method: str, count: int | str = 4) -> dict[str, Any]:
    """The option `speculative` for an entry of METHODS."""
    name, _, model = method.partition(" ")
    speculative: dict[str, Any] = {"method": name, "num_speculative_tokens": count}
    if model:
        speculative["model"] = str(folder if model == "itself" else folder.parent / model)
        speculative["draft_kv_share"] = 1.0
    return speculative


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    Noisy.known = []


def run(
    folder: Path,
    engine: dict[str, Any],
    params: dict[str, Any],
    predictions: list[Any] | None = None,
    **more: Any,
) -> list[RequestOutput]:
    options = {"dtype": "float32", "kv_cache_memory": "8MB", **engine, **more}
    if (num_blocks := options.pop("num_blocks", None)) is not None:
        options["kv_cache_memory"] = num_blocks * 3 * 2 * 2 * 16 * 16 * 4
    values = {"max_tokens": 40, "ignore_eos": True, "seed": 3, **params}
    every = [SamplingParams(**values, prediction=p) for p in predictions or [None] * len(PROMPTS)]
    with LLM(str(folder), **options) as llm:
        outputs = llm.generate(PROMPTS, every, use_tqdm=False)
        scheduler = llm._engine_parts().engine.scheduler
        scheduler.check_integrity()
        assert scheduler.kv.pool.num_used == 0
        assert scheduler.draft_kv is None or scheduler.draft_kv.kv.pool.num_used == 0
        if num_blocks is not None and values.get("structured_outputs") is None:
            assert scheduler.stats.num_preemptions > 0
    return outputs


def told(outputs: list[RequestOutput]) -> list[Any]:
    """All that must not change."""
    return [
        (
            o.prompt_logprobs,
            [
                (c.text, c.token_ids, c.finish_reason, c.stop_reason, c.logprobs, c.cumulative_logprob)
                for c in o.outputs
            ],
        )
        for o in outputs
    ]


def speculated(
    folder: Path, method: str, engine: dict[str, Any], params: dict[str, Any], plain: list[RequestOutput]
) -> list[RequestOutput]:
    """Run with drafts; the drafters that need to know the answer are told it."""
    Noisy.known = [o.prompt_token_ids + c.token_ids for o in plain for c in o.outputs]
    predictions = None
    if method == "predicted":
        predictions = [[*o.outputs[0].token_ids[:20], 9, *o.outputs[0].token_ids[23:]] for o in plain]
    return run(folder, engine, params, predictions, speculative=settings(folder, method))


def check(folder: Path, method: str, engine: dict[str, Any], params: dict[str, Any]) -> None:
    plain = run(folder, {}, params)
    outputs = speculated(folder, method, engine, params, plain)
    assert told(outputs) == told(plain)
    accepted = drafted = 0
    for output in outputs:
        assert output.metrics is not None
        metrics = output.metrics.speculation
        assert metrics is not None
        accepted, drafted = accepted + metrics.accepted, drafted + metrics.drafted
    repeats = params == REQUESTS["greedy"] or "structured_outputs" in params  # prompt lookup needs that
    if method.endswith("Wrong"):
        assert drafted > 100
    elif method.endswith("itself") and "structured_outputs" not in params:
        assert accepted == drafted > 50  # the same model, the same noise: the same tokens
    elif method.endswith("stranger") or (method in MODELS and "structured_outputs" in params):
        assert drafted > 20  # a draft model knows no grammars
    elif repeats or (method not in ("prompt_lookup", "suffix") and "n" not in params):
        assert accepted > 0, "nothing was accepted: the test shows nothing"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", REQUESTS)
def test_every_parameter(folder: Path, method: str, kind: str) -> None:
    check(folder, method, ENGINES["one-step-late"], REQUESTS[kind])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_way(folder: Path, method: str, engine: str) -> None:
    check(folder, method, ENGINES[engine], REQUESTS["cold"])
    if engine == "preempted":
        check(folder, method, ENGINES[engine], REQUESTS["grammar"])


@pytest.mark.parametrize("kind", REQUESTS)
def test_rejection_sampling_keeps_the_text_of_certain_drafters(folder: Path, kind: str) -> None:
    """What they propose has probability 1: the target's own draw is rejection sampling already."""
    plain = run(folder, {}, REQUESTS[kind])
    Noisy.known = [o.prompt_token_ids + c.token_ids for o in plain for c in o.outputs]
    speculative = {"method": f"{DRAFTERS}:Noisy", "num_speculative_tokens": 4, "acceptance": "rejection"}
    outputs = run(folder, ENGINES["one-step-late"], REQUESTS[kind], speculative=speculative)
    assert told(outputs) == told(plain)


@pytest.mark.parametrize("method", METHODS)
def test_stop_strings(folder: Path, method: str) -> None:
    plain = run(folder, {}, {"temperature": 0})
    stop = plain[0].outputs[0].text[12:15]
    assert stop
    params = {"temperature": 0, "stop": [stop]}
    stopped = run(folder, {}, params)
    Noisy.known = [o.prompt_token_ids + c.token_ids for o in plain for c in o.outputs]
    predictions = [o.outputs[0].token_ids for o in plain] if method == "predicted" else None
    outputs = run(folder, {"pipeline_depth": 1}, params, predictions, speculative=settings(folder, method, 6))
    assert told(outputs) == told(stopped)
    assert outputs[0].outputs[0].stop_reason == stop


def test_a_perfect_prediction_saves_steps(folder: Path) -> None:
    plain = run(folder, {}, {"temperature": 0})
    predictions = [o.outputs[0].token_ids for o in plain]
    speculative = {"method": "predicted", "num_speculative_tokens": 7}
    outputs = run(folder, {}, {"temperature": 0}, predictions, speculative=speculative)
    for output in outputs:
        assert output.metrics is not None
        metrics = output.metrics.speculation
        assert metrics is not None
        assert metrics.acceptance_rate == 1.0
        assert metrics.mean_acceptance_length is not None
        assert metrics.mean_acceptance_length > 6


def test_a_drafter_hears_how_it_fared(folder: Path) -> None:
    plain = run(folder, {}, {"temperature": 0})
    Noisy.known = [o.prompt_token_ids + o.outputs[0].token_ids for o in plain]
    speculative = {"method": f"{DRAFTERS}:Noisy", "num_speculative_tokens": 3}
    with LLM(str(folder), dtype="float32", kv_cache_memory="8MB", speculative=speculative) as llm:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        llm.generate(PROMPTS, params, use_tqdm=False)
        executor: Any = llm._engine_parts().engine.executor
        observed = executor.runner._proposer._drafter.observed
    assert len(observed) > 20
    assert all(accepted <= drafted for drafted, accepted in observed)
    assert 0.3 < sum(a for _, a in observed) / sum(d for d, _ in observed) < 0.9


def test_a_request_may_ask_for_fewer(folder: Path) -> None:
    speculative = {"method": "prompt_lookup", "num_speculative_tokens": 4}
    outputs = run(folder, {}, {"temperature": 0, "num_speculative_tokens": 0}, speculative=speculative)
    assert all(o.metrics is not None and o.metrics.speculation is not None for o in outputs)
    assert sum(o.metrics.speculation.drafted for o in outputs if o.metrics and o.metrics.speculation) == 0


@pytest.mark.parametrize(
    ("speculative", "error", "message"),
    [
        ({"method": "lookup"}, ConfigError, "prompt_lookup"),
        ({}, ConfigError, "needs a method"),
        ({"method": "ngram", "num_speculative_tokens": 17}, ConfigError, "0 to 16"),
        ({"method": "ngram", "num_speculative_tokens": True}, ConfigError, "0 to 16"),
        ({"method": "ngram", "num_speculative_token": 3}, ConfigError, "did you mean num_speculative_tokens"),
        ({"method": "ngram", "model": "x"}, ConfigError, "takes no model"),
        ({"method": "ngram", "acceptance": "lossy"}, ConfigError, "replay or rejection"),
        ({"method": "draft_model"}, ConfigError, "needs a model"),
        ({"method": "hybrid", "model": 3}, ConfigError, "needs a model"),
        ({"method": "ngram", "draft_kv_share": 0.5}, ConfigError, "takes no draft_kv_share"),
        ({"method": "draft_model", "model": "x", "draft_kv_share": 0}, ConfigError, "above 0 and at most 1"),
        ({"method": "draft_model", "model": "no/such/folder"}, ModelNotFoundError, "no/such/folder"),
        ({"method": "no.such.module:Class"}, ConfigError, "cannot be imported"),
        ({"method": f"{DRAFTERS}:Missing"}, ConfigError, "cannot be imported"),
        ({"method": f"{DRAFTERS}:NoPropose"}, ConfigError, "no method propose"),
    ],
)
def test_bad_settings(
    folder: Path, speculative: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM(str(folder), speculative=speculative)


def test_predictions_that_cannot_be(folder: Path) -> None:
    with LLM(str(folder), kv_cache_memory="8MB") as llm, pytest.raises(RequestError, match="speculative="):
        llm.generate("a", SamplingParams(prediction="b"), use_tqdm=False)
    with LLM(str(folder), kv_cache_memory="8MB", speculative={"method": "predicted"}) as llm:
        with pytest.raises(RequestError, match="shorten it"):
            llm.generate("a", SamplingParams(prediction="b" * 200), use_tqdm=False)
        (output,) = llm.generate("a", SamplingParams(prediction="bcd", max_tokens=4), use_tqdm=False)
        assert output.error is None


@pytest.mark.parametrize("method", ["draft_model", f"{DRAFTERS}:Wrong"])
def test_a_prediction_that_nobody_follows_is_refused(folder: Path, method: str) -> None:
    speculative = {"method": method, **({"model": str(folder)} if method == "draft_model" else {})}
    with (
        LLM(str(folder), kv_cache_memory="8MB", speculative=speculative) as llm,
        pytest.raises(RequestError, match="follows no prediction"),
    ):
        llm.generate("a", SamplingParams(prediction="b"), use_tqdm=False)


def test_the_grammar_holds_whatever_is_drafted(folder: Path) -> None:
    speculative = {"method": f"{DRAFTERS}:Wrong", "num_speculative_tokens": 5}
    params = {"temperature": 1.0, "structured_outputs": {"regex": "[ab]{5}x"}, "ignore_eos": False}
    for output in run(folder, {}, params, speculative=speculative):
        assert re.fullmatch("[ab]{5}x", output.outputs[0].text)


def test_the_guides_own_drafter_works(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "speculation.md").read_text(encoding="utf-8")
    source = guide.split("```python\n# my_drafter.py\n")[1].split("```")[0]
    (tmp_path / "my_drafter.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    speculative = {"method": "my_drafter:Echo", "num_speculative_tokens": 4}
    plain = run(folder, {}, {"temperature": 0})
    assert told(run(folder, {}, {"temperature": 0}, speculative=speculative)) == told(plain)
