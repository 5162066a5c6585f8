"""A server whose delays are known, and one that fails in every way: what the workbench says of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

import pytest

from octavo.bench import record as records
from octavo.bench.http_client import HttpEngine, HttpJob
from octavo.bench.load import LoadPlan, run_load
from octavo.bench.metrics import summarize
from octavo.bench.prompts import Prompt
from octavo.bench.record import RequestRecord, RunResult
from octavo.bench.runner import run
from octavo.bench.spec import LoadSpec, RunSpec, SamplingSpec
from octavo.bench.target import TargetRequest
from octavo.cli.main import main
from tests.bench.stub_server import PER_CHUNK, STALL, TOKENS, TTFT, log_of, running
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("url") / "model", tokenizer=True))


@pytest.fixture(scope="module")
def stub() -> Iterator[str]:
    with running() as url:
        yield url


def measured(
    url: str, mode: str, *, count: int = 3, rate: float = 50.0, tokens: int = 12, **more: object
) -> RunResult:
    spec = RunSpec(
        engine="url",
        url=url,
        model=mode,
        sampling=SamplingSpec(max_tokens=tokens),
        load=LoadSpec("constant", num_prompts=count, rate=rate),
        warmup_requests=1,
        monitor=False,
        **more,  # type: ignore[arg-type]
    )
    prompts = [Prompt(f"p{i}", messages=({"role": "user", "content": f"{mode} {i}"},)) for i in range(count)]
    return run(spec, prompts)


def test_times_are_those_the_server_wrote_down(stub: str) -> None:
    result = measured(stub, "steady", count=50)
    log = log_of(stub)
    assert result.failures == []
    client = result.summary["client"]
    slack = client["event_loop_lag"]["p95"] + client["dispatch_lag"]["p95"]  # a busy machine says so here
    ttft_errors, end_errors = [], []
    for r in result.requests:
        entry = log[f"steady {r.index}"]
        assert r.ttft is not None
        assert r.latency is not None
        ttft_errors.append(r.ttft - (entry["sent"][0][0] - entry["received"]))
        end_errors.append(r.latency - (entry["sent"][-1][0] - entry["received"]))
        assert [tokens for _, tokens in r.arrivals] == [tokens for _, tokens in entry["sent"]]
        assert r.generated_tokens == 12
        assert r.prompt_tokens == 7
        assert not r.tokens_estimated
        assert r.finish_reason == "length"
    # Within 2% of what the server did, for the middle one of fifty.
    assert 0 <= median(ttft_errors) <= 0.02 * TTFT + slack
    assert 0 <= median(end_errors) <= 0.02 * (TTFT + 3 * PER_CHUNK + STALL) + slack
    # The stall is one gap of ITL and is in TPOT: neither hides it.
    assert max(result.requests[0].itl) > STALL
    assert result.summary["tpot"]["mean"] > (3 * PER_CHUNK + STALL) / 11 * 0.98
    assert len(result.requests[0].itl) == 3


def test_reasoning_counts_as_the_first_token(stub: str) -> None:
    result = measured(stub, "reasoning")
    assert result.failures == []
    assert all(r.ttft is not None and r.ttft >= TTFT * 0.98 for r in result.requests)
    assert result.requests[0].output_text is not None


def test_without_a_usage_the_text_is_counted_and_marked(stub: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", tokenizer=True)
    result = measured(stub, "no_usage", tokenizer=str(folder))
    assert result.failures == []
    assert result.summary["tokens_estimated"] is True
    for r in result.requests:
        assert r.tokens_estimated
        # 12 words of 2 or 3 characters and a blank, in a tokenizer of bytes: far more tokens than chunks.
        assert r.generated_tokens > 24
        assert sum(tokens for _, tokens in r.arrivals) == r.generated_tokens
        assert r.tpot is not None


def test_without_usage_and_tokenizer_nothing_is_made_up(stub: str) -> None:
    result = measured(stub, "no_usage")
    assert len(result.failures) == 3
    assert result.failures[0].error is not None
    assert "--tokenizer" in result.failures[0].error
    assert result.summary["total_tokens"] == 0


FAILURES = {
    "http_500": ("http_500", "the stub is out of order"),
    "cut_off": ("cut_off", "in the middle"),
    "closed": ("cut_off", "without a finish_reason"),
    "hang": ("timeout", "within 2 s"),
    "error_event": ("server_error", "the engine died"),
    "not_streamed": ("protocol", "did not stream"),
    "not_json": ("protocol", "not JSON"),
}


def test_failures_are_records(stub: str) -> None:
    """In this process, each at the same time as the others."""

    async def ask(mode: str) -> list[RequestRecord]:
        engine = HttpEngine(HttpJob(stub, mode))
        try:
            request = TargetRequest(0, mode, 12, messages=({"role": "user", "content": mode},))
            plan = LoadPlan([request] * 3, [0.0] * 3, timeout=2.0)
            return (await run_load(engine, plan, time.monotonic())).records
        finally:
            await engine.close()

    async def all_of_them() -> list[list[RequestRecord]]:
        return await asyncio.gather(*map(ask, FAILURES))

    for (mode, (kind, words)), found in zip(FAILURES.items(), asyncio.run(all_of_them()), strict=True):
        summary = summarize(found, 1.0)
        assert summary["failed_requests"] == summary["total_requests"] == 3
        assert summary["failures"] == {kind: 3}, mode
        assert all(words in (record.error or "") for record in found)
        assert summary["avg_ttft"] is None  # not zero
        assert summary["total_tokens"] == 0
        if mode in ("cut_off", "closed", "hang", "error_event"):  # what came before is kept
            assert all(record.arrivals and record.output_text == "w0 w1 w2 " for record in found)


NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "serve", "--url", NOWHERE],
        ["bench", "run", "--url", NOWHERE, "--arrival", "closed"],  # what run_benchmark.sh calls
        ["bench", "sweep", "--url", NOWHERE],
        ["compare", "--engine", "octavo", "--engine", f"url={NOWHERE}", "--method", "target_ar"],
    ],
)
def test_a_server_that_is_not_there_is_sent_nothing(
    command: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out.json")
    code = main([*command, "--model", model, "--num-prompts", "3", "--no-monitor", "--output", output])
    said = capsys.readouterr()
    assert code == 1
    assert f"nothing listens at {NOWHERE} (connection refused): start the server" in said.err
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_dies_midway_ends_in_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running() as url:
        code = main(
            ["bench", "serve", "--url", url, "--model", "dies", "--num-prompts", "4", "--concurrency", "1",
             "--warmup", "1", "--max-tokens", "3", "--no-monitor",
             "--output", str(tmp_path / "out.json")]
        )  # fmt: skip
    said = capsys.readouterr()
    assert code == 1
    assert f"requests: refused: nothing listens at {url}" in said.out
    result = records.load(tmp_path / "out_target_ar_url.json")
    assert [record.ok for record in result.requests] == [True, False, False, False]
    assert set(result.summary["failures"]) == {"cut_off", "refused"}
    assert (tmp_path / "out_target_ar_url.html").exists()


def test_a_server_without_a_list_of_models_is_measured_and_that_is_said(stub: str) -> None:
    result = measured(f"{stub}/elsewhere", "steady", count=1)
    assert any("names no model (HTTP 404)" in warning for warning in result.warnings)
    assert len(result.requests) == 1


def test_the_command_line_from_end_to_end(
    stub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "serve", "--url", stub, "--model", "steady", "--num-prompts", "4", "--rate", "100",
                 "--clients", "2", "--no-monitor", "--no-report", "--slo", "ttft=10s,tpot=10s",
                 "--output", str(tmp_path / "out.json"), "--max-tokens", "3"]  # fmt: skip
    code = main(arguments)
    said = capsys.readouterr()
    plain = json.loads((tmp_path / "out_target_ar_url.json").read_text())
    assert code == int(not plain["summary"]["client"]["valid"])
    assert said.err.count("Generated 3 tokens in ") == 4
    assert plain["summary"]["goodput"] == pytest.approx(plain["summary"]["request_throughput"])
    assert plain["summary"]["client"]["clients"] == 2
    assert "OPENAI" not in json.dumps(plain["effective_config"])
    assert main(arguments) == 2  # the file is there now
    assert "exists already" in capsys.readouterr().err


def test_a_server_of_one_model_need_not_be_told_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running("steady") as url:
        code = main(
            ["bench", "serve", "--url", url, "--num-prompts", "1", "--rate", "inf", "--max-tokens", "3",
             "--no-monitor", "--output", str(tmp_path / "out.json")]
        )  # fmt: skip
    assert code in (0, 1), capsys.readouterr()  # 1: this machine was too busy to measure
    result = records.load(tmp_path / "out_target_ar_url.json")
    assert result.failures == []
    assert result.effective_config["served_model"] == "steady"


def test_a_server_of_several_models_must_be_told_which(
    stub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--url", stub, "--output", str(tmp_path / "out.json")]) == 2
    assert "does not say which model is meant: name one of steady, reasoning," in capsys.readouterr().err


def test_a_model_that_is_not_served_is_named(stub: str) -> None:
    from octavo.errors import ConfigError

    with pytest.raises(ConfigError, match=r"does not serve 'gpt-x': name one of steady"):
        measured(stub, "gpt-x")


@pytest.mark.slow
def test_known_delays_within_two_percent_at_fifty_a_second(stub: str) -> None:
    """Against the nominal delays: for a quiet machine."""
    tokens = 30
    result = measured(stub, "steady", count=500, tokens=tokens)
    assert result.failures == []
    assert result.valid, result.summary["client"]
    chunks = tokens // TOKENS
    end = TTFT + (chunks - 1) * PER_CHUNK + STALL
    assert result.summary["ttft"]["p50"] == pytest.approx(TTFT, rel=0.02)
    assert result.summary["e2el"]["p50"] == pytest.approx(end, rel=0.02)
    assert result.summary["tpot"]["p50"] == pytest.approx((end - TTFT) / (tokens - 1), rel=0.02)
    gaps = [gap for r in result.requests for gap in r.itl]
    assert median(gaps) == pytest.approx(PER_CHUNK, rel=0.02)
    assert fmean(gaps) == pytest.approx(((chunks - 1) * PER_CHUNK + STALL) / (chunks - 1), rel=0.02)
    assert result.summary["request_throughput"] == pytest.approx(500 / (499 / 50 + end), rel=0.02)
