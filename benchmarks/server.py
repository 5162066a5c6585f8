"""What the server's front end costs, and how soon it is ready.

    python benchmarks/server.py frontend [--streams 64] [--tokens 2000] [--repeat 5]
    python benchmarks/server.py paced [--streams 64] [--rate 50] [--seconds 10]
    python benchmarks/server.py ready [--model smollm2] [--repeat 5]
    python benchmarks/server.py served [--model smollm2] [--requests 64] [--repeat 5]
    python benchmarks/server.py all           # all four, against their goals, in about three minutes

Each prints one JSON line. `frontend` and `paced` serve /v1/completions to streaming clients from an
engine that only counts; the front end (HTTP, protocol, guards, access log, metrics; the engine's
messages encoded *and* decoded, although in earnest another process encodes them) is pinned to the
first core, the clients to the last.

frontend: the engine emits as fast as the event loop turns. Tokens a second, and tokens a chunk: a
    chunk carries several tokens where the reader is behind.
paced: each stream gets a token at its turn of a step, `rate` steps a second. Every token is the time
    at which the engine made it, so the client knows how long it was on its way: the added latency,
    of all tokens of a run, the first ones included. After each run the idle machine is watched: a
    step that falls on a stall of the machine is late by as much, and 1% of the steps make the p99.
ready: from the start of the process to the first 200 of /ready, and the front end's memory then.
served: tokens a second of `octavo serve` against those of `LLM.generate` for the same requests, with
    the processor time that the clients took. Both stay loaded and take turns, so that a machine whose
    speed changes changes it for both; the ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.server_clients import run_clients  # noqa: E402
from benchmarks.server_processes import (  # noqa: E402
    cpu_seconds,
    fake_server,
    real_server,
    resident_bytes,
    wait_ready,
)
from benchmarks.stalls import stalls_a_second  # noqa: E402

Figures = dict[str, Any]


def main() -> None:
    """Run the scenario that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scenario", choices=("frontend", "paced", "ready", "served", "all", "offline"))
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=50.0, help="steps a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=64)
    options = parser.parse_args()
    if options.scenario == "offline":
        offline(options.model)
        return
    scenarios: dict[str, Callable[[argparse.Namespace], Figures]] = {
        "frontend": frontend,
        "paced": paced,
        "ready": ready,
        "served": served,
    }
    if options.scenario != "all":
        show(scenarios[options.scenario](options))
        return
    for name, scenario in scenarios.items():
        figures = scenario(options)
        show(figures)
        for line in against_goals(name, figures):
            print(f"    {line}", flush=True)


def against_goals(scenario: str, figures: Figures) -> list[str]:
    """The figures that somebody set a goal for."""
    goals: dict[str, list[tuple[str, float, str, float]]] = {
        "frontend": [("tokens/s through the front end", figures.get("tokens_per_second", 0), ">=", 20_000)],
        "paced": [("added latency p99, ms", figures.get("added_ms", {}).get("p99", 0), "<=", 5)],
        "ready": [
            ("seconds to the first 200 of /ready", figures.get("seconds", 0), "<=", 4),
            ("front end's resident memory, MB", figures.get("front_end_rss_mb", 0), "<=", 120),
        ],
        "served": [("served / offline", figures.get("ratio", 0), ">=", 0.90)],
    }
    lines = []
    for what, found, relation, goal in goals[scenario]:
        reached = found >= goal if relation == ">=" else found <= goal
        lines.append(
            f"{what}: {found:g} (goal {relation} {goal:g}: {'reached' if reached else 'NOT reached'})"
        )
    return lines


def frontend(options: argparse.Namespace) -> Figures:
    """Tokens a second through the front end, the engine without a pace."""
    rates, per_chunk, seconds = [], [], []
    with fake_server(interval=0.0) as (port, server):
        for _ in range(options.repeat + 1):
            before = cpu_seconds(server)
            found = run_clients(port, options.streams, options.tokens)
            rates.append(found["tokens"] / found["seconds"])
            per_chunk.append(found["tokens"] / found["chunks"])
            seconds.append(1e6 * (cpu_seconds(server) - before) / found["chunks"])
    return {
        "scenario": "frontend",
        "streams": options.streams,
        "tokens_per_second": round(statistics.median(rates[1:])),
        "least": round(min(rates[1:])),
        "tokens_per_chunk": round(statistics.median(per_chunk[1:]), 2),
        "server_cpu_us_per_chunk": round(statistics.median(seconds[1:]), 1),
    }


def paced(options: argparse.Namespace) -> Figures:
    """Latency that the front end adds to each token."""
    count = round(options.rate * options.seconds)
    results = []
    with fake_server(interval=1 / options.rate) as (port, server):
        run_clients(port, options.streams, 20)
        for _ in range(options.repeat):
            before = cpu_seconds(server)
            found = run_clients(port, options.streams, count)
            found["server_cpu"] = (cpu_seconds(server) - before) / found["seconds"]
            found["stalls"] = stalls_a_second()  # the server is idle meanwhile
            results.append(found)
    return {
        "scenario": "paced",
        "streams": options.streams,
        "rate": options.rate,
        "tokens_per_chunk": round(results[0]["tokens"] / results[0]["chunks"], 3),
        "added_ms": {
            name: round(statistics.median(r["delays"][name] for r in results), 2)
            for name in ("p50", "p99", "max")
        },
        "p99_of_each_run": [round(r["delays"]["p99"], 2) for r in results],
        "machine_stalls_over_4ms_a_second": [round(r["stalls"], 1) for r in results],
        "p99_after_the_first_second": round(statistics.median(r["delays"]["later_p99"] for r in results), 2),
        "server_cpu_share": round(statistics.median(r["server_cpu"] for r in results), 2),
    }


def ready(options: argparse.Namespace) -> Figures:
    """Seconds until /ready says so, and the front end's memory."""
    times, memory = [], []
    for _ in range(options.repeat):
        began = time.monotonic()
        with real_server(options.model) as (port, process):
            wait_ready(port)
            times.append(time.monotonic() - began)
            memory.append(resident_bytes(process.pid) / 1e6)
    return {
        "scenario": "ready",
        "model": options.model,
        "seconds": round(statistics.median(times), 2),
        "each": [round(t, 2) for t in times],
        "front_end_rss_mb": round(max(memory), 1),
    }


def served(options: argparse.Namespace) -> Figures:
    """Throughput of the same requests, offline and through the server, in turns."""
    requests = [
        {"prompt": [(17 * i + j) % 5000 + 100 for j in range(32 + 3 * i)], "max_tokens": 128}
        for i in range(options.requests)
    ]
    alone, online, shares = [], [], []
    # Both with a cold prefix cache: the repeats would find their prompts in a warm one.
    cold = ("--max-model-len", "2048", "--no-enable-prefix-caching")
    with (
        offline_engine(options.model, requests) as run_offline,
        real_server(options.model, *cold) as (port, _),
    ):
        run_clients(port, 4, 8)
        for _ in range(options.repeat):
            alone.append(run_offline())
            found = run_clients(port, requests=requests)
            online.append(found["tokens"] / found["seconds"])
            shares.append(found["client_cpu"] / found["seconds"])
    ratios = [there / here for there, here in zip(online, alone, strict=True)]
    return {
        "scenario": "served",
        "model": options.model,
        "requests": options.requests,
        "offline_tokens_per_second": round(statistics.median(alone)),
        "served_tokens_per_second": round(statistics.median(online)),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "client_cpu_share_of_a_core": round(statistics.median(shares), 3),
    }


def show(figures: Figures) -> None:
    """One line for machines and people."""
    print(json.dumps(figures), flush=True)


# ---------------------------------------------------------------------- the engine without a server


@contextlib.contextmanager
def offline_engine(model: str, requests: list[dict[str, Any]]) -> Iterator[Callable[[], float]]:
    """`offline` in a process of its own; each call runs the requests once: tokens a second."""
    process = subprocess.Popen(
        [sys.executable, __file__, "offline", "--model", model],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    said, heard = process.stdin, process.stdout

    def ask(line: str) -> str:
        said.write(line + "\n")
        said.flush()
        return heard.readline()

    try:
        if ask(json.dumps(requests)).strip() != "loaded":
            raise RuntimeError("the offline engine did not load")
        yield lambda: float(ask("run"))
    finally:
        said.close()
        process.wait(30)


def offline(model: str) -> None:
    """Reads requests, then answers each line with tokens a second of one run of them all."""
    from octavo import LLM, SamplingParams

    requests = json.loads(sys.stdin.readline())
    llm = LLM(model, max_model_len=2048, enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=request["max_tokens"])
        for request in requests
    ]
    llm.generate(prompts[:4], params[:4], use_tqdm=False)
    print("loaded", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        print(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds, flush=True)


if __name__ == "__main__":
    main()
