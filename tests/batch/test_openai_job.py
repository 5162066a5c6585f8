"""A batch file becomes its answers, whatever interrupts it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.batch.openai import answers
from octavo.batch.openai.job import OpenAIJob, Summary, run_openai_job
from octavo.errors import ConfigError, EngineDeadError, OctavoError, RequestError
from tests.batch.fakes import FakeWorkers, Flaky, fake_text
from tests.batch.normal import chat, completion, normal_records, write_lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "RETRY_SECONDS", 0.001)


def run(
    source: Path, target: Path, workers: FakeWorkers | None = None, *, stop: bool = False, **options: Any
) -> Summary:
    async def main() -> Summary:
        async def open_workers() -> FakeWorkers:
            if workers is None:
                raise AssertionError("no model is needed")
            return workers

        event = asyncio.Event()
        if stop:
            event.set()
        job = OpenAIJob(source, target, ("fake", "alias"), {"model": "fake"}, quiet=True, **options)
        return await run_openai_job(job, open_workers, event)

    return asyncio.run(main())


def records(path: Path) -> dict[Any, dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["custom_id"]: record for record in found}


def test_every_request_has_an_answer_of_openais_shape(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [completion(f"r{i}", max_tokens=3, seed=i) for i in range(50)])
    summary = run(source, tmp_path / "out", FakeWorkers(), seed=9)
    assert summary.all_succeeded
    assert (summary.total, summary.num_done, summary.num_failed) == (50, 50, 0)
    assert summary.run["generated_tokens"] == 150
    found = records(tmp_path / "out")
    assert set(found) == {f"r{i}" for i in range(50)}
    record = found["r7"]
    assert record["error"] is None
    assert record["seed"] == 7
    response = record["response"]
    assert response["status_code"] == 200
    body = response["body"]
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == " ".join(fake_text([1, 2, 3], 7, 0, 3))
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert response["request_id"].removeprefix("req-") in body["id"]
    assert len({record["id"] for record in found.values()}) == 50


def test_a_request_without_a_seed_gets_one_of_its_own_that_is_written_down(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [completion(f"r{i}") for i in range(20)])
    run(source, tmp_path / "one", FakeWorkers(), seed=9)
    run(source, tmp_path / "two", FakeWorkers(delay=lambda item: random.random() / 50), seed=9)
    run(source, tmp_path / "other", FakeWorkers(), seed=10)
    one, other = records(tmp_path / "one"), records(tmp_path / "other")
    assert normal_records(tmp_path / "one") == normal_records(tmp_path / "two")
    assert len({record["seed"] for record in one.values()}) == 20
    for name, record in one.items():
        expected = " ".join(fake_text([1, 2, 3], record["seed"], 0, 16))
        assert record["response"]["body"]["choices"][0]["text"] == expected
        assert record["seed"] != other[name]["seed"]


def test_what_is_wrong_with_a_line_is_a_record_and_the_rest_goes_on(tmp_path: Path) -> None:
    lines: list[Any] = [
        completion("good"),
        "{broken",
        completion("good"),
        completion("wrong model", model="gpt-4"),
        completion("wrong field", temperature="hot"),
        {**completion("wrong url"), "url": "/v1/images"},
        {**completion("later"), "url": "/v1/embeddings"},
        chat("no tokenizer"),
        completion("alias", model="alias", user="me"),
    ]
    source = write_lines(tmp_path / "in", lines)
    summary = run(source, tmp_path / "out", FakeWorkers())
    assert (summary.total, summary.num_done, summary.num_failed) == (9, 9, 7)
    assert not summary.all_succeeded
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    by_line = {record["error"]["line"]: record for record in found if record["error"] is not None}
    assert {line: record["error"]["code"] for line, record in by_line.items()} == {
        2: "invalid_json",
        3: "duplicate_custom_id",
        4: "model_not_found",
        6: "invalid_url",
        7: "not_in_this_version",
    }
    assert by_line[3]["custom_id"] == "good"
    assert by_line[2]["custom_id"] is None
    refused = {r["custom_id"]: r["response"] for r in found if r["error"] is None}
    assert refused["wrong field"]["status_code"] == 400
    assert refused["wrong field"]["body"]["error"]["param"] == "temperature"
    assert refused["no tokenizer"]["status_code"] == 400
    assert refused["alias"]["warnings"] == ["user: not used"]
    assert "warnings" not in refused["good"]
    # Started again there is nothing left to do, and no model is loaded; it still says that some failed.
    again = run(source, tmp_path / "out")
    assert (again.num_done, again.num_failed, again.all_succeeded) == (9, 7, False)


def test_failures_are_tried_again_and_then_written_down(tmp_path: Path) -> None:
    failing = {"[2]": 2, "[3]": 99}

    def fault(item: Any, attempt: int) -> Exception | None:
        if item.prompt == [4]:
            return RequestError("impossible")
        return Flaky("not now") if attempt <= failing.get(str(item.prompt), 0) else None

    source = write_lines(tmp_path / "in", [completion(f"r{i}", (i,)) for i in range(1, 6)])
    workers = FakeWorkers(fault=fault)
    summary = run(source, tmp_path / "out", workers, max_retries=2)
    assert (summary.num_done, summary.num_failed) == (5, 2)
    found = records(tmp_path / "out")
    assert found["r2"]["response"]["status_code"] == 200
    assert found["r3"]["response"]["status_code"] == 500
    assert found["r4"]["response"]["status_code"] == 400
    assert sorted(workers.attempts.values()) == [1, 1, 1, 3, 3]
    assert summary.run["retries"] == 4
    # A failure is a result, until it is asked for again; what was refused is refused for good.
    assert run(source, tmp_path / "out").num_failed == 2
    again = run(source, tmp_path / "out", FakeWorkers(), retry_failed=True)
    assert (again.run["items"], again.num_done, again.num_failed) == (1, 5, 1)
    assert records(tmp_path / "out")["r3"]["response"]["status_code"] == 200


def test_a_dead_engine_ends_the_job_and_what_is_done_stays(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [completion(f"r{i}", (i + 1,)) for i in range(100)])
    workers = FakeWorkers(
        fault=lambda item, attempt: EngineDeadError("burnt") if item.prompt == [50] else None,
        delay=lambda item: 0.01 if item.prompt == [50] else 0.0,
    )
    with pytest.raises(EngineDeadError, match="burnt"):
        run(source, tmp_path / "out", workers)
    assert workers.is_closed
    num_done = len(records(tmp_path / "out"))
    assert 0 < num_done < 100
    summary = run(source, tmp_path / "out", FakeWorkers())
    assert summary.all_succeeded
    assert summary.run["items"] == 100 - num_done
    run(source, tmp_path / "undisturbed", FakeWorkers())
    assert normal_records(tmp_path / "out") == normal_records(tmp_path / "undisturbed")


def test_the_results_of_another_job_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [completion("a")])
    run(source, tmp_path / "out", FakeWorkers())
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        run(source, tmp_path / "out", seed=1)
    write_lines(source, [completion("b")])
    with pytest.raises(ConfigError, match="input_sha256"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", FakeWorkers(), overwrite=True).all_succeeded
    assert set(records(tmp_path / "out")) == {"b"}
    with pytest.raises(ConfigError, match="the same file"):
        run(source, source)


def test_a_stop_before_the_model_is_loaded_loads_none(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [completion("a")])
    summary = run(source, tmp_path / "out", stop=True)
    assert (summary.num_done, summary.was_stopped, summary.all_succeeded) == (0, True, False)


def test_an_empty_file_is_done(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [""])
    assert run(source, tmp_path / "out").all_succeeded


def test_without_the_servers_packages_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.batch.openai.job._NEEDED", ("no_such_package",))
    with pytest.raises(OctavoError, match=r"no_such_package: pip install 'octavo\[server\]'"):
        run(tmp_path / "in", tmp_path / "out")


# ---------------------------------------------------------------------- processes


def start(source: Path, target: Path, seconds: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.batch.fake_job", seconds, f"{source}:{target}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many results are there, or the process has ended."""
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)


def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    lines: list[Any] = [completion(f"r{i}", (i + 1,), max_tokens=30) for i in range(900)]
    lines[100] = "{torn"
    lines[200] = completion("r5")
    source = write_lines(tmp_path / "in", lines)
    target = tmp_path / "out"
    moments = random.Random(11)
    for number in range(1, 4):
        # It cannot come to its end before it is killed.
        process = start(source, target, f"0.01:{250 * number}")
        wait_for_lines(target, 250 * number - 40 - moments.randrange(150), process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert 0 < target.read_bytes().count(b"\n") < 900
    with open(target, "ab") as file:  # as a kill in the middle of a write leaves it
        file.write(b'{"id":"batch_req_1","custom_id":"r899","resp')
    last = start(source, target, "0")
    last.wait()
    assert last.returncode == 1  # two lines have no answer
    summary = run(source, tmp_path / "undisturbed", FakeWorkers(), seed=5)
    assert (summary.num_done, summary.num_failed) == (900, 2)
    assert normal_records(target) == normal_records(tmp_path / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    source = write_lines(tmp_path / "in", [completion(f"r{i}", (i + 1,)) for i in range(5000)])
    target = tmp_path / "out"
    process = start(source, target, "0.02:4000")
    wait_for_lines(target, 20, process)
    os.kill(process.pid, number)
    process.wait()
    assert process.returncode == 128 + number
    data = target.read_bytes()
    assert data.endswith(b"\n")
    assert 20 <= data.count(b"\n") < 5000
    assert json.loads((tmp_path / "out.job.json").read_text())["runs"]  # this run is noted as well


def measured_peaks(tmp_path: Path, *counts: int) -> list[int]:
    """Peak memory of one process after files of these numbers of lines, one after another."""
    pairs = []
    for count in counts:
        source = tmp_path / f"in{count}"
        with open(source, "w") as file:
            for i in range(count):
                file.write(json.dumps(completion(f"request-{i}", (1 + i % 900,), max_tokens=20)) + "\n")
        pairs.append(f"{source}:{tmp_path / f'out{count}'}")
    process = subprocess.run(
        [sys.executable, "-m", "tests.batch.fake_job", "0", *pairs], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.returncode == 0
    return [int(line) for line in process.stdout.split()]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small, large = measured_peaks(tmp_path, 500, 5000)
    assert large - small < 3 << 20


@pytest.mark.slow
def test_memory_does_not_grow_with_a_long_file(tmp_path: Path) -> None:
    small, large = measured_peaks(tmp_path, 1000, 100_000)
    # Two sets of names, 16 bytes in tables that are at most two thirds full and doubled in one piece.
    assert large - small < 16 << 20
