"""The run itself, with a target that is none: loads, warm-up, repeats, failures, what the result says."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from octavo.bench.load import LoadPlan, run_load
from octavo.bench.metrics import summarize
from octavo.bench.prompts import Prompt, PromptSource
from octavo.bench.record import RequestRecord, RunResult, load, save
from octavo.bench.runner import run
from octavo.bench.spec import LoadSpec, RunSpec, SamplingSpec
from octavo.bench.sweep import SweepPlan, keeps_up, point_path, sweep
from octavo.errors import ConfigError, OctavoError
from tests.bench.fakes import FakeTarget
from tests.checkpoints import make_checkpoint

CLOSED = LoadSpec("closed", num_prompts=6, concurrency=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=True))


def spec_of(model: str, load: LoadSpec, **more: object) -> RunSpec:
    return RunSpec(model=model, load=load, sampling=SamplingSpec(max_tokens=4), monitor=False, **more)  # type: ignore[arg-type]


def prompts(count: int = 6) -> list[Prompt]:
    return [Prompt(f"p{i}", messages=({"role": "user", "content": f"number {i}"},)) for i in range(count)]


def test_a_closed_load_keeps_its_concurrency(model: str) -> None:
    target = FakeTarget(pause=0.005)
    result = run(spec_of(model, CLOSED), prompts(), target=target)
    assert target.peak == 2
    assert target.events == ["open", "close"]
    assert [r.index for r in result.requests] == list(range(6))
    assert result.summary["total_tokens"] == 6 * 4
    assert result.exit_code == int(not result.valid)
    # Two pieces of two tokens: one gap, and a TPOT of that gap over three tokens.
    first = result.requests[0]
    assert len(first.itl) == 1
    assert first.tpot == pytest.approx(first.itl[0] / 3)
    assert first.latency == pytest.approx((first.end_time or 0) - (first.sent_time or 0))


def test_the_warm_up_is_not_counted_and_finds_nothing_for_the_rest(model: str) -> None:
    target = FakeTarget()
    result = run(spec_of(model, CLOSED, warmup_requests=2), prompts(), target=target)
    assert len(target.asked) == 8
    assert result.summary["total_requests"] == 6
    warm, measured = target.asked[:2], target.asked[2:]
    assert {request.cache_salt for request in warm} == {"warm-up"}
    assert {request.prompt_token_ids for request in warm}.isdisjoint({r.prompt_token_ids for r in measured})
    assert result.engine_metrics["steps"] == 6  # counters of the measured part alone


def test_every_engine_gets_ids_of_the_models_own_template(model: str) -> None:
    from octavo.engine.tokenizer import Tokenizer

    target = FakeTarget()
    run(spec_of(model, CLOSED, warmup_requests=0), prompts(), target=target)
    tokenizer = Tokenizer.from_folder(model)
    assert tokenizer is not None
    wanted = tokenizer.encode(
        "<|im_start|>user\nnumber 0<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )
    assert list(target.asked[0].prompt_token_ids or ()) == wanted


def test_repeats_have_salts_of_their_own_and_a_spread(model: str) -> None:
    target = FakeTarget(pause=0.001)
    result = run(spec_of(model, CLOSED, repeat=3, warmup_requests=0), prompts(), target=target)
    assert len(result.requests) == 18
    assert [r.repeat for r in result.requests] == [0] * 6 + [1] * 6 + [2] * 6
    assert {request.cache_salt for request in target.asked} == {"0", "1", "2"}
    repeats = result.summary["repeats"]
    assert repeats["count"] == 3
    spread = repeats["spread"]["overall_throughput"]
    assert spread["min"] <= spread["mean"] <= spread["max"]
    assert spread["ci95"] > 0
    # The repeats' times lie on one clock, one behind the other.
    assert result.requests[6].scheduled_time >= max(r.end_time or 0 for r in result.requests[:6]) - 1e-6


def test_open_latency_counts_from_the_scheduled_moment(model: str) -> None:
    """One slot, all at once: the last of six waited for five others, and that is its latency."""
    target = FakeTarget(pause=0.02, pieces=4, slots=1)
    load = LoadSpec("constant", num_prompts=6, rate=float("inf"))
    result = run(spec_of(model, load, warmup_requests=0), prompts(), target=target)
    latencies = [r.latency or 0 for r in result.requests]
    assert latencies == sorted(latencies)
    assert latencies[-1] >= 6 * 0.02
    assert all(r.scheduled_time == result.requests[0].scheduled_time for r in result.requests)
    assert all(r.ttft is not None and r.ttft >= 0.02 * (i + 1) for i, r in enumerate(result.requests))


def test_a_late_client_is_in_the_latency_and_makes_the_run_invalid(model: str) -> None:
    class Blocking(FakeTarget):
        async def _answer(self, request, answer):  # type: ignore[no-untyped-def]
            time.sleep(0.05)  # nobody else runs meanwhile: the event loop is the bottleneck
            await super()._answer(request, answer)

    load = LoadSpec("constant", num_prompts=6, rate=100.0)
    result = run(spec_of(model, load, warmup_requests=0), prompts(), target=Blocking())
    last = result.requests[-1]
    assert (last.sent_time or 0) - last.scheduled_time > 0.1
    assert (last.latency or 0) > 0.15
    assert not result.valid
    assert result.exit_code == 1
    assert "could not keep up" in result.summary["client"]["reason"]
    assert any(warning.startswith("INVALID") for warning in result.warnings)


def test_failures_are_counted_and_kept(model: str) -> None:
    result = run(spec_of(model, CLOSED), prompts(), target=FakeTarget(fails=[1, 4]))
    assert result.summary["failed_requests"] == 2
    assert result.summary["failures"] == {"engine": 2}
    assert [r.index for r in result.failures] == [1, 4]
    assert result.failures[0].error == "engine: told to fail"
    assert result.summary["total_tokens"] == 4 * 4
    assert result.exit_code == 1


def test_an_engine_that_answers_nothing_ends_the_run_at_once(model: str) -> None:
    class Dead(FakeTarget):
        async def generate(self, request, answer):  # type: ignore[no-untyped-def]
            raise RuntimeError("out of order")

    target = Dead()
    with pytest.raises(OctavoError, match="answered no request of the warm-up: RuntimeError: out of order"):
        run(spec_of(model, CLOSED), prompts(), target=target)
    assert target.events == ["open", "close"]


def test_a_failed_opening_is_closed_as_well(model: str) -> None:
    target = FakeTarget(open_error="no memory")
    with pytest.raises(OctavoError, match="no memory"):
        run(spec_of(model, CLOSED), prompts(), target=target)
    assert target.events == ["open", "close"]


def test_a_request_that_hangs_is_ended_and_recorded() -> None:
    class Hanging(FakeTarget):
        cancelled = False

        async def _answer(self, request, answer):  # type: ignore[no-untyped-def]
            answer.arrived(1)
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                Hanging.cancelled = True
                raise

    from octavo.bench.target import TargetRequest

    plan = LoadPlan([TargetRequest(0, "p", 4, (1,))], [0.0], timeout=0.05)
    (record,) = asyncio.run(run_load(Hanging(), plan, time.monotonic())).records
    assert record.error == "timeout: no end within 0.05 s"
    assert Hanging.cancelled
    assert record.ttft is not None
    assert record.generated_tokens == 1


def test_a_closed_load_by_time_goes_round(model: str) -> None:
    load = LoadSpec("closed", duration=0.15, concurrency=2)
    target = FakeTarget(pause=0.002)
    result = run(spec_of(model, load, warmup_requests=0), prompts(2), target=target)
    assert result.summary["total_requests"] > 2
    assert {r.prompt_id for r in result.requests} == {"p0", "p1"}
    assert result.summary["total_duration"] >= 0.15


def test_the_result_file_holds_what_was_promised(model: str, tmp_path: Path) -> None:
    result = run(spec_of(model, CLOSED, slo="ttft=10s"), prompts(), target=FakeTarget())
    path = save(result, tmp_path / "r.json")
    plain = json.loads(path.read_text())
    assert list(plain) == [
        "schema_version", "engine", "method", "effective_config", "environment", "warnings", "summary",
        "requests",
        "engine_metrics", "gpu_monitoring",
    ]  # fmt: skip
    for key in (
        "total_requests", "failed_requests", "total_duration", "total_tokens", "total_prompt_tokens",
        "overall_throughput", "request_throughput", "avg_ttft", "avg_latency", "avg_acceptance_rate",
        "mean_acceptance_length", "acceptance_by_position", "acceptance_by_position_conditional",
        "ttft", "tpot",
        "itl", "e2el", "queue_time", "goodput",
    ):  # fmt: skip
        assert key in plain["summary"], key
    for key in (
        "gpu_ids", "duration", "total_energy_consumed", "total_energy_all_gpus", "idle_power",
        "average_power",
        "peak_power", "average_utilization", "average_memory_usage", "peak_temperature", "tokens_per_joule",
        "joules_per_token", "tokens_per_kwh", "snapshots",
    ):  # fmt: skip
        assert key in plain["gpu_monitoring"], key
    assert set(plain["summary"]["ttft"]) == {"mean", "p50", "p90", "p95", "p99"}
    assert plain["summary"]["goodput"] == pytest.approx(plain["summary"]["request_throughput"])
    assert plain["summary"]["avg_acceptance_rate"] == pytest.approx(2 / 3)
    assert plain["summary"]["mean_acceptance_length"] == 3.0
    assert plain["summary"]["acceptance_by_position"] == [1.0, 1.0, 0.0]
    assert plain["engine_metrics"]["prefix_cache"]["hit_rate"] is None  # no lookup in the measured part
    assert load(path).to_json() == plain
    with pytest.raises(ConfigError, match="exists already"):
        save(result, path)


# ---------------------------------------------------------------------- sweep


def swept(
    model: str, path: Path, plan: SweepPlan, target: FakeTarget, **more: object
) -> list[tuple[float, bool]]:
    load = (
        LoadSpec("closed", num_prompts=16)
        if more.pop("closed", False)
        else LoadSpec("constant", duration=0.6)
    )
    from octavo.bench.runner import Silent

    result = sweep(
        spec_of(model, load, warmup_requests=1), PromptSource(), plan, path, live=Silent(), target=target,
        **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return [(point.value, point.keeps_up) for point in result.points]


def test_a_sweep_closes_in_on_what_the_engine_can_do(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "octavo.bench.sweep.keeps_up", lambda result, _: result.effective_config["load"]["rate"] <= 25
    )
    target = FakeTarget()
    points = swept(model, tmp_path / "s.json", SweepPlan(start=10, refine=2), target)
    assert points == [(10, True), (20, True), (25, True), (30, False), (40, False)]
    assert target.events == ["open", "close"]  # one engine for all points
    plain = json.loads((tmp_path / "s.json").read_text())
    assert plain["kind"] == "sweep"
    assert (plain["highest_kept_up"], plain["lowest_not_kept_up"]) == (25, 30)
    assert plain["points"][0]["file"] == "s.rate-10.json"
    assert (tmp_path / "s.rate-10.json").exists()


@pytest.mark.parametrize(("service", "expected"), [(0.05, True), (0.1, True), (0.2, False)])
def test_a_queue_that_grows_is_not_kept_up_with(service: float, expected: bool) -> None:
    """Ten requests a second for 10 s, one server that takes `service` seconds each."""
    moments = [i / 10 for i in range(100)]
    records, free = [], 0.0
    for index, moment in enumerate(moments):
        free = max(free, moment) + service
        records.append(RequestRecord(index, scheduled_time=5.0 + moment, end_time=5.0 + free))
    result = RunResult("octavo", "target_ar", requests=records)
    assert keeps_up(result, moments) is expected
    # A long answer alone is no growing queue.
    for record in records:
        record.end_time = record.scheduled_time + 3.0
    assert keeps_up(result, moments)


def test_a_sweep_goes_on_where_it_was(model: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    swept(model, path, SweepPlan((20.0,)), FakeTarget())
    path.unlink()
    first = point_path(path, 20.0, closed=False)
    before = first.read_text()
    target = FakeTarget()
    with pytest.raises(ConfigError, match="exists already"):
        swept(model, path, SweepPlan((20.0, 30.0)), target)
    assert target.events == []
    assert swept(model, path, SweepPlan((20.0, 30.0)), target, resume=True) == [(20.0, True), (30.0, True)]
    assert first.read_text() == before
    asked = [request for request in target.asked if request.cache_salt != "warm-up"]
    assert len(asked) == 18  # the second point's alone


def test_a_sweep_does_not_take_anothers_points(model: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    swept(model, path, SweepPlan((20.0,)), FakeTarget())
    plain = json.loads((tmp_path / "s.rate-20.json").read_text())
    plain["effective_config"]["sampling"]["seed"] = 7
    (tmp_path / "s.rate-20.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="measured with other settings \\(sampling\\)"):
        swept(model, path, SweepPlan((20.0,)), FakeTarget(), resume=True)


def test_concurrency_is_saturated_where_it_brings_no_more(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def throughput(records, duration, **_):  # type: ignore[no-untyped-def]
        """Ten tokens a second for each that runs, up to two of them."""
        return summarize(records, duration) | {"overall_throughput": min(10.0 * target.peak, 20.0)}

    target = FakeTarget(pause=0.002)
    monkeypatch.setattr("octavo.bench.metrics.summarize", throughput)
    points = swept(model, tmp_path / "s.json", SweepPlan(start=1, refine=0), target, closed=True)
    assert points == [(1, True), (2, True), (4, False)]


def test_results_of_a_spec_are_equal_work(model: str) -> None:
    """The same seed gives every engine the same requests at the same moments."""
    from octavo.bench.runner import prepare

    spec = spec_of(model, LoadSpec("poisson", num_prompts=5, rate=3.0))
    one, other = prepare(spec, PromptSource()), prepare(replace(spec, method="prompt_lookup"), PromptSource())
    assert one.plan == other.plan
    another = prepare(replace(spec, sampling=SamplingSpec(seed=7)), PromptSource())
    assert one.plan.moments != another.plan.moments


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("{")
    with pytest.raises(OctavoError, match="cannot be read"):
        load(path)
    path.write_text('{"schema_version": 99}')
    with pytest.raises(ConfigError, match="schema_version"):
        load(path)
    with pytest.raises(ConfigError, match="no result file"):
        load(tmp_path / "none.json")
    assert RunResult("octavo", "target_ar").exit_code == 1  # nothing was asked
