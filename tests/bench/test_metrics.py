"""Figures from records, checked by hand; events from bytes; what the terminal shows."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.bench.banner import outcome
from octavo.bench.live import Progress, TerminalView, request_line
from octavo.bench.metrics import client_verdict, engine_metrics, quantile, repeats, summarize, t95
from octavo.bench.record import RequestRecord, RunResult
from octavo.bench.slo import count_good
from octavo.bench.sse import EventReader
from octavo.bench.targets.url import read_metrics


def answered(index: int, start: float, arrivals: list[tuple[float, int]], **more: object) -> RequestRecord:
    record = RequestRecord(index, scheduled_time=start, sent_time=start, arrivals=arrivals, prompt_tokens=10)
    record.first_token_time, record.end_time = arrivals[0][0], arrivals[-1][0]
    record.generated_tokens = sum(tokens for _, tokens in arrivals)
    for name, value in more.items():
        setattr(record, name, value)
    record.derive(open_loop=True)
    return record


def test_a_summary_by_hand() -> None:
    one = answered(0, 0.0, [(0.2, 1), (0.3, 2), (0.6, 1)], drafted=4, accepted=2, num_verifications=3,
                   drafted_by_position=[2, 2], accepted_by_position=[2, 0],
                   reached_by_position=[2, 2])  # fmt: skip
    other = answered(1, 1.0, [(1.4, 1)], drafted=1, accepted=0, num_verifications=1,
                     drafted_by_position=[1], accepted_by_position=[0], reached_by_position=[1])  # fmt: skip
    failed = RequestRecord(2, scheduled_time=1.0, error="http_500: no", generated_tokens=9)
    s = summarize([one, other, failed], 2.0, slo="ttft=300ms,tpot=200ms")
    assert (s["total_requests"], s["failed_requests"], s["failures"]) == (3, 1, {"http_500": 1})
    assert (s["total_tokens"], s["total_prompt_tokens"]) == (5, 20)
    assert s["overall_throughput"] == 2.5
    assert s["request_throughput"] == 1.0
    assert s["avg_ttft"] == pytest.approx(0.3)
    assert s["avg_latency"] == pytest.approx(0.5)
    assert one.tpot == pytest.approx(0.4 / 3)
    assert other.tpot is None  # of one token there is none
    assert s["tpot"]["mean"] == pytest.approx(0.4 / 3)
    assert s["itl"]["mean"] == pytest.approx(0.2)  # gaps of 0.1 and 0.3: not the same as TPOT
    assert s["avg_acceptance_rate"] == pytest.approx(2 / 5)
    assert s["mean_acceptance_length"] == pytest.approx(1 + 2 / 4)
    assert s["acceptance_by_position"] == pytest.approx([2 / 3, 0.0])
    assert s["acceptance_by_position_conditional"] == pytest.approx([2 / 3, 0.0])
    assert s["goodput"] == 0.5
    assert s["slo"]["share"] == pytest.approx(1 / 3)
    assert count_good([other], {"tpot": 0.01}) == 1


def test_nothing_measured_is_none_and_not_zero() -> None:
    s = summarize([RequestRecord(0, error="refused: x")], 1.0)
    assert s["avg_ttft"] is None
    assert s["ttft"] == dict.fromkeys(("mean", "p50", "p90", "p95", "p99"))
    assert s["avg_acceptance_rate"] is None
    assert s["total_drafted"] is None
    assert s["acceptance_by_position"] == []
    assert s["goodput"] is None


def test_acceptance_knows_both_denominators() -> None:
    """Two drafts of two; one fails at once, so its second was drafted and never reached."""
    record = answered(0, 0, [(1, 1)], drafted=4, accepted=2, num_verifications=2, drafted_by_position=[2, 2],
                      accepted_by_position=[1, 1], reached_by_position=[2, 1])  # fmt: skip
    s = summarize([record], 1.0)
    assert s["acceptance_by_position"] == [0.5, 0.5]
    assert s["acceptance_by_position_conditional"] == [0.5, 1.0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-6)


def test_a_client_is_judged_by_both_lags() -> None:
    good = [answered(i, float(i), [(i + 1.0, 5)]) for i in range(20)]
    assert client_verdict(good, [0.001] * 100, open_loop=True)["valid"]
    # The limit is 2% of a latency of one second: 20 ms.
    assert client_verdict(good, [0.015] * 100, open_loop=True)["valid"]
    verdict = client_verdict(good, [0.03] * 100, open_loop=True)
    assert not verdict["valid"]
    assert "event loop lag" in verdict["reason"]
    for record in good:
        record.sent_time = record.scheduled_time + 0.05
    assert "dispatch lag" in client_verdict(good, [], open_loop=True)["reason"]
    assert client_verdict(good, [], open_loop=False)["valid"]  # a closed load has no moments to keep


def test_repeats_have_students_interval() -> None:
    told = repeats([{"overall_throughput": value, "avg_ttft": None} for value in (10.0, 12.0, 14.0)])
    spread = told["spread"]["overall_throughput"]
    assert spread["mean"] == 12.0
    assert spread["stdev"] == pytest.approx(2.0)
    assert spread["ci95"] == pytest.approx(4.30 * 2 / 3**0.5, rel=1e-3)
    assert "avg_ttft" not in told["spread"]
    assert repeats([{"overall_throughput": 1.0}])["spread"]["overall_throughput"]["ci95"] is None
    assert t95(100) == 1.96


def test_engine_metrics_are_of_the_measured_part() -> None:
    told = engine_metrics(
        {"steps": 5, "prefix_queries": 10, "prefix_hits": 10},
        {"steps": 25, "prefix_queries": 30, "prefix_hits": 15},
        [{"kv_usage": 0.2}, {"kv_usage": 0.6, "running": 3}],
        "the engine",
    )
    assert told["steps"] == 20
    assert told["prefix_cache"] == {"queries": 20, "hits": 5, "hit_rate": 0.25}
    assert told["kv_usage"] == {"mean": pytest.approx(0.4), "peak": 0.6}
    assert told["preemptions"] is None
    assert told["running_peak"] == 3


# ---------------------------------------------------------------------- bytes

EVENTS = (
    b'data: {"a": "\xc3\xa4\xe4\xb8\xad"}\r\n\r\n: waiting\n\n'
    b"event: x\ndata: one\ndata:two\n\ndata: [DONE]\n\n"
)


@settings(max_examples=50)
@given(st.lists(st.integers(0, len(EVENTS)), max_size=12))
def test_events_are_the_same_wherever_the_network_cuts(cuts: list[int]) -> None:
    reader, found = EventReader(), []
    places = [0, *sorted(cuts), len(EVENTS)]
    for begin, end in itertools.pairwise(places):
        found += reader.feed(EVENTS[begin:end])
    assert found == ['{"a": "ä中"}', "one\ntwo", "[DONE]"]
    assert not reader.pending


def test_an_event_belongs_to_the_piece_that_completes_it() -> None:
    reader = EventReader()
    assert reader.feed(b"data: x\n") == []
    assert reader.pending
    assert reader.feed(b"\n") == ["x"]


def test_metrics_pages_of_both_engines() -> None:
    page = (
        "# HELP octavo:engine_steps_total Steps.\n"
        'octavo:engine_steps_total{model_name="m",engine="0"} 7.0\n'
        'octavo:engine_rows_total{kind="prompt"} 30\n'
        'octavo:engine_rows_total{kind="decode"} 40\n'
        'octavo:num_requests_running{engine="0"} 2\n'
        'octavo:num_requests_running{engine="1"} 3\n'
        "octavo:num_requests_open 9\n"
    )
    assert read_metrics(page) == {"steps": 7, "prompt_rows": 30, "decode_rows": 40, "running": 5}
    assert read_metrics('vllm:spec_decode_num_drafts_total{engine="0"} 4.0\n') == {"verifications": 4}
    assert read_metrics("<html>no</html>") == {}


# ---------------------------------------------------------------------- for people


def test_lines_for_requests() -> None:
    record = answered(0, 0.0, [(0.5, 1), (1.25, 99)], drafted=8, accepted=6)
    assert request_line(record) == "Generated 100 tokens in 1.250 s (6 of 8 drafts accepted)"
    assert "FAILED: timeout: no" in request_line(RequestRecord(3, "p3", error="timeout: no"))


def test_the_table_knows_what_is_not_known() -> None:
    progress = Progress(10)
    rows = dict(progress.rows())
    assert rows["requests"] == "0 of 10"
    assert rows["TTFT"] == rows["acceptance"] == rows["power"] == "-"
    progress.add(answered(0, 0.0, [(0.5, 4)], drafted=4, accepted=3))
    progress.add(RequestRecord(1, error="x: y"))
    progress.readings = {"watts": 71.6, "running": 2}
    rows = dict(progress.rows())
    assert rows["requests"] == "2 of 10, 1 FAILED"
    assert rows["acceptance"] == "75.0%"
    assert rows["power"] == "72 W"
    assert rows["TTFT"].startswith("p50 500 ms")


def test_a_stream_that_is_no_terminal_gets_lines_alone() -> None:
    stream = io.StringIO()
    view = TerminalView(stream)
    view.begin(2, "octavo target_ar")
    view.ended(answered(0, 0.0, [(0.5, 4)]))
    view.readings({"watts": 3.0})
    view.end()
    assert stream.getvalue().splitlines() == [
        "octavo bench: measuring octavo target_ar, 2 requests",
        "Generated 4 tokens in 0.500 s",
    ]


def test_a_terminal_gets_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    view = TerminalView(stream)
    view.begin(2, "octavo target_ar")
    view.ended(answered(0, 0.0, [(0.5, 4)]))
    view.readings({"watts": 3.0})
    view.end()
    said = stream.getvalue()
    assert "Generated 4 tokens in 0.500 s" in said
    assert "1 of 2" in said
    assert "3 W" in said


def test_the_outcome_says_what_failed_and_what_is_invalid() -> None:
    result = RunResult("octavo", "target_ar")
    result.requests = [answered(0, 0.0, [(0.5, 4)]), RequestRecord(1, error="refused: nobody")]
    result.summary = summarize(result.requests, 1.0, lags=[1.0] * 50)
    result.summary["repeats"] = repeats([result.summary])
    text = "\n".join(outcome(result))
    assert "1 of 2 requests answered" in text
    assert "FAILED: 1 requests: refused: nobody" in text
    assert "INVALID: the client could not keep up" in text
    assert "Energy: not measured" in text
