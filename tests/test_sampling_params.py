"""SamplingParams: what is legal is kept as it was meant, and rubbish never passes in silence."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import ConfigError, RequestError
from octavo.sampling_params import SamplingParams

FIELDS = [f.name for f in dataclasses.fields(SamplingParams) if f.init]


def refused(**values: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    return caught.value


def test_defaults_are_those_of_the_specification() -> None:
    params = SamplingParams()
    assert (params.n, params.best_of, params.temperature) == (1, None, 1.0)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0, 0, 1)
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (16, 0, False)
    assert (params.logprobs, params.prompt_logprobs, params.skip_special_tokens) == (None, None, True)
    assert params.set_fields == frozenset()
    assert repr(params) == "SamplingParams()"


def test_values_are_normalised() -> None:
    params = SamplingParams(
        stop="END",
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
        logit_bias={"5": 1, 6: -2.5},  # type: ignore[dict-item]
        temperature=1,
        top_p=np.float64(0.5),
        seed=-1,
        structured_outputs={"choice": ["a", "b"]},
    )
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3, 4)
    assert type(params.stop_token_ids[0]) is int
    assert params.logit_bias == {5: 1.0, 6: -2.5}
    assert type(params.temperature) is float
    assert params.seed == 2**64 - 1
    assert params.structured_outputs == {"choice": ("a", "b")}


def test_lists_of_the_caller_are_copied() -> None:
    stop, bias = ["a"], {1: 1.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[2] = 2.0
    assert params.stop == ("a",)
    assert params.logit_bias == {1: 1.0}


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ({"json": '{"type": "object"}'}, {"json": {"type": "object"}}),
        ({"json": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"json_object": True}, {"json": {"type": "object"}}),
        ({"regex": "[0-9]+"}, {"regex": "[0-9]+"}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ],
)
def test_structured_outputs(content: dict[str, Any], kept: dict[str, Any]) -> None:
    assert SamplingParams(structured_outputs=content).structured_outputs == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", 1.0),
        ("n", 10**9),
        ("best_of", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", None),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 5.0),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("seed", 1.5),
        ("seed", "7"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", b"a"),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["1"]),
        ("stop_token_ids", "12"),
        ("include_stop_str_in_output", 1),
        ("bad_words", [""]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [1.0]),
        ("allowed_token_ids", [2**31]),
        ("logit_bias", [1, 2]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 1, "1": 2}),
        ("logit_bias", {True: 1}),
        ("min_tokens", -1),
        ("min_tokens", 2.0),
        ("max_tokens", 0),
        ("max_tokens", "16"),
        ("ignore_eos", "yes"),
        ("logprobs", -1),
        ("logprobs", True),
        ("logprobs", 10**6),
        ("prompt_logprobs", 1.0),
        ("skip_special_tokens", None),
        ("structured_outputs", {}),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}),
        ("structured_outputs", {"xml": "a"}),
        ("structured_outputs", {"json": "{"}),
        ("structured_outputs", {"json": "[1]"}),
        ("structured_outputs", {"json": {"a": object()}}),
        ("structured_outputs", {"regex": ""}),
        ("structured_outputs", {"choice": []}),
        ("structured_outputs", {"choice": "ab"}),
        ("structured_outputs", {"json_object": False}),
        ("structured_outputs", "json"),
        ("num_speculative_tokens", 17),
        ("num_speculative_tokens", -1),
        ("num_speculative_tokens", "many"),
        ("prediction", [1.5]),
        ("prediction", 5),
        ("cache_salt", ""),
        ("cache_salt", 5),
        ("priority", "high"),
        ("priority", 2**70),
        ("trace", 1),
    ],
)
def test_wrong_values_are_refused_and_named(name: str, value: object) -> None:
    error = refused(**{name: value})
    assert error.param == name
    assert name in str(error)
    assert "got" in str(error) or "twice" in str(error)


def test_fields_that_contradict_one_another() -> None:
    assert refused(n=3, best_of=2).param == "best_of"
    assert refused(min_tokens=5, max_tokens=4).param == "min_tokens"
    assert SamplingParams(min_tokens=500, max_tokens=None).min_tokens == 500
    assert SamplingParams(min_tokens=500).max_tokens == 500  # left open, it gives way
    assert SamplingParams(n=2, best_of=4, temperature=0).num_samples == 4


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("max_new_tokens", "max_tokens"),
        ("Max_Tokens", "max_tokens"),
        ("num_return_sequences", "n"),
        ("guided_json", "structured_outputs"),
        ("stop_strings", "stop"),
        ("set_fields", "it knows"),
        ("xyzzy", "it knows"),
    ],
)
def test_unknown_keywords_suggest_the_nearest(name: str, hint: str) -> None:
    values: dict[str, Any] = {name: 1}
    with pytest.raises(RequestError, match=hint) as caught:
        SamplingParams(**values)
    assert caught.value.param == name
    with pytest.raises(RequestError, match=hint):
        SamplingParams.from_dict(values)


def test_positional_values() -> None:
    params = SamplingParams(2, 3, 0.5)
    assert (params.n, params.best_of, params.temperature) == (2, 3, 0.5)
    assert params.set_fields == {"n", "best_of", "temperature"}
    with pytest.raises(RequestError, match="twice"):
        SamplingParams(2, n=3)  # type: ignore[misc]
    with pytest.raises(RequestError, match="at most"):
        SamplingParams(*([1] * 40))  # type: ignore[arg-type]


def test_from_dict_wants_a_dict_with_names() -> None:
    assert SamplingParams.from_dict({"n": 2}) == SamplingParams(n=2)
    for rubbish in ([("n", 2)], "n=2", {1: 2}, None):
        with pytest.raises(RequestError):
            SamplingParams.from_dict(rubbish)  # type: ignore[arg-type]


def test_it_is_frozen_hashable_and_travels() -> None:
    params = SamplingParams(stop="x", logit_bias={1: 2.0}, structured_outputs={"json": {}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert hash(params) == hash(copy.deepcopy(params))
    again = pickle.loads(pickle.dumps(params))
    assert again == params
    assert again.set_fields == params.set_fields
    assert eval(repr(params)) == params


def test_defaults_of_the_model_fill_only_what_was_left_open() -> None:
    config = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": None,
        "repetition_penalty": 1.1,
        "max_new_tokens": 99,
        "do_sample": False,
        "eos_token_id": 2,
    }
    params = SamplingParams(temperature=1.0, min_tokens=3).with_defaults(config)
    assert params.temperature == 1.0  # set by the caller, though to the default
    assert (params.top_p, params.repetition_penalty, params.max_tokens) == (0.9, 1.1, 99)
    assert params.top_k == 0
    assert params.set_fields == {"temperature", "min_tokens"}
    # a filled field is still open for another model
    assert params.with_defaults({"top_p": 0.5}).top_p == 0.5
    assert SamplingParams(min_tokens=50).with_defaults({"max_new_tokens": 20}).max_tokens == 50


def test_an_illegal_default_of_the_model_is_not_the_callers_fault() -> None:
    with pytest.raises(ConfigError, match=r"generation_config.*top_p"):
        SamplingParams().with_defaults({"top_p": 7})


def test_replace_keeps_what_was_set() -> None:
    params = SamplingParams(temperature=0.5).replace(n=2)
    assert (params.n, params.temperature) == (2, 0.5)
    assert params.set_fields == {"n", "temperature"}
    filled = SamplingParams(n=2).with_defaults({"top_p": 0.5}).replace(n=3)
    assert (filled.n, filled.top_p) == (3, 0.5)
    assert filled.set_fields == {"n"}
    with pytest.raises(RequestError, match="temperature"):
        params.replace(temperatur=1)


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    SamplingParams(stop_token_ids=[9], allowed_token_ids=[0, 9], logit_bias={9: 1}).check_for_model(10)
    for name, value in [
        ("stop_token_ids", [10]),
        ("allowed_token_ids", [3, 10]),
        ("logit_bias", {10: 1.0}),
        ("prediction", [10]),
        ("logprobs", 11),
        ("prompt_logprobs", 11),
    ]:
        params = SamplingParams.from_dict({name: value})
        with pytest.raises(RequestError, match=name) as caught:
            params.check_for_model(10)
        assert caught.value.param == name


def test_greedy() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=1e-6).is_greedy
    assert not SamplingParams(temperature=1e-4).is_greedy


rubbish = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), st.floats(), max_size=3),
    st.just(object()),
    st.complex_numbers(),
    st.sets(st.integers(), max_size=2),
)


def legal(name: str, value: object) -> bool:
    """What each field may hold, said a second time and independently of the implementation."""
    is_int = type(value) is int
    is_real = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    number: Any = value
    members: Any = value if isinstance(value, (list, set)) else [None]
    is_ids = all(type(x) is int and 0 <= x < 2**31 for x in members)
    is_texts = all(type(x) is str and x != "" for x in members)
    rules: dict[str, bool] = {
        "n": is_int and 1 <= number <= 16384,
        "best_of": value is None or (is_int and 1 <= number <= 16384),
        "temperature": is_real and 0 <= number <= 100,
        "top_p": is_real and 0 < number <= 1,
        "top_k": is_int and number >= -1,
        "min_p": is_real and 0 <= number <= 1,
        "presence_penalty": is_real and -2 <= number <= 2,
        "frequency_penalty": is_real and -2 <= number <= 2,
        "repetition_penalty": is_real and 0.01 <= number <= 100,
        "seed": value is None or is_int,
        "stop": value is None or (type(value) is str and value != "") or is_texts,
        "stop_token_ids": value is None or is_ids,
        "bad_words": value is None or (type(value) is str and value != "") or is_texts,
        "allowed_token_ids": value is None or (is_ids and len(number) > 0),
        "logit_bias": value is None
        or (
            isinstance(value, dict)
            and all(
                (type(k) is int and 0 <= k < 2**31) or (type(k) is str and k.isascii() and k.isdigit())
                for k in value
            )
            and len({int(k) for k in value}) == len(value)
            and all(-100 <= v <= 100 for v in value.values())
        ),
        "min_tokens": is_int and number >= 0,
        "max_tokens": value is None or (is_int and number >= 1),
        "logprobs": value is None or (is_int and 0 <= number <= 1024),
        "prompt_logprobs": value is None or (is_int and 0 <= number <= 1024),
        "structured_outputs": value is None,
        "num_speculative_tokens": value is None or value == "auto" or (is_int and 0 <= number <= 16),
        "prediction": value is None or type(value) is str or is_ids,
        "cache_salt": value is None or (type(value) is str and value != ""),
        "priority": is_int and -(2**63) <= number < 2**63,
    }
    return rules.get(name, type(value) is bool)


@given(name=st.sampled_from(FIELDS), value=rubbish)
def test_rubbish_never_passes_silently(name: str, value: object) -> None:
    if legal(name, value):
        params = SamplingParams(**{name: value})  # type: ignore[arg-type]
        assert params.set_fields == {name}
        return
    values: dict[str, Any] = {name: value}
    error = refused(**values)
    assert error.param == name
    assert name in str(error)
    assert len(str(error)) < 300


@given(values=st.dictionaries(st.sampled_from(FIELDS), rubbish, max_size=4))
def test_several_fields_at_once_are_legal_or_a_request_error(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams.from_dict(values)
    except RequestError:
        return
    assert params.set_fields == set(values)
    assert eval(repr(params), {"SamplingParams": SamplingParams}) == params
