"""The output classes: derived times, speculation counts, and reprs that fit a line."""

from __future__ import annotations

import pickle

import pytest

from octavo.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, SpeculationMetrics


def test_times_follow_their_definitions() -> None:
    metrics = RequestMetrics(
        arrival_time=10.0,
        first_scheduled_time=10.5,
        first_token_time=11.0,
        finished_time=15.0,
        num_output_tokens=5,
    )
    assert metrics.queue_time == 0.5
    assert metrics.ttft == 1.0
    assert metrics.e2e == 5.0
    assert metrics.tpot == 1.0  # (e2e - ttft) / (n_out - 1)
    assert "ttft=1000.0 ms" in repr(metrics)


def test_times_are_none_until_they_are_known() -> None:
    metrics = RequestMetrics(arrival_time=10.0)
    assert (metrics.queue_time, metrics.ttft, metrics.e2e, metrics.tpot) == (None, None, None, None)
    assert metrics.trace is None
    one_token = RequestMetrics(10.0, 10.0, 11.0, 12.0, num_output_tokens=1)
    assert one_token.tpot is None
    assert "tpot" not in repr(one_token)


def test_speculation_counts_by_position() -> None:
    speculation = SpeculationMetrics()
    assert speculation.acceptance_rate is None
    assert speculation.mean_acceptance_length is None
    speculation.record(4, 2)
    speculation.record(2, 2)
    speculation.record(0, 0)
    assert (speculation.drafted, speculation.accepted, speculation.num_steps) == (6, 4, 3)
    assert speculation.drafted_by_position == [2, 2, 1, 1]
    assert speculation.accepted_by_position == [2, 2, 0, 0]
    assert speculation.acceptance_rate == pytest.approx(4 / 6)
    assert speculation.mean_acceptance_length == pytest.approx(1 + 4 / 3)
    with pytest.raises(ValueError, match="cannot be"):
        speculation.record(1, 2)


def test_reprs_are_short_and_say_what_matters() -> None:
    text = "word " * 100
    done = CompletionOutput(0, text, list(range(100)), finish_reason="stop", stop_reason="END")
    output = RequestOutput("r-1", text, [1, 2, 3], outputs=[done], finished=True)
    assert "100 tokens" in repr(output)
    assert "stop_reason='END'" in repr(output)
    assert len(repr(output)) < 300
    assert "unfinished" in repr(RequestOutput("r-2", None, [1, 2, 3]))
    assert "3 token ids" in repr(RequestOutput("r-2", None, [1, 2, 3]))


def test_errors_are_found_and_answers_iterated() -> None:
    fine = CompletionOutput(0, "a", finish_reason="length")
    failed = CompletionOutput(1, finish_reason="error", error="the prompt is too long")
    output = RequestOutput("r", "p", [1], outputs=[fine, failed])
    assert list(output) == [fine, failed]
    assert output.error == "the prompt is too long"
    assert "too long" in repr(failed)
    assert RequestOutput("r", "p", [1], outputs=[fine]).error is None
    assert fine.finished
    assert not CompletionOutput(0).finished


def test_outputs_travel_between_processes() -> None:
    answer = CompletionOutput(0, "a", [5], -0.5, [{5: Logprob(-0.5, 1, "a")}])
    output = RequestOutput("r", "p", [1], outputs=[answer], metrics=RequestMetrics(1.0))
    assert pickle.loads(pickle.dumps(output)) == output
