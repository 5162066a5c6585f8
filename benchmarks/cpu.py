"""Octavo and its peers on this machine's processor, in turn, with the same work.

    python benchmarks/cpu.py [--engines octavo transformers vllm llamacpp] [--rows single batch …]
                             [--repeat 3] [--retry 2] [--output FILE.jsonl] [--quick]

Every repetition is a process of its own, so that memory and start-up are honest and no engine's
threads are in another's way; engines take turns within each row, and every other round the order is
reversed. All use the same cores (--threads of them), bfloat16, greedy decoding past the end token,
and get the prompts as the same token ids. vLLM takes minutes to start, each time: --repeat-of
vllm=1 keeps that bearable.

Prints one JSON line a row and engine as soon as it is done, and a table with medians, spread,
Octavo's ratio to each peer and this machine's limits (benchmarks/machine.py says how they are
computed) at the end. `foreign_cores` is how many cores anything else kept busy while the clock ran.
Above 0.1 a run is disturbed: it counts only if no other run is there, and its figure gets a star.
--retry N repeats disturbed runs up to N times a row and engine.

transformers is measured if it is installed beside this Python. vLLM and llama.cpp live elsewhere:
--vllm-python names a Python that can import vllm, --llamacpp-server and --llamacpp-gguf the server
and a bf16 file of the same model. Rows: see benchmarks/rows.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only this folder is on the path

from benchmarks import machine, rows  # noqa: E402
from benchmarks.children import ChildError, clean_environment, run_child  # noqa: E402
from benchmarks.report import Result, table  # noqa: E402
from benchmarks.workloads import QUICK, Sizes, Workloads  # noqa: E402
from octavo import hub, platform  # noqa: E402
from octavo.config import parse_size  # noqa: E402
from octavo.errors import OctavoError  # noqa: E402
from octavo.models.config import ModelConfig  # noqa: E402

LONGEST_CONTEXT = 2048


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="smollm2", help="folder, hub id or alias")
    parser.add_argument("--engines", nargs="+", choices=rows.ENGINES, default=list(rows.ENGINES))
    parser.add_argument("--rows", nargs="+", choices=rows.ROWS, default=list(rows.ROWS))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each row and engine")
    parser.add_argument(
        "--repeat-of", nargs="+", default=[], metavar="ENGINE=N", help="other numbers, for what starts slowly"
    )
    parser.add_argument("--retry", type=int, default=0, help="more runs where others disturbed one")
    parser.add_argument("--threads", type=int, default=2, help="cores every engine gets")
    parser.add_argument("--kv-cache", default="1GB", help="size of the KV cache (row memory: 256 MB)")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file too")
    parser.add_argument("--quick", action="store_true", help="tiny work, one run: only shows that all runs")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds one run may take")
    parser.add_argument("--vllm-python", help="a Python that can import vllm")
    parser.add_argument("--llamacpp-server", help="path of llama-server")
    parser.add_argument("--llamacpp-gguf", help="the model as a bf16 .gguf")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeat = 1
    repeats = dict.fromkeys(rows.ENGINES, options.repeat)
    for each in options.repeat_of:
        engine, _, number = each.partition("=")
        if engine not in repeats or not number.isdigit() or int(number) < 1:
            parser.error(f"--repeat-of {each}: write ENGINE=N, such as vllm=1")
        repeats[engine] = int(number)
    options.repeats = repeats
    if options.repeat < 1 or options.retry < 0 or options.threads < 1:
        parser.error("--repeat and --threads must be at least 1, --retry at least 0")
    return options


def use_cores(count: int) -> list[int]:
    """Bind this process, and so all engines, to the first `count` of its cores."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(count))  # not Linux: engines are told the number only
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise SystemExit(f"benchmark: --threads {count}, but only {len(cores)} cores; give fewer")
    os.sched_setaffinity(0, cores[:count])
    return cores[:count]


def measure_limits(setup: rows.Setup, quick: bool) -> machine.Limits:
    """In a fresh process, as everything else."""
    command = [sys.executable, "-m", "benchmarks.machine", str(len(setup.cores))]
    command += ["--quick"] if quick else []
    return machine.Limits(**json.loads(run_child(command, setup.root, setup.env).stdout))


def measure_row(setup: rows.Setup, row: str, repeats: Mapping[str, int], retry: int) -> list[Result]:
    """The engines of `repeats` in turn, each so often; one Result for each piece that is for this row."""
    todo = [piece for engine in repeats for piece in rows.pieces(setup, row, engine)]
    results = [Result(piece.row, piece.variant, piece.engine) for piece in todo]
    pairs = list(zip(todo, results, strict=True))
    for number in range(max(repeats.values(), default=0) + retry):
        for piece, result in pairs if number % 2 == 0 else reversed(pairs):
            repeat = repeats[piece.engine]
            quiet = sum(not run.disturbed for run in result.runs)
            if result.error or len(result.runs) >= repeat + retry:
                continue
            if len(result.runs) >= repeat and quiet >= repeat:
                continue
            name = " ".join(filter(None, (row, piece.variant, piece.engine)))
            print(f"{name}: run {number + 1}", file=sys.stderr, flush=True)
            try:
                run, result.version = piece.once()
                result.runs.append(run)
            except ChildError as error:
                result.error = str(error)
                print(f"{name}: failed\n{error}", file=sys.stderr)
    return results


def limits_of(setup: rows.Setup, limits: machine.Limits) -> dict[str, float]:
    """What the table's lines are compared with."""
    size, work = setup.size, setup.workloads
    return {
        "stream": machine.stream_limit(size, limits),
        "first_token": machine.first_token_limit(size, limits, work.sizes.single_in) * 1e3,
        "batch": machine.batch_limit(size, limits, work.batch().requests),
        "prefix": machine.batch_limit(size, limits, work.prefix().requests, work.sizes.prefix_shared),
        "weights_mb": size.weight_bytes / 1e6,
    }


def make_setup(options: argparse.Namespace) -> rows.Setup:
    """Resolve the model and settle what all pieces share."""
    model = hub.resolve(options.model)
    config = ModelConfig.from_folder(model)
    return rows.Setup(
        root=ROOT,
        model=model,
        size=machine.ModelSize.of(model),
        workloads=Workloads(model, QUICK if options.quick else Sizes()),
        env=clean_environment(ROOT),
        cores=use_cores(options.threads),
        kv_bytes=parse_size(options.kv_cache, "--kv-cache"),
        max_model_len=min(LONGEST_CONTEXT, config.max_position_embeddings),
        timeout=options.timeout,
        vllm_python=options.vllm_python,
        llamacpp_server=options.llamacpp_server,
        llamacpp_gguf=options.llamacpp_gguf,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if a run of Octavo failed."""
    options = parse(arguments)
    try:
        setup = make_setup(options)
    except OctavoError as error:
        raise SystemExit(f"benchmark: {error}") from error
    engines = []
    for engine in options.engines:
        why = setup.missing(engine)
        if why is None:
            engines.append(engine)
        else:
            print(f"{engine}: left out; {why}", file=sys.stderr)

    def write(line: dict[str, object]) -> None:
        text = json.dumps(line, ensure_ascii=False)
        print(text, flush=True)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as stream:
                stream.write(text + "\n")

    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    limits = measure_limits(setup, options.quick)
    results: list[Result] = []
    for row in options.rows:
        done = measure_row(setup, row, {each: options.repeats[each] for each in engines}, options.retry)
        for result in done:
            write(result.record())
        results += done
    limits = limits.better(measure_limits(setup, options.quick))
    described = {
        "row": "machine",
        "cpu": platform.cpu_model(),
        "threads": options.threads,
        "model": options.model,
        "weight_bytes": setup.size.weight_bytes,
        "kv_bytes_a_token": setup.size.kv_bytes,
        **asdict(limits),
        "limits": {name: float(f"{value:.5g}") for name, value in limits_of(setup, limits).items()},
    }
    write(described)
    print(
        f"\n{described['cpu']}, {options.threads} threads: reads {limits.read_bytes_s / 1e9:.1f} GB/s, "
        f"multiplies bf16 at {limits.bf16_operations_s / 1e12:.2f} TFLOP/s\n"
    )
    print(table(results, engines, limits_of(setup, limits)))
    if options.quick:
        print("\n--quick: these figures mean nothing.")
    return int(any(result.engine == "octavo" and result.error for result in results))


if __name__ == "__main__":
    # A plain kill, too, must end the engines: as an exception it passes through run_child.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
