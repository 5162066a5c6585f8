"""The engine over the fake device: samples, seeds, stops, outputs, bad input."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from octavo.core.mix import mix64
from octavo.engine.engine import Engine
from octavo.errors import RequestError
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from tests.core.fake_device import gold_output
from tests.engine.fakes import fake_engine, word_tokenizer

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def run(engine: Engine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = defaultdict(list)
    for _ in range(1000):
        if not engine.has_work():
            break
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.check_integrity()
    assert not engine.has_work()
    assert engine.num_unfinished == 0
    assert engine.scheduler.kv.pool.num_used == 0
    return outputs


def gold(
    seed: int, count: int, prompt: list[int] = PROMPT, stop: tuple[int, ...] = (), index: int = 0
) -> list[int]:
    return gold_output(prompt, mix64(seed, index), len(prompt) + count, stop)


@pytest.fixture(params=[0, 1], ids=["inline", "one-step-late"])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("drafts", [0, 3])
def test_many_requests_come_back_whole(depth: int, drafts: int) -> None:
    engine = fake_engine(depth, drafts=drafts, blocks=60)
    for index in range(20):
        engine.add_request(str(index), [index, *PROMPT], SamplingParams(seed=index, max_tokens=5 + index))
    outputs = run(engine)
    for index in range(20):
        (output,) = outputs[str(index)]
        assert output.outputs[0].token_ids == gold(index, 5 + index, [index, *PROMPT])
        assert output.outputs[0].finish_reason == "length"
        assert output.finished


def test_samples_have_seeds_of_their_own_and_share_the_prompt(depth: int) -> None:
    engine = fake_engine(depth)
    engine.add_request("a", PROMPT, SamplingParams(n=3, seed=11, max_tokens=6))
    engine.step()
    (output,) = run(engine)["a"]
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert [o.token_ids for o in output.outputs] == [gold(11, 6, index=i) for i in range(3)]
    assert engine.scheduler.kv.num_prefix_hits == 2 * 8


@pytest.mark.parametrize("caching", [True, False])
def test_samples_share_even_without_prefix_caching_but_nobody_else_does(caching: bool) -> None:
    engine = fake_engine(enable_prefix_caching=caching)
    engine.add_request("a", PROMPT, SamplingParams(n=2, max_tokens=2))
    engine.add_request("b", PROMPT, SamplingParams(max_tokens=2))
    run(engine)
    assert engine.scheduler.kv.num_prefix_hits == (16 if caching else 8)


def test_the_first_of_n_is_the_only_one_of_one() -> None:
    engine = fake_engine()
    engine.add_request("a", PROMPT, SamplingParams(seed=4, max_tokens=6))
    engine.add_request("b", PROMPT, SamplingParams(seed=4, n=2, max_tokens=6))
    outputs = run(engine)
    assert outputs["a"][0].outputs[0].token_ids == outputs["b"][0].outputs[0].token_ids


def test_requests_without_a_seed_differ() -> None:
    engine = fake_engine()
    for name in "ab":
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=6))
    outputs = run(engine)
    assert outputs["a"][0].outputs[0].token_ids != outputs["b"][0].outputs[0].token_ids


def test_streams_are_cumulative_or_deltas(depth: int) -> None:
    engine = fake_engine(depth, tokenizer=word_tokenizer(), drafts=2)
    params = SamplingParams(seed=1, max_tokens=9)
    engine.add_request("sum", PROMPT, params, "cumulative")
    engine.add_request("parts", PROMPT, params, "delta")
    engine.add_request("end", PROMPT, params)
    outputs = run(engine)
    (whole,) = outputs["end"]
    tokens, text = whole.outputs[0].token_ids, whole.outputs[0].text
    assert tokens == gold(1, 9)
    assert text == "".join(f" w{token}" for token in tokens)
    assert outputs["sum"][-1].outputs[0].token_ids == tokens
    assert outputs["sum"][-1].outputs[0].text == text
    lengths = [len(o.outputs[0].token_ids) for o in outputs["sum"]]
    assert lengths == sorted(set(lengths))
    assert [t for o in outputs["parts"] for t in o.outputs[0].token_ids] == tokens
    assert "".join(o.outputs[0].text for o in outputs["parts"]) == text
    assert [o.finished for o in outputs["parts"]] == [False] * (len(outputs["parts"]) - 1) + [True]


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_request_at_its_token(depth: int, drafts: int, include: bool) -> None:
    tokens = gold(1, 12)
    stop = f"w{tokens[4]} w{tokens[5]}"  # across two tokens
    engine = fake_engine(depth, tokenizer=word_tokenizer(), drafts=drafts)
    params = SamplingParams(seed=1, max_tokens=12, stop=[stop], include_stop_str_in_output=include)
    engine.add_request("a", PROMPT, params)
    (output,) = run(engine)["a"]
    (completion,) = output.outputs
    assert completion.token_ids == tokens[:6]
    assert completion.text == "".join(f" w{t}" for t in tokens[:6])[: None if include else -len(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("drafts", [0, 4])
def test_stop_tokens(depth: int, drafts: int) -> None:
    tokens = gold(1, 12)
    assert tokens[3] not in tokens[:3]
    engine = fake_engine(depth, tokenizer=word_tokenizer(), drafts=drafts, eos=(tokens[3],))
    engine.add_request("eos", PROMPT, SamplingParams(seed=1, max_tokens=12))
    engine.add_request("ignored", PROMPT, SamplingParams(seed=1, max_tokens=12, ignore_eos=True))
    engine.add_request("own", PROMPT, SamplingParams(seed=1, max_tokens=12, stop_token_ids=[tokens[2]]))
    outputs = {name: found[0].outputs[0] for name, found in run(engine).items()}
    assert outputs["eos"].token_ids == tokens[:4]
    assert outputs["eos"].text == "".join(f" w{t}" for t in tokens[:3])  # the stop token is no text
    assert (outputs["eos"].finish_reason, outputs["eos"].stop_reason) == ("stop", None)
    assert outputs["ignored"].token_ids == tokens
    assert outputs["own"].token_ids == tokens[:3]
    assert outputs["own"].stop_reason == tokens[2]


def test_abort_gives_back_what_was_made(depth: int) -> None:
    engine = fake_engine(depth, tokenizer=word_tokenizer())
    engine.add_request("a", PROMPT, SamplingParams(seed=1, n=2, max_tokens=50))
    engine.add_request("b", PROMPT, SamplingParams(seed=1, max_tokens=8))
    for _ in range(5):
        engine.step()
    output = engine.abort("a")
    assert output is not None
    assert output.finished
    assert [o.finish_reason for o in output.outputs] == ["abort", "abort"]
    assert output.outputs[0].token_ids == gold(1, 50)[: len(output.outputs[0].token_ids)]
    assert engine.abort("a") is None
    assert engine.abort("never seen") is None
    assert list(run(engine)) == ["b"]


def test_metrics_tell_what_happened() -> None:
    engine = fake_engine()
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=5))
    run(engine)
    engine.add_request("b", PROMPT, SamplingParams(max_tokens=5))
    metrics = run(engine)["b"][0].metrics
    assert metrics is not None
    assert metrics.num_prompt_tokens == 9
    assert metrics.num_cached_tokens == 8
    assert metrics.num_output_tokens == 5
    assert metrics.ttft is not None
    assert metrics.e2e is not None
    assert metrics.queue_time is not None
    assert 0 <= metrics.queue_time <= metrics.ttft <= metrics.e2e


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "empty"),
        ([1, 50], SamplingParams(), "50 is not in the vocabulary"),
        ([-1], SamplingParams(), "-1 is not in the vocabulary"),
        ([1] * 100, SamplingParams(), "100 tokens and the context holds 100"),
        ("text", SamplingParams(), "no tokenizer"),
        ({"prompt_token_ids": "text"}, SamplingParams(), "list of token ids"),
        ({"tokens": [1]}, SamplingParams(), "prompt_token_ids"),
        (3.5, SamplingParams(), "float"),
        ([1, True], SamplingParams(), "list"),
        ([1], SamplingParams(stop=["x"]), "stop strings need a tokenizer"),
        ([1], SamplingParams(bad_words=["x"]), "bad_words needs a tokenizer"),
        ([1], SamplingParams(structured_outputs={"regex": "a"}), "needs a tokenizer"),
        ([1], SamplingParams(stop_token_ids=[50]), "stop_token_ids"),
        ([1], SamplingParams(logit_bias={77: 1.0}), "logit_bias"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(
    prompt: Any, params: SamplingParams, message: str
) -> None:
    engine = fake_engine()
    with pytest.raises(RequestError, match=message):
        engine.add_request("a", prompt, params)
    assert not engine.has_work()
    assert engine.num_unfinished == 0
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=2))  # the id is free again
    assert len(run(engine)["a"]) == 1


def test_best_of_cannot_stream() -> None:
    with pytest.raises(RequestError, match="best_of cannot stream"):
        fake_engine().add_request("a", PROMPT, SamplingParams(best_of=2), "delta")


def test_an_id_in_use_is_refused() -> None:
    engine = fake_engine()
    engine.add_request("a", PROMPT, SamplingParams())
    with pytest.raises(RequestError, match="being served"):
        engine.add_request("a", PROMPT, SamplingParams())


def test_the_answer_ends_where_the_context_does() -> None:
    engine = fake_engine(max_model_len=20)
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=None, seed=1))
    engine.add_request("b", PROMPT, SamplingParams(max_tokens=500, seed=1))
    for outputs in run(engine).values():
        assert outputs[0].outputs[0].token_ids == gold(1, 11)
        assert outputs[0].outputs[0].finish_reason == "length"
