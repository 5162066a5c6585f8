"""`LLM` on a small real checkpoint: every sampling parameter end to end, and everything refused."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    InsufficientMemoryError,
    ModelNotFoundError,
    NotInThisVersionError,
    RequestError,
    UnsupportedModelError,
)
from octavo.outputs import CompletionOutput, RequestOutput
from tests.checkpoints import make_checkpoint
from tests.parity.test_engine import logits_after

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


@pytest.fixture(scope="module", params=[0, 1], ids=["inline", "one-step-late"])
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", kv_cache_memory="8MB", pipeline_depth=request.param) as model:
        yield model
        engine = model._engine_parts().engine
        engine.scheduler.check_integrity()
        assert engine.num_unfinished == 0


def generate(llm: LLM, prompt: Any, **params: Any) -> CompletionOutput:
    (output,) = llm.generate(prompt, SamplingParams(**{"max_tokens": 12, **params}), use_tqdm=False)
    return output.outputs[0]


# ---------------------------------------------------------------------- inputs and outputs


def test_all_kinds_of_prompts_give_the_same(llm: LLM) -> None:
    tokenizer = llm._engine_parts().engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("the end")
    prompts: list[Any] = ["the end", ids, {"prompt": "the end"}, {"prompt_token_ids": ids}]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert [o.prompt for o in outputs] == ["the end", None, "the end", None]
    assert all(o.prompt_token_ids == ids for o in outputs)
    (single,) = llm.generate(ids, GREEDY, use_tqdm=False)
    assert single.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_order_is_kept_and_each_prompt_has_its_parameters(llm: LLM) -> None:
    prompts = [f"number {index}" for index in range(9)]
    params = [SamplingParams(temperature=0, max_tokens=9 - index, ignore_eos=True) for index in range(9)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9 - index for index in range(9)]


def test_steps_begin_before_all_prompts_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(folder), dtype="float32", kv_cache_memory="8MB", max_num_batched_tokens=64) as llm:
        engine = llm._engine_parts().engine
        read, step = engine.read_request, engine.step
        events: list[str] = []

        def noted_read(*args: Any, **options: Any) -> Any:
            events.append("read")
            return read(*args, **options)

        def noted_step() -> Any:
            events.append("step")
            return step()

        monkeypatch.setattr(engine, "read_request", noted_read)
        monkeypatch.setattr(engine, "step", noted_step)
        prompts = [[5 + index] * 40 for index in range(6)]
        together = llm.generate(prompts, GREEDY, use_tqdm=False)
        # two prompts fill a step
        assert events[:9] == ["read", "read", "step"] * 3
        alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
        assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
        # the last may have to be served first
        events.clear()
        urgent = [GREEDY.replace(priority=-index) for index in range(6)]
        llm.generate(prompts, urgent, use_tqdm=False)
        assert events[:7] == ["read"] * 6 + ["step"]
        # prompts that begin alike do not fill a step: the first two do, and all others go together
        events.clear()
        alike = [[50] * 38 + [20 + index] * 2 for index in range(6)]
        llm.generate(alike, GREEDY, use_tqdm=False)
        assert events[:8] == ["read", "read", "step", *["read"] * 4, "step"]
        # who streams gets the first tokens as soon as there are some
        events.clear()
        list(llm.generate(prompts, GREEDY, use_tqdm=False, stream=True))
        assert events[:7] == ["read"] * 6 + ["step"]


def test_streaming_ends_where_generating_does(llm: LLM) -> None:
    (whole,) = llm.generate("once", GREEDY, use_tqdm=False)
    parts = list(llm.generate("once", GREEDY, stream=True))
    assert parts[-1].outputs[0].text == whole.outputs[0].text
    assert parts[-1].finished
    assert len(parts) == 12
    texts = [part.outputs[0].text for part in parts]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_a_stream_left_early_frees_its_request(llm: LLM) -> None:
    for _ in llm.generate("once", SamplingParams(max_tokens=60, ignore_eos=True), stream=True):
        break
    engine = llm._engine_parts().engine
    assert engine.num_unfinished == 0
    while engine.has_work():
        engine.step()
    assert engine.scheduler.kv.pool.num_used == 0


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (chatted,) = llm.chat(messages, GREEDY, use_tqdm=False)
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    (generated,) = llm.generate(text, GREEDY, use_tqdm=False)
    assert chatted.prompt == text
    assert chatted.outputs[0].token_ids == generated.outputs[0].token_ids
    several = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in several] == [chatted.outputs[0].token_ids] * 2


def test_a_broken_chat_template_is_known_from_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("octavo"), "propagate", True)
    folder = make_checkpoint(tmp_path / "m", tokenizer=True)
    (folder / "chat_template.jinja").write_text("fine\n{% if %}", encoding="utf-8")
    small: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "8MB"}
    with LLM(str(folder), **small) as broken:
        words = "the chat template (chat_template.jinja) has a syntax error in line 2"
        (warning,) = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
        assert warning.startswith(words)
        assert str(folder) in warning
        for ask in (broken.check_chat, lambda: broken.chat([{"role": "user", "content": "hi"}], GREEDY)):
            with pytest.raises(RequestError, match=re.escape(words)):
                ask()
        assert generate(broken, "hello").token_ids  # what needs no template is served
    with LLM(str(folder), chat_template="{{ messages[0].content }}", **small) as given:
        given.check_chat()
    with pytest.raises(ConfigError, match="syntax error in line 1"):
        LLM(str(folder), chat_template="{% endif %}", **small)


def test_chat_takes_the_rest_of_the_context(llm: LLM) -> None:
    (output,) = llm.chat(
        [{"role": "user", "content": "hi"}], SamplingParams(temperature=0, ignore_eos=True), use_tqdm=False
    )
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 128


# ---------------------------------------------------------------------- sampling parameters


def test_logprobs_are_those_of_transformers(llm: LLM, folder: Path) -> None:
    params = SamplingParams(
        temperature=0.7, top_k=5, seed=2, max_tokens=6, logprobs=3, prompt_logprobs=2, repetition_penalty=1.3
    )
    (output,) = llm.generate("the quick fox", params, use_tqdm=False)
    tokens = output.prompt_token_ids + output.outputs[0].token_ids
    num_prompt = len(output.prompt_token_ids)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    found = output.prompt_logprobs[1:] + (output.outputs[0].logprobs or [])
    assert len(found) == len(tokens) - 1
    for position, entry in enumerate(found, start=1):
        expected = logits_after(folder, tokens[:position]).log_softmax(-1)
        assert entry is not None
        wanted = 3 if position >= num_prompt else 2
        top = expected.topk(wanted).indices.tolist()
        assert set(entry) == {tokens[position], *top}
        assert next(iter(entry)) == tokens[position]
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(expected[token]), abs=2e-4)
            assert logprob.rank == 1 + int((expected > expected[token]).sum())
    total = 0.0
    for entry, token in zip(output.outputs[0].logprobs or [], tokens[num_prompt:], strict=True):
        total += entry[token].logprob
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_survive_chunks_and_preemption(folder: Path) -> None:
    prompts = ["the cat and the hat " * 3, "in the morning " * 4, "one two three four five"]
    params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0, ignore_eos=True)
    found = []
    for options in ({}, {"max_chunk_tokens": 5}, {"kv_cache_memory": 9 * 16 * 3 * 2 * 2 * 16 * 4}):
        with LLM(str(folder), dtype="float32", **{"kv_cache_memory": "8MB", **options}) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        rows = [
            [None if e is None else next(iter(e.values())) for e in o.prompt_logprobs or []] for o in outputs
        ]
        assert [len(r) for r in rows] == [len(o.prompt_token_ids) for o in outputs]
        found.append([[e and round(e.logprob, 3) for e in r] for r in rows])
    assert found[0] == found[1] == found[2]


def test_seeds_decide_and_nothing_else_does(llm: LLM) -> None:
    params = SamplingParams(seed=5, max_tokens=12, ignore_eos=True, n=3)
    (alone,) = llm.generate("the", params, use_tqdm=False)
    crowd = llm.generate(["and", "the", "in"], [GREEDY, params, GREEDY], use_tqdm=False)
    texts = [o.token_ids for o in alone.outputs]
    assert [o.token_ids for o in crowd[1].outputs] == texts
    assert len({tuple(t) for t in texts}) == 3
    assert generate(llm, "the", seed=6, ignore_eos=True).token_ids != texts[0]


def test_best_of_returns_the_most_probable(llm: LLM) -> None:
    params = SamplingParams(n=6, seed=3, max_tokens=8, ignore_eos=True, logprobs=0)
    (six,) = llm.generate("the", params, use_tqdm=False)
    (best,) = llm.generate("the", params.replace(n=2, best_of=6), use_tqdm=False)

    def mean(output: CompletionOutput) -> float:
        assert output.cumulative_logprob is not None
        return output.cumulative_logprob / len(output.token_ids)

    ranked = sorted(six.outputs, key=mean, reverse=True)
    assert [o.token_ids for o in best.outputs] == [o.token_ids for o in ranked[:2]]
    assert [o.index for o in best.outputs] == [0, 1]
    (silent,) = llm.generate("the", params.replace(n=2, best_of=6, logprobs=None), use_tqdm=False)
    assert [o.token_ids for o in silent.outputs] == [o.token_ids for o in ranked[:2]]
    assert silent.outputs[0].logprobs is None


def test_parameters_that_limit_the_choice(llm: LLM) -> None:
    allowed = [40, 41, 42]
    assert set(generate(llm, "the", allowed_token_ids=allowed, seed=1).token_ids) <= set(allowed)
    assert set(generate(llm, "the", logit_bias={77: 100.0}, temperature=0).token_ids) == {77}
    assert (
        generate(llm, "the", top_k=1, seed=1, ignore_eos=True).token_ids
        == generate(llm, "the", temperature=0, ignore_eos=True).token_ids
    )
    greedy = generate(llm, "the", temperature=0, ignore_eos=True)
    tokenizer = llm._engine_parts().engine.tokenizer
    assert tokenizer is not None
    word = tokenizer.decode(greedy.token_ids[2:4])
    if word.isascii() and word.strip():
        assert word not in generate(llm, "the", temperature=0, ignore_eos=True, bad_words=[word]).text


def test_min_tokens_and_stop_tokens(llm: LLM) -> None:
    greedy = generate(llm, "the", temperature=0, ignore_eos=True).token_ids
    first = generate(llm, "the", temperature=0, ignore_eos=True, stop_token_ids=[greedy[0]])
    assert (first.token_ids, first.stop_reason) == (greedy[:1], greedy[0])
    later = generate(llm, "the", temperature=0, ignore_eos=True, stop_token_ids=[greedy[0]], min_tokens=5)
    assert len(later.token_ids) >= 5
    assert greedy[0] not in later.token_ids[:5]


def test_stop_strings(llm: LLM) -> None:
    whole = generate(llm, "the", temperature=0, ignore_eos=True, max_tokens=30)
    stop = whole.text[5:8]
    cut = generate(llm, "the", temperature=0, ignore_eos=True, max_tokens=30, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_penalties_change_the_text_as_transformers_does(llm: LLM, folder: Path) -> None:
    penalty = 1.5
    mine = generate(llm, "the the the", temperature=0, ignore_eos=True, repetition_penalty=penalty)
    tokenizer = llm._engine_parts().engine.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode("the the the")
    for _ in range(12):
        logits = logits_after(folder, tokens).clone()
        seen = torch.tensor(sorted(set(tokens)))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        tokens.append(int(logits.argmax()))
    assert mine.token_ids == tokens[-12:]


# ---------------------------------------------------------------------- structured output


def test_structured_outputs(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    kinds: list[dict[str, Any]] = [
        {"json": schema},
        {"regex": "[ab]{3}-[0-9]{2}"},
        {"choice": ["yes", "no", "maybe"]},
    ]
    params = [
        SamplingParams(seed=index, max_tokens=80, structured_outputs=kind) for index, kind in enumerate(kinds)
    ]
    outputs = llm.generate(["the"] * 4, [*params, GREEDY], use_tqdm=False)
    texts = [o.outputs[0].text for o in outputs]
    value = json.loads(texts[0])
    assert set(value) == {"a", "b"}
    assert 0 <= value["a"] <= 99
    assert re.fullmatch("[ab]{3}-[0-9]{2}", texts[1])
    assert texts[2] in ("yes", "no", "maybe")
    assert [o.outputs[0].finish_reason for o in outputs] == ["stop", "stop", "stop", "length"]
    assert outputs[3].outputs[0].token_ids == generate(llm, "the", temperature=0, ignore_eos=True).token_ids


def test_samples_follow_the_grammar_each_on_its_own(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=1, max_tokens=20, structured_outputs={"regex": "[a-z]{2,9}"})
    (output,) = llm.generate("the", params, use_tqdm=False)
    assert all(re.fullmatch("[a-z]{2,9}", o.text) for o in output.outputs)
    assert len({o.text for o in output.outputs}) > 1


def test_contradicting_masks_end_one_request_with_an_error(llm: LLM) -> None:
    bad = SamplingParams(structured_outputs={"regex": "[a-z]+"}, allowed_token_ids=[0], max_tokens=5)
    outputs = llm.generate(["the", "the"], [bad, GREEDY], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert "no token is legal" in (outputs[0].error or "")
    assert outputs[1].error is None
    assert len(outputs[1].outputs[0].token_ids) == 12


# ---------------------------------------------------------------------- refused


def refused(llm: LLM, prompts: Any, params: Any = GREEDY) -> str:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, params, use_tqdm=False)
    return str(caught.value)


def test_a_single_bad_prompt_raises(llm: LLM) -> None:
    assert "empty" in refused(llm, {"prompt_token_ids": []})
    assert "at least one token" in refused(llm, "")
    assert "vocabulary" in refused(llm, [999999])
    assert "context holds 128" in refused(llm, [5] * 128)
    assert "not int" in refused(llm, 5)
    assert "2 sampling_params for 1" in refused(llm, ["a"], [GREEDY, GREEDY])
    assert "SamplingParams" in refused(llm, ["a"], {"temperature": 0})


def test_bad_prompts_among_good_ones_do_not_stop_them(llm: LLM) -> None:
    prompts: list[Any] = ["the", [999999], "", [5] * 128, "the"]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    errors = [o.error for o in outputs]
    assert errors[0] is None
    assert errors[4] is None
    assert all(errors[1:4])
    assert [o.outputs[0].finish_reason for o in outputs[1:4]] == ["error"] * 3
    assert outputs[0].outputs[0].token_ids == outputs[4].outputs[0].token_ids


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_length": 5}, ConfigError, "did you mean max_model_len"),
        ({"torch_dtype": "float16"}, ConfigError, "here it is called dtype"),
        ({"task": "embed"}, ConfigError, "not in this version"),
        ({"enable_chunked_prefill": True}, ConfigError, "always computed in chunks"),
        ({"chat_template": "/nowhere.jinja"}, ConfigError, "neither a jinja template nor a file"),
        ({"dtype": "bf16"}, ConfigError, "bfloat16"),
        ({"dtype": 3}, ConfigError, "dtype must be str"),
        ({"max_num_seqs": 0}, ConfigError, "at least 1"),
        ({"max_num_seqs": True}, ConfigError, "max_num_seqs"),
        ({"block_size": 7}, ConfigError, "multiple of 16"),
        ({"gpu_memory_utilization": 1.5}, ConfigError, "at most 1"),
        ({"gpu_memory_utilization": math.nan}, ConfigError, "gpu_memory_utilization"),
        ({"kv_cache_memory": "lots"}, ConfigError, "256MB"),
        ({"kv_cache_memory": "1KB"}, InsufficientMemoryError, "kv_cache_memory to at least"),
        ({"kv_cache_memory": "9000GB"}, InsufficientMemoryError, "at most"),
        ({"max_model_len": 129}, ConfigError, "made for"),
        ({"device": "tpu"}, ConfigError, "not one of auto, cpu, cuda"),
        ({"attention_backend": "flash"}, ConfigError, r"choose one of auto, (\w+, )*cpu, torch"),
        ({"attention_backend": "flashinfer"}, NotInThisVersionError, "FlashInfer .* is not in this version"),
        ({"attention_backend": "TORCH_SDPA"}, ConfigError, "here it is called sdpa"),
        ({"pipeline_depth": 2}, ConfigError, "0 or 1"),
        ({"deterministic": True, "attention_backend": "torch"}, ConfigError, "deterministic"),
        ({"tensor_parallel_size": 2}, NotInThisVersionError, "not in this version"),
        ({"quantization": "awq"}, NotInThisVersionError, "not in this version"),
        ({"enable_lora": True}, NotInThisVersionError, "not in this version"),
    ],
)
def test_bad_options(folder: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(str(folder), **options)


def test_an_unknown_backend_in_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASH_ATTN")
    with pytest.raises(NotInThisVersionError, match=r"VLLM_ATTENTION_BACKEND='FLASH_ATTN'.*choose one of"):
        LLM(str(folder))
    monkeypatch.setenv("OCTAVO_ATTENTION_BACKEND", "sdpa")  # it goes first
    with LLM(str(folder), skip_tokenizer_init=True, dtype="float32") as llm:
        assert llm._engine_parts().config.attention_backend == "sdpa"


def test_unknown_models(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        LLM(str(tmp_path / "nowhere"))
    folder = make_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        LLM(str(folder))


@pytest.mark.parametrize("architecture", ["BertModel", "Qwen3ForSequenceClassification"])
def test_models_that_generate_no_text(tmp_path: Path, architecture: str) -> None:
    folder = make_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    with pytest.raises(
        UnsupportedModelError, match="embeddings, scores and reranking are not in this version"
    ):
        LLM(str(folder))


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": -3}, r"generation_config\.json: temperature must be a number from 0"),
        ({"eos_token_id": "</s>"}, r"generation_config\.json: field 'eos_token_id' must be a token id"),
        ({"top_k": 1.5}, r"generation_config\.json: top_k must be a whole number"),
    ],
)
def test_a_bad_generation_config_is_named(tmp_path: Path, generation: dict[str, Any], message: str) -> None:
    folder = make_checkpoint(tmp_path / "m", generation=generation)
    with pytest.raises(CheckpointError, match=message):
        LLM(str(folder))


def test_fewer_rows_than_requests_is_warned_of_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"kv_cache_memory": "8MB", "max_num_seqs": 8}
    with caplog.at_level(logging.WARNING, "octavo"):
        LLM(str(folder), max_num_batched_tokens=8, **options).shutdown()
        assert "max_num_seqs" not in caplog.text
        LLM(str(folder), max_num_batched_tokens=7, **options).shutdown()
    (record,) = [record for record in caplog.records if "max_num_seqs=8" in record.getMessage()]
    assert "raise max_num_batched_tokens, or lower max_num_seqs" in record.getMessage()


@pytest.mark.parametrize("name", ["embed", "score", "rerank"])
def test_pooling_is_refused(llm: LLM, name: str) -> None:
    with pytest.raises(NotInThisVersionError, match=name):
        getattr(llm, name)(["a"], ["b"]) if name != "embed" else llm.embed(["a"])


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(str(folder))


def test_a_model_without_a_tokenizer_works_on_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("octavo"), "propagate", True)
    folder = make_checkpoint(tmp_path / "m")
    LLM(str(folder), kv_cache_memory="8MB", skip_tokenizer_init=True).shutdown()
    assert f"{folder} holds no tokenizer" not in caplog.text
    with LLM(str(folder), dtype="float32", kv_cache_memory="8MB") as llm:
        assert f"{folder} holds no tokenizer: prompts must be token ids" in caplog.text
        (output,) = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 12
        assert output.outputs[0].text == ""
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.generate("text", GREEDY, use_tqdm=False)
        with pytest.raises(RequestError, match="tokenizer"):
            llm.chat([{"role": "user", "content": "hi"}], GREEDY)


def test_shutdown_is_final_and_may_be_repeated(folder: Path) -> None:
    llm = LLM(str(folder), kv_cache_memory="8MB")
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate("the", GREEDY)


def test_dummy_weights_need_no_files(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with LLM(str(tmp_path), load_format="dummy", kv_cache_memory="8MB") as llm:
        outputs: list[RequestOutput] = llm.generate(["the"], GREEDY, use_tqdm=False)
        assert len(outputs[0].outputs[0].token_ids) == 12


@pytest.mark.parametrize("dtype", ["auto", "half", "bfloat16"])
def test_dtypes(folder: Path, dtype: str) -> None:
    with LLM(str(folder), dtype=dtype, kv_cache_memory="8MB") as llm:
        assert len(generate(llm, "the", temperature=0, ignore_eos=True).token_ids) == 12


# ---------------------------------------------------------------------- several at once, interrupted


def test_streams_open_at_once_each_get_their_own(llm: LLM) -> None:
    alone = [llm.generate(text, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for text in ("a", "the")]
    first, second = llm.generate("a", GREEDY, stream=True), llm.generate("the", GREEDY, stream=True)
    last: dict[str | None, list[int]] = {}
    for one, other in zip(first, second, strict=True):
        last[one.prompt], last[other.prompt] = one.outputs[0].token_ids, other.outputs[0].token_ids
    assert [last["a"], last["the"]] == alone


def test_a_call_inside_a_stream(llm: LLM) -> None:
    stream = llm.generate("a", GREEDY, stream=True)
    next(stream)
    (inner,) = llm.generate("the", GREEDY, use_tqdm=False)
    assert len(inner.outputs[0].token_ids) == 12
    assert list(stream)[-1].finished


def test_a_stream_that_is_never_started_costs_nothing(llm: LLM) -> None:
    llm.generate("a", GREEDY, stream=True)
    assert llm._engine_parts().engine.num_unfinished == 0


def test_an_exception_in_a_step_ends_the_engine_and_is_named(folder: Path) -> None:
    with LLM(str(folder), kv_cache_memory="8MB") as llm:
        engine = llm._engine_parts().engine

        def burn(out: object) -> None:
            raise RuntimeError("the device burns")

        engine.executor.launch = burn  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="burns"):
            llm.generate("a", GREEDY, use_tqdm=False)
        with pytest.raises(EngineDeadError, match="burns"):
            llm.generate("a", GREEDY, use_tqdm=False)


def test_an_interrupt_leaves_the_engine_usable(llm: LLM) -> None:
    engine = llm._engine_parts().engine
    launch = engine.executor.launch

    def interrupted(out: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        launch(out)

    engine.executor.launch = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", GREEDY, use_tqdm=False)
    engine.executor.launch = launch  # type: ignore[method-assign]
    assert engine.num_unfinished == 0
    assert len(generate(llm, "a", temperature=0, ignore_eos=True).token_ids) == 12


def test_wrong_types_are_clear_errors(llm: LLM) -> None:
    assert "SamplingParams" in refused(llm, "a", 5)
    messages: list[Any] = ["hello", {"role": "user", "content": "hi"}, 5]
    for wrong in messages:
        with pytest.raises(RequestError, match="messages must be a list"):
            llm.chat(wrong, GREEDY)


def test_paths_and_numpy_numbers_are_options(folder: Path) -> None:
    options: dict[str, Any] = {"max_num_seqs": np.int64(3), "kv_cache_memory": "8MB"}
    with LLM(folder, **options) as llm:  # type: ignore[arg-type]
        assert len(generate(llm, "a", temperature=0, ignore_eos=True).token_ids) == 12


def test_prompt_logprobs_with_several_samples_are_computed_once(llm: LLM) -> None:
    params = SamplingParams(n=3, prompt_logprobs=0, max_tokens=2, seed=1)
    (output,) = llm.generate("the cat and the hat", params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_statistics_are_logged_where_asked_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LLM(str(folder), kv_cache_memory="8MB", disable_log_stats=False) as llm:
        engine = llm._engine_parts().engine
        assert engine._log is not None
        engine._log._interval = 0.0
        with caplog.at_level(logging.INFO, logger="octavo"):
            llm.generate("the", GREEDY, use_tqdm=False)
    assert any("preemptions 0" in record.message for record in caplog.records)
