"""Where a decode step's time goes: host, device, gaps between kernels, each kernel against its limit.

    python -m benchmarks.profile_step --model qwen3-0.6b --batch 1 16 64
    python -m benchmarks.profile_step --model qwen3-8b --batch --prompts 16x512 2x4000
    python -m benchmarks.profile_step --model qwen3-8b --draft qwen3-0.6b --drafts 5
    python -m benchmarks.profile_step --model qwen3-8b --batch --workload throughput --windows 2 100 600

Random weights, greedy, every request with the same context. For each batch one line of times in
milliseconds a step, then a table of kernels. A kernel's limit is the bytes it must read over the
measured read bandwidth. Programmatic dependents overlap, so kernels add up to more than the step takes;
`idle` is the time in which none runs. A workload of benchmarks/gpu.py is run as there and looked at in
windows, each some steps from a given one on. With a draft model a step is a round: what the target takes, the
first pass (which catches up too) and the other passes stand in the line.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu import OPTIONS, conditional
from benchmarks.gpu_limits import Ceilings, measure_ceilings
from benchmarks.gpu_workloads import ACCEPTANCE, KINDS, MODELS, model_folder, requests


def kernel_bytes(config: dict[str, Any], batch: int, context: int) -> dict[str, float]:
    """Bytes that the kernels of this name must read in one step."""
    hidden, layers, width = (
        config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"],
    )  # fmt: skip
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    return {
        "qkv_kernel": 2.0 * layers * hidden * (q + 2 * kv),
        "residual_kernel": 2.0 * layers * hidden * (q + width),
        "gate_up_kernel": 4.0 * layers * hidden * width,
        "wide_gate_up_kernel": 4.0 * layers * hidden * width,
        "plain_kernel": 2.0 * hidden * config["vocab_size"],
        "few_rows_kernel": 4.0 * layers * kv * batch * context,
    }


class Steps:
    """Decode steps of one engine, with the times the host spends and waits."""

    def __init__(self, llm: Any, batch: int, context: int, count: int, longest: int = 1) -> None:
        """`longest`: the most tokens a request gets in a step."""
        from octavo import SamplingParams
        from octavo.worker.device_time import Readback

        self.engine = llm._parts.engine
        params = SamplingParams(max_tokens=(count + 40) * longest, temperature=0.0, ignore_eos=True)
        source = torch.Generator().manual_seed(batch)
        for index in range(batch):
            prompt = torch.randint(0, 150_000, (context,), generator=source).tolist()
            self.engine.add_request(f"{batch}-{index}", {"prompt_token_ids": prompt}, params)
        self.waited = 0.0
        self.outputs: list[Any] = []
        collect = self.engine.executor.collect

        def noted() -> Any:
            self.outputs.append(collect())
            return self.outputs[-1]

        self.engine.executor.collect = noted
        wait = Readback.wait

        def timed(readback: Any) -> Any:
            started = time.perf_counter()
            tensors = wait(readback)
            self.waited += time.perf_counter() - started
            return tensors

        Readback.wait = timed  # type: ignore[method-assign, assignment]

        def restore() -> None:
            Readback.wait = wait  # type: ignore[method-assign]
            self.engine.executor.collect = collect

        self._restore = restore
        scheduler = self.engine.scheduler
        while scheduler.num_running != batch or any(r.num_tokens <= context for r in scheduler.running):
            self.engine.step()
        self.run(10)

    def run(self, count: int) -> dict[str, float]:
        """Median milliseconds of so many steps."""
        walls, hosts = [], []
        self.outputs.clear()
        for _ in range(count):
            self.waited = 0.0
            started = time.perf_counter()
            self.engine.step()
            wall = time.perf_counter() - started
            walls.append(wall * 1e3)
            hosts.append((wall - self.waited) * 1e3)
        times = {"wall_ms": median(walls), "host_ms": median(hosts)}
        times["target_ms"] = median(output.target_seconds for output in self.outputs) * 1e3
        passes = [(o.draft_passes, o.draft_seconds) for o in self.outputs if o.draft_passes is not None]
        if passes:
            times["passes"] = median(len(taken.rows) for taken, _ in passes)
            times["first_rows"] = median(taken.rows[0] for taken, _ in passes)
            times["first_pass_ms"] = median(taken.first_seconds for taken, _ in passes) * 1e3
            times["drafts_ms"] = median(seconds for _, seconds in passes) * 1e3
            emitted = sum(len(row) for output in self.outputs for row in output.tokens)
            times["tokens"] = emitted / len(self.outputs)
        return times

    def close(self) -> None:
        """End the requests."""
        self._restore()
        for name in list(self.engine._states):
            self.engine.abort(name)
        while self.engine.has_work():
            self.engine.step()


def profile(steps: Steps, count: int, config: dict[str, Any], batch: int, context: int, read: float) -> None:
    """Kernels of some steps, by name."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            steps.engine.step()
        torch.cuda.synchronize()
    limits = {name: size / read * 1e3 for name, size in kernel_bytes(config, batch, context).items()}
    show(profiler, count, limits)


def show(profiler: Any, count: int, limits: dict[str, float]) -> None:
    """A table of kernels; `count` steps were recorded."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    spans: list[tuple[float, float]] = []
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            totals[event.name][0] += 1 / count
            totals[event.name][1] += event.device_time / 1e3 / count
            spans.append((event.time_range.start, event.time_range.end))
    idle, until = 0.0, min((start for start, _ in spans), default=0.0)
    for start, end in sorted(spans):
        idle += max(0.0, start - until)
        until = max(until, end)
    print(f"  {'kernel':52} {'a step':>7} {'ms':>8} {'limit':>7}")
    for name, (number, ms) in sorted(totals.items(), key=lambda item: -item[1][1])[:14]:
        limit = limits.get(name)
        print(f"  {name[:52]:52} {number:7.1f} {ms:8.4f} {'' if limit is None else f'{limit:7.3f}'}")
    print(f"  {'together':52} {'':7} {sum(ms for _, ms in totals.values()):8.4f}")
    print(f"  {'idle':52} {'':7} {idle / 1e3 / count:8.4f}", flush=True)


def profile_prompts(llm: Any, number: int, length: int) -> None:
    """One step that computes so many prompts of this length."""
    from torch.profiler import ProfilerActivity

    from octavo import SamplingParams

    engine = llm._parts.engine
    source = torch.Generator().manual_seed(number)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)

    def run(name: str) -> float:
        for index in range(number):
            prompt = torch.randint(0, 150_000, (length,), generator=source).tolist()
            engine.add_request(f"{name}{index}", {"prompt_token_ids": prompt}, params)
        torch.cuda.synchronize()
        started = time.perf_counter()
        while engine.has_work():
            engine.step()
        return (time.perf_counter() - started) * 1e3

    times = [run(f"{repeat}-{number}x{length}-") for repeat in range(3)]
    print(json.dumps({"prompts": f"{number}x{length}", "ms": [round(ms, 2) for ms in times]}), flush=True)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(f"p-{number}x{length}-")
        torch.cuda.synchronize()
    show(profiler, 1, {})


def profile_workload(llm: Any, kind: str, windows: list[int], count: int) -> None:
    """A scenario of benchmarks/gpu.py; kernels of `count` steps from the first step of each window on."""
    from torch.profiler import ProfilerActivity

    from octavo import SamplingParams

    engine = llm._parts.engine
    temperature = 0.6 if kind == "throughput" else 0.0
    for index, (prompt, length) in enumerate(requests(kind)):
        params = SamplingParams(max_tokens=length, temperature=temperature, ignore_eos=True)
        engine.add_request(f"{kind}-{index}", {"prompt_token_ids": prompt}, params)
    rows: list[int] = []
    launch = engine.executor.launch

    def noted(out: Any) -> Any:
        rows.append(sum(row.num_rows for row in out.rows))
        return launch(out)

    engine.executor.launch = noted
    step = 0
    for window in sorted(windows):
        while step < window and engine.has_work():
            engine.step()
            step += 1
        torch.cuda.synchronize()
        first, before = len(rows), time.perf_counter()
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(count):
                engine.step()
            torch.cuda.synchronize()
            ms = (time.perf_counter() - before) / count * 1e3
        step += count
        seen = rows[first:]
        print(
            json.dumps(
                {
                    "workload": kind, "from_step": window, "steps": count, "rows": sum(seen) / len(seen),
                    "running": engine.scheduler.num_running, "ms_a_step": round(ms, 3),
                }
            ),
            flush=True,
        )  # fmt: skip
        show(profiler, count, {})
    engine.executor.launch = launch
    for name in list(engine._states):
        engine.abort(name)
    while engine.has_work():
        engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--prompts", nargs="*", default=[], metavar="NUMBERxLENGTH", help="a step of prompts")
    parser.add_argument("--workload", choices=KINDS, help="a scenario of benchmarks/gpu.py")
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 100, 600], help="its steps to look at")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--draft", choices=sorted(MODELS), help="speculate with this model")
    parser.add_argument("--drafts", type=int, default=5, help="drafts a step")
    parser.add_argument("--host", action="store_true", help="print where the host's time goes")
    parser.add_argument("--read", type=float, default=None, help="bytes a second; default: measured")
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=JSON", help="options of the engine")
    arguments = parser.parse_args()
    from octavo import LLM

    ceilings = measure_ceilings() if arguments.read is None else Ceilings(0.0, arguments.read, 0.0)
    options = {
        name: json.loads(value) for name, _, value in (text.partition("=") for text in arguments.option)
    }
    config, longest = MODELS[arguments.model], 1
    with tempfile.TemporaryDirectory() as parent:
        if arguments.draft is not None:
            longest = 1 + arguments.drafts
            options["speculative"] = {
                "method": "draft_model", "model": str(model_folder(arguments.draft, Path(parent))),
                "num_speculative_tokens": arguments.drafts,
                "synthetic_acceptance_rates": conditional(ACCEPTANCE),
            }  # fmt: skip
        llm = LLM(model=str(model_folder(arguments.model, Path(parent))), **{**OPTIONS, **options})
        for batch in arguments.batch:
            steps = Steps(llm, batch, arguments.context, 2 * arguments.steps + 80, longest)
            times = steps.run(arguments.steps)
            context = arguments.context + arguments.steps
            print(
                json.dumps(
                    {"model": arguments.model, "batch": batch, **{k: round(v, 4) for k, v in times.items()}}
                ),
                flush=True,
            )
            profile(steps, 10, config, batch, context, ceilings.read)
            if arguments.host:
                profiler = cProfile.Profile()
                profiler.enable()
                steps.run(arguments.steps)
                profiler.disable()
                text = io.StringIO()
                pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(28)
                print(text.getvalue(), flush=True)
            steps.close()
        for text in arguments.prompts:
            number, length = map(int, text.split("x"))
            profile_prompts(llm, number, length)
        if arguments.workload is not None:
            profile_workload(llm, arguments.workload, arguments.windows, 10)
        llm.shutdown()


if __name__ == "__main__":
    main()
