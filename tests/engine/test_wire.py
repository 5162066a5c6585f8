"""Messages between the front end and the engine's process survive the way, and nothing else passes."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine import wire
from octavo.engine.engine_stats import EngineStats
from octavo.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SpeculationMetrics,
    SpeculationStep,
)
from octavo.sampling_params import SamplingParams


def body(message: wire.Message) -> bytes:
    (found,) = wire.FrameReader().feed(wire.frame(message))
    return found


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(max_tokens=None, min_tokens=3, temperature=0.0),
        SamplingParams(stop=["a", "ü"], bad_words=["x y"], stop_token_ids=[5], allowed_token_ids=[1, 2]),
        SamplingParams(logit_bias={7: -1.5, 2**31 - 1: 100.0}, seed=2**64 - 1, logprobs=3, prompt_logprobs=0),
        SamplingParams(structured_outputs={"json": {"type": "integer", "maximum": 10**40}}),
        SamplingParams(structured_outputs={"choice": ["yes", "no"]}),
        SamplingParams(prediction=[1, 2, 3], num_speculative_tokens="auto", priority=-4, cache_salt="s"),
        SamplingParams(n=2, best_of=3, trace=True),
    ],
)
def test_sampling_parameters_are_the_same_at_the_other_end(params: SamplingParams) -> None:
    message = wire.read_to_engine(
        body(wire.Admit(1, [1, 2, 3], wire.params_to_wire(params), "delta", True, 12.5))
    )
    assert isinstance(message, wire.Admit)
    assert SamplingParams(**message.params) == params


def outputs() -> st.SearchStrategy[RequestOutput]:
    finite = st.floats(allow_nan=False)
    logprob = st.builds(Logprob, finite, st.none() | st.integers(1, 10), st.none() | st.text(max_size=3))
    at = st.dictionaries(st.integers(0, 2**31 - 1), logprob, max_size=3)
    answer = st.builds(
        CompletionOutput,
        st.integers(0, 5),
        st.text(max_size=10),
        st.lists(st.integers(0, 2**31 - 1), max_size=5),
        st.none() | finite,
        st.none() | st.lists(at, max_size=3),
        st.sampled_from([None, "stop", "length", "abort", "error"]),
        st.none() | st.integers(0, 100) | st.text(max_size=4),
        st.none() | st.text(max_size=4),
    )
    speculation = st.builds(
        SpeculationMetrics,
        drafted=st.integers(0, 9),
        accepted_by_position=st.lists(st.integers(0, 9), max_size=3),
        steps=st.none()
        | st.lists(st.builds(SpeculationStep, st.just([1, 2]), st.just(1), st.just(2), st.text())),
        net_speedup=st.none() | st.floats(0, 4),
    )
    metrics = st.builds(
        RequestMetrics,
        arrival_time=finite,
        first_token_time=st.none() | finite,
        num_output_tokens=st.integers(0, 99),
        speculation=st.none() | speculation,
    )
    return st.builds(
        RequestOutput,
        request_id=st.just("user's own"),
        prompt=st.just("text"),
        prompt_token_ids=st.just([1, 2]),
        prompt_logprobs=st.none() | st.lists(st.none() | at, max_size=3),
        outputs=st.lists(answer, min_size=1, max_size=3),
        finished=st.booleans(),
        metrics=metrics,
    )


@settings(deadline=None)
@given(outputs())
def test_outputs_are_the_same_at_the_other_end(output: RequestOutput) -> None:
    message = wire.read_from_engine(body(wire.Outputs([wire.output_to_wire(3, output, True)])))
    assert isinstance(message, wire.Outputs)
    (found,) = message.outputs
    assert found.key == 3
    again = wire.output_from_wire(found, "user's own", "text", [1, 2])
    if not output.finished:
        output.metrics = None  # they travel with the last output
    assert again == output
    assert type(again.outputs[0].finish_reason) is type(output.outputs[0].finish_reason)


def test_prompt_logprobs_travel_when_they_are_asked_to() -> None:
    output = RequestOutput("a", None, [1, 2], [None, {2: Logprob(-1.0)}], [CompletionOutput(0)])
    assert wire.output_to_wire(1, output, True).prompt_logprobs is not None
    assert wire.output_to_wire(1, output, False).prompt_logprobs is None


def test_stats_with_speculation() -> None:
    speculation = SpeculationMetrics(drafted=4, accepted=3, accepted_by_position=[2, 1])
    stats = EngineStats(1, 2, 30, 4, num_steps=9, speculation=speculation)
    message = wire.read_from_engine(body(wire.Stats(7, stats, None)))
    assert message == wire.Stats(7, stats, None)
    assert stats.kv_usage == pytest.approx(4 / 30)


@settings(deadline=None)  # the machines that run tests are busy
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=10),
    st.lists(st.integers(1, 500), min_size=1, max_size=10),
)
def test_frames_are_found_in_any_pieces(sizes: list[int], pieces: list[int]) -> None:
    messages = [wire.Abort(list(range(size))) for size in sizes]
    stream = b"".join(map(wire.frame, messages))
    reader, found, at = wire.FrameReader(), [], 0
    for step in itertools.cycle(pieces):
        if at >= len(stream):
            break
        found += reader.feed(stream[at : at + step])
        at += step
    assert [wire.read_to_engine(one) for one in found] == messages


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(["Admit", "no number", [], {}, "delta", True, 0.0]),
        msgspec.msgpack.encode(["Admit", 1]),
        msgspec.msgpack.encode(["Ready", "x"]),  # not for this side
        msgspec.msgpack.encode(["os.system", "true"]),
        msgspec.msgpack.encode({"Admit": 1}),
    ],
)
def test_what_is_no_message_is_an_error(damaged: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        wire.read_to_engine(damaged)


def test_an_impossible_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        wire.FrameReader().feed(struct.pack("<I", 2**31) + b"x")


def test_half_a_surrogate_is_refused_when_it_is_sent() -> None:
    params: dict[str, Any] = wire.params_to_wire(SamplingParams(stop=["\ud800"]))
    with pytest.raises(UnicodeEncodeError):
        wire.frame(wire.Admit(1, [1], params, "delta", True, 0.0))
