"""The benchmark measures what it says: its work, its arithmetic, and a small run from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cpu, machine, rows, startup
from benchmarks.children import ChildError, clean_environment, run_child
from benchmarks.engines import job
from benchmarks.report import Result, Run, table
from benchmarks.workloads import QUICK, Sizes, Workloads
from tests.checkpoints import make_checkpoint

linux = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="foreign use is read from /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte-level tokenizer, and room for the prompts of --quick."""
    return make_checkpoint(tmp_path_factory.mktemp("bench"), tokenizer=True, max_position_embeddings=1024)


# ---------------------------------------------------------------- the work


def test_workloads_have_the_sizes_that_are_quoted(folder: Path) -> None:
    work = Workloads(folder, Sizes())
    (single,) = work.single().requests
    assert (len(single.prompt), single.new_tokens) == (128, 128)

    batch = work.batch().requests
    lengths = [len(request.prompt) for request in batch]
    assert (len(batch), min(lengths), max(lengths), sum(lengths)) == (64, 32, 256, 64 * 144)
    assert lengths != sorted(lengths)
    assert {request.new_tokens for request in batch} == {128}
    quarter = [len(request.prompt) for request in work.batch(share=4).requests]
    assert (len(quarter), min(quarter), max(quarter)) == (16, 32, 256)

    prefix = work.prefix().requests
    assert len(prefix) == 32
    assert {len(request.prompt) for request in prefix} == {544}
    assert len({tuple(request.prompt[:512]) for request in prefix}) == 1
    assert len({tuple(request.prompt[512:]) for request in prefix}) == 32


def test_workloads_are_the_same_every_time(folder: Path) -> None:
    first, second = Workloads(folder, Sizes()), Workloads(folder, Sizes())
    assert (first.batch(), first.prefix(), first.rewrite()) == (
        second.batch(),
        second.prefix(),
        second.rewrite(),
    )


def test_a_warm_up_leaves_nothing_in_a_prefix_cache(folder: Path) -> None:
    work = Workloads(folder, Sizes())
    for each in (work.single(), work.batch(), work.prefix(), work.rewrite()):
        first_blocks = {tuple(request.prompt[:16]) for request in each.requests}
        assert not first_blocks & {tuple(request.prompt[:16]) for request in each.warmup}


# ---------------------------------------------------------------- one measured piece


class Clockwork:
    """An engine that takes `step` seconds for the first token and for each one after it."""

    version = "clockwork"

    def __init__(self, step: float = 0.002, missing: int = 0) -> None:
        self.step, self.missing, self.served = step, missing, 0

    def stream(self, request: job.Request, arrived: Callable[[int], None]) -> None:
        for _ in range(request.new_tokens - self.missing):
            time.sleep(self.step)
            arrived(1)
        self.served += 1

    def complete(self, requests: Sequence[job.Request]) -> int:
        time.sleep(self.step)
        self.served += len(requests)
        return sum(request.new_tokens for request in requests) - self.missing

    def close(self) -> None: ...


REQUEST = job.Request([1, 2, 3], 6)


def test_a_stream_is_timed_from_the_request_and_between_tokens() -> None:
    engine = Clockwork(step=0.02)
    _, metrics = job.measure(engine, "stream", [REQUEST], [REQUEST])
    assert engine.served == 2  # the warm-up too
    assert 20 <= metrics["ttft_ms"] < 100
    assert 20 <= metrics["step_p50_ms"] < 100
    assert metrics["decode_tok_s"] == pytest.approx(1000 / metrics["step_mean_ms"])
    assert 5 < metrics["output_tok_s"] <= 50


def test_a_batch_is_timed_as_a_whole() -> None:
    _, metrics = job.measure(Clockwork(step=0.05), "complete", [REQUEST] * 4, [REQUEST])
    assert metrics["output_tok_s"] == pytest.approx(24 / metrics["seconds"])
    assert metrics["seconds"] >= 0.05


@pytest.mark.parametrize("work", ["stream", "complete"])
def test_tokens_that_were_not_made_are_not_counted(work: str) -> None:
    with pytest.raises(RuntimeError, match="6 tokens were asked for and 4 came"):
        job.measure(Clockwork(missing=2), work, [REQUEST], [])


def test_the_busy_process_runs_during_the_second_stream_only() -> None:
    _, metrics = job.measure(Clockwork(), "foreign", [REQUEST], [])
    assert metrics["ratio_p50"] == pytest.approx(metrics["beside_step_p50_ms"] / metrics["step_p50_ms"])
    assert len(job.family()) == 1  # it is gone


SPIN = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"


@linux
def test_what_this_process_and_its_children_use_is_not_foreign() -> None:
    busy, own = _seconds_during(lambda: subprocess.run([sys.executable, "-c", SPIN], check=True))
    assert own > 0.35
    assert busy > 0.35
    with job.ForeignCores() as watch:
        time.sleep(0.1)
    assert watch.cores is not None


@linux
def test_what_others_use_is_foreign() -> None:
    command = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {SPIN!r}])"

    def start_an_orphan() -> None:
        subprocess.run([sys.executable, "-c", command], check=True)
        time.sleep(0.5)

    busy, own = _seconds_during(start_an_orphan)
    assert own < 0.3
    assert busy > own + 0.1  # it had to share the cores with whatever else runs


def _seconds_during(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds all cores were busy, and this process and its children, while it runs."""
    before = job.ForeignCores._now()
    call()
    after = job.ForeignCores._now()
    assert before is not None
    assert after is not None
    return after[1] - before[1], after[2] - before[2]


@linux
def test_peak_memory_counts_children() -> None:
    before = job.peak_memory()
    hold = "x = bytearray(60_000_000); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert job.peak_memory() > before + 60_000_000
        child.communicate(b"\n")


# ---------------------------------------------------------------- child processes


def test_a_child_tells_when_its_first_byte_came(tmp_path: Path) -> None:
    script = "import time, sys; print('a', flush=True); time.sleep(0.3); print(sys.stdin.read())"
    done = run_child([sys.executable, "-c", script], tmp_path, dict(os.environ), stdin="bc")
    assert done.stdout == "a\nbc\n"
    assert done.first_byte_s + 0.25 < done.total_s
    assert done.peak_bytes > 1_000_000


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys; print('x'); sys.exit('broken on purpose')", "ended with 1.*broken on purpose"),
        ("pass", "ended with 0"),
        ("print('x', flush=True); import time; time.sleep(60)", "longer than 1 s"),
    ],
)
def test_a_child_that_fails_says_nothing_or_hangs_is_an_error(
    script: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ChildError, match=f"(?s){message}"):
        run_child([sys.executable, "-c", script], tmp_path, dict(os.environ), timeout=1.0)


def test_children_inherit_no_settings_of_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    env = clean_environment(tmp_path)
    assert not [name for name in env if "OMP" in name]
    assert env["PATH"] == os.environ["PATH"]


# ---------------------------------------------------------------- limits and the table

MODEL = machine.ModelSize(parameters=100_000_000, head_parameters=20_000_000, kv_bytes=20_000)
MACHINE = machine.Limits(read_bytes_s=20e9, bf16_operations_s=1e12)


def test_limits_follow_the_formula() -> None:
    assert machine.stream_limit(MODEL, MACHINE) == pytest.approx(100)  # 200 MB at 20 GB/s
    # 80 M parameters for each of 1000 tokens, the head for one
    assert machine.first_token_limit(MODEL, MACHINE, 1000) == pytest.approx(0.16004)
    requests = [job.Request([0] * 100, 11)] * 10
    step = (200e6 + 20_000 * (1000 + 10 * 5)) / 20e9
    expected = 110 / (2 * (80e6 * 1000 + 20e6 * 10) / 1e12 + 10 * step)
    assert machine.batch_limit(MODEL, MACHINE, requests) == pytest.approx(expected)
    assert machine.batch_limit(MODEL, MACHINE, requests, shared=90) > 1.3 * expected


def test_model_size_is_read_from_the_checkpoint(folder: Path) -> None:
    size = machine.ModelSize.of(folder)
    assert size.kv_bytes == 3 * 2 * 2 * 6 * 2  # layers, K and V, heads, head_dim, bytes
    assert size.head_parameters == 300 * 36
    file = folder / "model.safetensors"
    # The file holds float32 and the input embedding, of which a token uses one row.
    assert size.parameters == pytest.approx(file.stat().st_size / 4 - 300 * 36, rel=0.05)


def result(engine: str, value: float, foreign: Sequence[float] = (0.0,), **fields: str) -> Result:
    runs = [Run({"decode_tok_s": value + number}, cores) for number, cores in enumerate(foreign)]
    return Result(fields.get("row", "single"), fields.get("variant", ""), engine, runs=runs)


def test_disturbed_runs_count_only_if_there_is_no_other() -> None:
    mixed = result("octavo", 10, foreign=[0.5, 0.02, 0.05])
    assert (mixed.median("decode_tok_s"), mixed.disturbed, mixed.foreign_cores) == (11.5, False, 0.05)
    assert result("octavo", 10, foreign=[0.5, 0.4]).disturbed
    assert json.loads(json.dumps(mixed.record()))["spread"]["decode_tok_s"] == [11, 12]


def test_the_table_shows_medians_ratios_and_limits() -> None:
    text = table(
        [result("octavo", 60, [0.0, 0.0, 0.0]), result("transformers", 20, [0.4])],
        ["octavo", "transformers"],
        {"stream": 122.0},
    )
    (line,) = text.splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["single stream, decode tok/s", "61 (60–62)", "20*", "3.05", "122", "50%", "0.40"]


def test_the_table_says_what_failed() -> None:
    failed = Result("single", "", "octavo", error="it broke")
    text = table([failed, result("transformers", 20)], ["octavo", "transformers"], {})
    assert "failed" in text.splitlines()[2]


# ---------------------------------------------------------------- taking turns


def make_setup(folder: Path) -> rows.Setup:
    return rows.Setup(
        root=cpu.ROOT,
        model=folder,
        size=MODEL,
        workloads=Workloads(folder, QUICK),
        env=clean_environment(cpu.ROOT),
        cores=[0],
        kv_bytes=8 << 20,
        max_model_len=512,
        timeout=60,
    )


def test_engines_take_turns_and_disturbed_runs_are_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    foreign = iter([0.0, 0.0, 0.5, 0.0, 0.0, 0.0])

    def fake(setup: rows.Setup, row: str, engine: str) -> list[rows.Piece]:
        def once() -> tuple[Run, str]:
            order.append(engine)
            return Run({}, next(foreign)), "1"

        return [rows.Piece(row, "", engine, once)]

    monkeypatch.setattr(rows, "pieces", fake)
    results = cpu.measure_row(make_setup(folder), "single", {"a": 2, "b": 2}, retry=2)
    assert order == ["a", "b", "b", "a", "b"]  # the third was disturbed: b runs once more
    assert [len(each.runs) for each in results] == [2, 3]


def test_an_engine_that_fails_does_not_stop_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(setup: rows.Setup, row: str, engine: str) -> list[rows.Piece]:
        def once() -> tuple[Run, str]:
            if engine == "a":
                raise ChildError("no such luck")
            return Run({}, 0.0), "1"

        return [rows.Piece(row, "", engine, once)]

    monkeypatch.setattr(rows, "pieces", fake)
    first, second = cpu.measure_row(make_setup(folder), "single", {"a": 1, "b": 2}, retry=0)
    assert (first.error, len(first.runs), len(second.runs)) == ("no such luck", 0, 2)


def test_every_row_has_pieces_and_absent_peers_are_explained(folder: Path) -> None:
    setup = make_setup(folder)
    variants = {
        row: [
            (piece.engine, piece.variant)
            for engine in rows.ENGINES
            for piece in rows.pieces(setup, row, engine)
        ]
        for row in rows.ROWS
    }
    assert variants["brain"] == [("octavo", "")]
    assert ("transformers", "one_by_one") in variants["batch"]
    assert [variant for engine, variant in variants["startup"] if engine == "octavo"] == ["warm", "first"]
    assert all(len(found) >= 4 for row, found in variants.items() if row != "brain")
    assert "--vllm-python" in (setup.missing("vllm") or "")
    assert "--llamacpp-gguf" in (replace(setup, llamacpp_server="x").missing("llamacpp") or "")


# ---------------------------------------------------------------- for real


def run_benchmark(folder: Path, tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "benchmarks/cpu.py", "--model", str(folder), "--quick", "--threads", "1"]
    command += ["--kv-cache", "8MB", "--output", str(output), *arguments]
    done = subprocess.run(command, cwd=cpu.ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "multiplies bf16" in done.stdout
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_octavo_is_measured_end_to_end(folder: Path, tmp_path: Path) -> None:
    single, brain, limits = run_benchmark(
        folder, tmp_path, "--engines", "octavo", "--rows", "single", "brain"
    )
    assert single["error"] is None
    median = single["median"]
    assert isinstance(median, dict)
    assert median["decode_tok_s"] > 0
    assert median["peak_mb"] > 50
    assert brain["foreign_cores"] is not None or not Path("/proc/stat").exists()
    assert limits["row"] == "machine"
    assert isinstance(limits["limits"], dict)
    assert limits["limits"]["stream"] > 0


@linux
def test_a_kill_ends_the_engine_that_runs(folder: Path) -> None:
    command = [sys.executable, "benchmarks/cpu.py", "--model", str(folder), "--engines", "octavo"]
    command += ["--rows", "single", "--quick", "--threads", "1"]
    with subprocess.Popen(command, cwd=cpu.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"run 1" in process.stderr.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (pids := children.read_text().split()):
            time.sleep(0.001)
        process.terminate()
        assert process.wait(20) == 143
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_every_row_runs_with_octavo_and_transformers(folder: Path, tmp_path: Path) -> None:
    lines = run_benchmark(folder, tmp_path, "--engines", "octavo", "transformers")
    assert {line["row"] for line in lines} == {*rows.ROWS, "machine"}
    assert not [line["error"] for line in lines if line.get("error")]
    for line in lines:
        if line["row"] == "startup":
            assert isinstance(line["median"], dict)
            assert 0 < line["median"]["seconds"] <= line["median"]["total_s"]


def test_the_command_that_is_timed_is_the_one_users_type(folder: Path) -> None:
    command = startup.octavo_command(folder)
    assert command[1:4] == ["-m", "octavo", "generate"]
    assert command[command.index("--max-tokens") + 1] == "1"
