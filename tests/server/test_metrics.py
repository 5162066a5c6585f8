"""The metrics page: names that dashboards for vLLM know, figures that add up, and the dashboard itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo.engine.engine_stats import EngineStats
from octavo.outputs import RequestMetrics, RequestOutput, SpeculationMetrics
from octavo.server.metrics import Histogram, MetricsPage, ServerMetrics
from octavo.server.usage import UsageCounter
from tests.server.fake_engine import INFO

ROOT = Path(__file__).resolve().parent.parent.parent

# As vLLM has them (0.26), without their prefix.
VLLM_NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries",
    "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens", "request_success",
    "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_params_n", "request_params_max_tokens", "cache_config_info",
    "spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
}  # fmt: skip


def speculation() -> SpeculationMetrics:
    found = SpeculationMetrics(net_speedup=1.5)
    for accepted in (0, 1, 3):
        found.record(3, accepted)
    return found


def page(metrics: ServerMetrics, stats: EngineStats | None) -> dict[str, Any]:
    body, content_type = MetricsPage(metrics).render(INFO, stats, num_open=3, is_up=True)
    assert content_type.startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def value(families: dict[str, Any], name: str, suffix: str = "", **labels: str) -> float:
    (found,) = [
        sample.value
        for sample in families[name].samples
        if sample.name == name + suffix and labels.items() <= sample.labels.items()
    ]
    return float(found)


STATS = EngineStats(2, 5, 100, 25, num_steps=9, num_chunk_rows=70, num_verify_rows=30, num_preemptions=1,
                    num_prefix_queries=60, num_prefix_hits=16, speculation=speculation())  # fmt: skip


def test_joules_by_counter_where_the_hardware_tells() -> None:
    assert "octavo:energy_joules" not in page(ServerMetrics(), STATS)
    families = page(ServerMetrics(), replace(STATS, energy_joules={"gpu:0": 12.5, "gpu:1": 3.0}))
    assert value(families, "octavo:energy_joules", "_total", counter="gpu:0") == 12.5
    assert value(families, "octavo:energy_joules", "_total", counter="gpu:1") == 3.0


def test_the_usage_tells_joules_only_where_they_were_measured() -> None:
    usage = UsageCounter(4)
    for joules in (None, 1.25, 0.5):  # several prompts
        metrics = RequestMetrics(0.0, energy_joules=joules)
        usage.note(RequestOutput("r", None, [1], outputs=[], finished=True, metrics=metrics))
        if joules is None:
            assert "energy_joules" not in usage.usage()
    assert usage.usage()["energy_joules"] == 1.75


@pytest.mark.parametrize("prefix", ["octavo", "vllm"])
def test_the_names_are_vllms(prefix: str) -> None:
    families = page(ServerMetrics(prefix), STATS)
    assert {f"{prefix}:{name}" for name in VLLM_NAMES} <= set(families)
    for family in families.values():
        for sample in family.samples:
            if sample.name.startswith(prefix):
                assert sample.labels["model_name"] == "fake"


def test_the_figures_are_the_engines_and_the_servers() -> None:
    metrics = ServerMetrics()
    metrics.num_prompt_tokens, metrics.num_generation_tokens = 10, 20
    metrics.rejected["queue_full"] = 4
    metrics.http["POST", "/v1/chat/completions", 200] = 6
    timing = RequestMetrics(100.0, 100.5, 101.0, 103.0, num_prompt_tokens=7, num_output_tokens=5)
    metrics.request_ended(["stop"], timing)
    metrics.request_ended(["abort"], None)
    families = page(metrics, STATS)
    assert value(families, "octavo:engine_up") == 1
    assert value(families, "octavo:num_requests_open") == 3
    assert value(families, "octavo:num_requests_running") == 2
    assert value(families, "octavo:num_requests_waiting") == 5
    assert value(families, "octavo:kv_cache_usage_perc") == 0.25
    assert value(families, "octavo:prefix_cache_hits", "_total") == 16
    assert value(families, "octavo:prompt_tokens", "_total") == 10
    assert value(families, "octavo:generation_tokens", "_total") == 20
    for reason in ("stop", "abort"):
        assert value(families, "octavo:request_success", "_total", finished_reason=reason) == 1
    assert value(families, "octavo:requests_rejected", "_total", reason="queue_full") == 4
    assert value(families, "http_requests", "_total", handler="/v1/chat/completions", status="200") == 6
    for name, total in (
        ("e2e_request_latency_seconds", 3.0), ("request_queue_time_seconds", 0.5),
        ("request_prefill_time_seconds", 0.5), ("request_decode_time_seconds", 2.0),
        ("request_inference_time_seconds", 2.5), ("request_time_per_output_token_seconds", 0.5),
        ("request_prompt_tokens", 7.0), ("request_generation_tokens", 5.0),
    ):  # fmt: skip
        assert value(families, f"octavo:{name}", "_sum") == pytest.approx(total), name
        assert value(families, f"octavo:{name}", "_count") == 1
    assert value(families, "octavo:spec_decode_num_accepted_tokens", "_total") == 4
    assert value(families, "octavo:spec_decode_num_draft_tokens", "_total") == 9
    by_position = [
        value(families, "octavo:spec_decode_num_accepted_tokens_per_pos", "_total", position=str(i))
        for i in range(3)
    ]
    assert by_position == [2, 1, 1]
    assert value(families, "octavo:spec_decode_net_speedup") == 1.5


def test_there_is_a_page_without_an_engine() -> None:
    body, _ = MetricsPage(ServerMetrics()).render(None, None, num_open=0, is_up=False)
    families = {f.name: f for f in text_string_to_metric_families(body.decode())}
    assert value(families, "octavo:engine_up") == 0
    assert "octavo:num_requests_running" not in families
    body, content_type = MetricsPage(ServerMetrics()).render(
        INFO, STATS, num_open=0, is_up=True, accept="application/openmetrics-text; version=1.0.0"
    )
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert body.count(b"# EOF") == 1


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for one in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(one)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 12.0


def test_the_dashboard_asks_for_nothing_that_is_not_there() -> None:
    board = json.loads((ROOT / "dashboards" / "grafana.json").read_text())
    families = page(ServerMetrics(), STATS)
    samples = {sample.name for family in families.values() for sample in family.samples}
    counters_without_samples = {
        f"{family.name}_total" for family in families.values() if family.type == "counter"
    }
    known = samples | counters_without_samples
    asked = set()
    for panel in board["panels"]:
        assert panel["title"]
        for target in panel.get("targets", []):
            expression = target["expr"].replace("${prefix}", "octavo")
            asked |= set(re.findall(r"\b(?:octavo:|http_|process_)[a-zA-Z0-9_:]+", expression))
            assert expression.count("(") == expression.count(")")
    assert len(asked) >= 15
    assert asked - known == set()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
