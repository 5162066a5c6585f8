"""Which rows there are, and what each engine is asked to do for them.

    single    one stream: first token, decode rate       startup   process start to first token
    batch     64 requests of 32 to 256 tokens            memory    peak with a KV cache of 256 MB
    prefix    32 requests that begin alike               foreign   single stream beside a busy thread
    rewrite   a text to copy with one word changed       brain     schedule + update, no model

A `Piece` is one row of one engine (in one variant); each repetition of it is one child process.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import startup
from benchmarks.children import Finished, run_child
from benchmarks.engines.job import Metrics
from benchmarks.machine import ModelSize
from benchmarks.report import Run
from benchmarks.workloads import Work, Workloads

ROWS = ("single", "batch", "prefix", "startup", "memory", "foreign", "brain", "rewrite")
ENGINES = ("octavo", "transformers", "vllm", "llamacpp")
STATIC_BATCH = 16  # transformers pads this many requests to one length
MOST_REQUESTS = 64  # that an engine with a scheduler runs together
LLAMACPP_SLOTS = 32
MEMORY_ROW_KV = 256 << 20


@dataclass(frozen=True)
class Setup:
    """What all pieces share."""

    root: Path
    model: Path
    size: ModelSize
    workloads: Workloads
    env: dict[str, str]
    cores: list[int]
    kv_bytes: int
    max_model_len: int
    timeout: float
    vllm_python: str | None = None
    llamacpp_server: str | None = None
    llamacpp_gguf: str | None = None
    runners_started: set[str] = field(default_factory=set)  # engines other than those with a command

    def missing(self, engine: str) -> str | None:
        """Why this engine cannot be measured here; None if it can."""
        if engine == "transformers" and importlib.util.find_spec("transformers") is None:
            return "not installed beside this Python (the project's extra `transformers` brings it)"
        if engine == "vllm" and self.vllm_python is None:
            return "name a Python that has it with --vllm-python"
        if engine == "llamacpp" and (self.llamacpp_server is None or self.llamacpp_gguf is None):
            return "name its server and a bf16 .gguf of the model with --llamacpp-server and --llamacpp-gguf"
        return None


@dataclass(frozen=True)
class Piece:
    """One row of one engine; `once` measures it in a fresh process and also tells the version."""

    row: str
    variant: str
    engine: str
    once: Callable[[], tuple[Run, str]] = field(repr=False)


def pieces(setup: Setup, row: str, engine: str) -> Iterator[Piece]:
    """The variants of a row for an engine; none if the row is not for it."""
    work, sizes = setup.workloads, setup.workloads.sizes
    static = engine == "transformers"

    def piece(variant: str, kind: str, what: Work, **options: Any) -> Piece:
        return Piece(row, variant, engine, lambda: _run_job(setup, engine, kind, what, **options))

    if row == "single":
        yield piece("", "stream", work.single())
    elif row == "rewrite":
        yield piece("", "stream", work.rewrite())
    elif row == "foreign":
        yield piece("", "foreign", work.single(sizes.foreign_out))
    elif row == "batch":
        yield piece("static_16" if static else "", "complete", work.batch())
        if static:
            yield piece("one_by_one", "complete", work.batch(share=4), batch_size=1)
    elif row == "prefix":
        yield piece("static_16" if static else "", "complete", work.prefix())
    elif row == "memory":
        yield piece("single", "stream", work.single(), kv_bytes=MEMORY_ROW_KV)
        variant = "static_16" if static else "batch"
        yield piece(variant, "complete", work.batch(), kv_bytes=MEMORY_ROW_KV)
    elif row == "startup":
        yield Piece(row, "warm", engine, _WarmStart(setup, engine))
        if engine == "octavo":
            first = startup.first_start
            yield Piece(
                row,
                "first",
                engine,
                lambda: _started(first(setup.model, setup.root, setup.env, setup.timeout)),
            )
    elif row == "brain" and engine == "octavo":
        yield Piece(row, "", engine, lambda: _run_brain(setup))


def _run_job(
    setup: Setup, engine: str, kind: str, work: Work, *, batch_size: int = STATIC_BATCH, kv_bytes: int = 0
) -> tuple[Run, str]:
    """One job by the engine's runner."""
    return _measured(_runner(setup, engine, _job(setup, kind, work, batch_size, kv_bytes or setup.kv_bytes)))


def _job(setup: Setup, kind: str, work: Work, batch_size: int, kv_bytes: int) -> dict[str, Any]:
    longest = max(len(each.prompt) + each.new_tokens for each in work.requests) + 8
    room = max(1, kv_bytes // setup.size.kv_bytes // longest)
    options = {
        "model": str(setup.model),
        "threads": len(setup.cores),
        "cores": setup.cores,
        "kv_bytes": kv_bytes,
        "max_model_len": setup.max_model_len,
        "max_num_seqs": MOST_REQUESTS,
        "batch_size": batch_size,
        "server": setup.llamacpp_server,
        "gguf": setup.llamacpp_gguf,
        "slots": min(LLAMACPP_SLOTS, len(work.requests), room),
        "longest_request": longest,
    }
    return {
        "work": kind,
        "engine": options,
        "requests": [asdict(each) for each in work.requests],
        "warmup": [asdict(each) for each in work.warmup],
    }


def _runner(setup: Setup, engine: str, job: dict[str, Any]) -> Finished:
    python = sys.executable
    if engine == "vllm":
        assert setup.vllm_python is not None
        python = setup.vllm_python
    command = [python, "-m", f"benchmarks.engines.run_{engine}"]
    finished = run_child(command, setup.root, setup.env, json.dumps(job), setup.timeout)
    if engine not in ("octavo", "transformers"):
        setup.runners_started.add(engine)
    return finished


def _measured(finished: Finished) -> tuple[Run, str]:
    """What a runner wrote."""
    answer = json.loads(finished.stdout)
    return Run(answer["metrics"], answer["foreign_cores"]), answer["version"]


def _run_brain(setup: Setup) -> tuple[Run, str]:
    sizes = setup.workloads.sizes
    options = {"running": sizes.brain_running, "contexts": sizes.brain_contexts, "steps": sizes.brain_steps}
    return _measured(_runner(setup, "brain", {"engine": options}))


class _WarmStart:
    """Starts of one engine; the first one warms the caches and is not measured.

    The runner of vLLM and llama.cpp is the same in all rows: where one ran before, that was it.
    """

    def __init__(self, setup: Setup, engine: str) -> None:
        self._setup, self._engine, self._warm = setup, engine, False

    def __call__(self) -> tuple[Run, str]:
        if not self._warm and self._engine not in self._setup.runners_started:
            _start(self._setup, self._engine)
        self._warm = True
        return _started(_start(self._setup, self._engine))


def _start(setup: Setup, engine: str) -> Finished:
    if engine == "octavo":
        command = startup.octavo_command(setup.model)
    elif engine == "transformers":
        command = startup.transformers_command(setup.model)
    else:
        job = _job(setup, "first", setup.workloads.single(1), STATIC_BATCH, setup.kv_bytes)
        return _runner(setup, engine, job)
    return run_child(command, setup.root, setup.env, timeout=setup.timeout)


def _started(finished: Finished) -> tuple[Run, str]:
    metrics: Metrics = {
        "seconds": finished.first_byte_s,
        "total_s": finished.total_s,
        "peak_mb": finished.peak_bytes / 1e6,
    }
    return Run(metrics, finished.foreign_cores), ""
