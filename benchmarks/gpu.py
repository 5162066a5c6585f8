"""The GPU scenarios: tokens a second of Octavo, beside what this card allows and what is aimed at.

    python -m benchmarks.gpu --models qwen3-8b qwen3-0.6b
    python -m benchmarks.gpu --models qwen3-8b --kinds latency-b1 --draft qwen3-0.6b
    python -m benchmarks.gpu --startup qwen3-8b

Random weights; prompts are token ids, end-of-sequence is ignored. Each scenario runs `--repeat` times
with other prompts, and its line gives the median. One JSON line a scenario: output tokens a second
(prompt tokens for prefill), the share of the limit computed from this card's ceilings, the share of
the aim, how much of the time the device was busy, and for how many milliseconds a step it waited for the
host: from a step's end to the next one's first command, and the launching of a step that came late and took
the host more than half as long as the device.
With a draft model also the tokens that a round brought on average: that is luck, and not speed. --trace:
the steps of every repeat of a scenario in a file, with their rows and what host and device took.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_workloads import ACCEPTANCE, KINDS, MODELS, model_folder, requests
from octavo.core.messages import RowKind

# What is aimed at on one H200: output tokens a second, prompt tokens for prefill.
AIMS: dict[str, dict[str, float]] = {
    "qwen3-8b": {
        "latency-b1": 235, "latency-b16": 2950, "latency-b64": 7400, "throughput": 10800, "prefill": 41000,
        "prefix": 6500,
    },
    "qwen3-0.6b": {
        "latency-b1": 1250, "latency-b16": 13500, "latency-b64": 25000, "throughput": 26000,
        "prefill": 380000,
    },
    "qwen3-8b + qwen3-0.6b": {"latency-b1": 450, "latency-b16": 4700, "latency-b64": 8500},
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 4200, "max_num_seqs": 256,
    "gpu_memory_utilization": 0.85, "dtype": "bfloat16", "device": "cuda",
}  # fmt: skip

_FIRST_TOKEN = """
import sys
from benchmarks.gpu import OPTIONS
from octavo import LLM, SamplingParams
llm = LLM(model=sys.argv[1], **OPTIONS)
params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
for _ in llm.generate({"prompt_token_ids": [1, 2, 3]}, params, stream=True, use_tqdm=False):
    print("first token", flush=True)
    break
llm.shutdown()
"""


ONE_REQUEST_RUNS = 9

# The columns of --trace; seconds, and `launched` on the clock of the run.
TRACED = ("repeat", "launched", "requests", "rows", "chunk_rows", "launching", "target", "drafting", "gap")
# A step whose first command found an idle device, and which took the host most of its time to launch: all of
# that may have been waited for. Where launching took less than half of it, the host was soon ahead.
_IDLE_SECONDS = 10e-6
_AHEAD = 0.5


def _chunks(rows: Sequence[Any]) -> list[Any]:
    return [part for part in rows if part.kind == RowKind.CHUNK]


class _Watched:
    """An executor that adds up what the device says its steps took, and for how long it had none."""

    def __init__(self, executor: Any) -> None:
        self.trace: list[tuple[float, ...]] = []  # a step each, see TRACED
        self._shapes: deque[tuple[float, int, int, int]] = deque()
        self._executor = executor
        self._launches: deque[tuple[Any, float]] = deque()  # of each step under way: it, seconds to launch it
        self._before: Any = None  # the end of the step read last
        self.start_over()

    def start_over(self) -> None:
        """Forget what was seen."""
        self.busy = self.idle = 0.0
        self.trace.clear()
        self.steps = 0
        self.rounds = self.round_tokens = 0  # requests that verified drafts in a step, and their tokens
        self._before = None

    def launch(self, out: Any) -> None:
        started = time.perf_counter()
        self._executor.launch(out)
        self._launches.append((self._executor._outputs[-1], time.perf_counter() - started))
        rows, chunks = (sum(part.num_rows for part in parts) for parts in (out.rows, _chunks(out.rows)))
        self._shapes.append((started, len(out.rows), rows, chunks))

    def collect(self) -> Any:
        output = self._executor.collect()
        self.busy += output.target_seconds + output.draft_seconds
        self.steps += 1
        for verified, tokens in zip(output.num_drafts_valid, output.tokens, strict=True):
            if verified:
                self.rounds += 1
                self.round_tokens += len(tokens)
        pending, launch_seconds = self._launches.popleft()
        gap = 0.0
        if self._before is not None:
            gap = self._before.seconds_until(pending._started)
            is_behind = gap > _IDLE_SECONDS and launch_seconds > _AHEAD * output.target_seconds
            self.idle += gap + (launch_seconds if is_behind else 0.0)
        self._before = pending._readback.mark if output.draft_seconds else pending._drawn
        times = (launch_seconds, output.target_seconds, output.draft_seconds, gap)
        self.trace.append((*self._shapes.popleft(), *times))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


def conditional(rates: Sequence[float]) -> list[float]:
    """The chance that a draft is accepted if all before it were."""
    return [rate / before for rate, before in zip(rates, (1.0, *rates), strict=False)]


def time_start(model: str, parent: Path) -> dict[str, Any]:
    """Seconds from the start of a process to its first token."""
    folder = model_folder(model, parent)
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", _FIRST_TOKEN, str(folder)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - started
        child.stdout.read()
    if line.strip() != "first token" or child.returncode:
        raise SystemExit(f"the process of {model} ended with {child.returncode}")
    return {"kind": "startup", "model": model, "seconds": round(seconds, 2)}


def repeats(kind: str, repeat: int, draft: str | None) -> int:
    """Runs of a scenario. One request with drafts is done in some 66 rounds: luck decides over 6% of it."""
    return max(repeat, ONE_REQUEST_RUNS) if draft is not None and kind == "latency-b1" else repeat


class Scenarios:
    """One engine, and what is timed with it."""

    def __init__(self, model: str, parent: Path, draft: str | None, drafts: Any, options: Any) -> None:
        from octavo import LLM

        self.model, self.draft = model, draft
        settings = {**OPTIONS, **options}
        if draft is not None:
            settings["speculative"] = {
                "method": "draft_model", "model": str(model_folder(draft, parent)),
                "num_speculative_tokens": drafts, "synthetic_acceptance_rates": conditional(ACCEPTANCE),
            }  # fmt: skip
        self.llm = LLM(model=str(model_folder(model, parent)), **settings)
        engine: Any = self.llm._parts.engine  # type: ignore[union-attr]
        self.watched = _Watched(engine.executor)
        engine.executor = self.watched

    def generate(self, work: list[tuple[list[int], int]], temperature: float) -> tuple[float, int]:
        """(seconds, output tokens)"""
        from octavo import SamplingParams

        params = [
            SamplingParams(max_tokens=count, temperature=temperature, ignore_eos=True) for _, count in work
        ]
        prompts: Any = [{"prompt_token_ids": prompt} for prompt, _ in work]
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)

    def run(
        self,
        kind: str,
        repeat: int,
        ceilings: Any,
        temperature_asked: float | None = None,
        trace: Path | None = None,
    ) -> dict[str, Any]:
        """One scenario; the steps of its repeats go to a file in the folder `trace`."""
        from benchmarks.gpu_limits import Limits

        temperature = 0.6 if kind == "throughput" and self.draft is None else 0.0
        if temperature_asked is not None:
            temperature = temperature_asked
        rates, busy, idle, steps = [], [], [], 0
        rounds, round_tokens = 0, 0
        traced: list[list[float]] = []
        for seed in range(repeats(kind, repeat, self.draft)):
            work = requests(kind, seed)
            self.watched.start_over()
            seconds, tokens = self.generate(work, temperature)
            assert tokens == sum(count for _, count in work), "a request ended early"
            counted = sum(len(prompt) for prompt, _ in work) if kind == "prefill" else tokens
            rates.append(counted / seconds)
            busy.append(self.watched.busy / seconds)
            idle.append(self.watched.idle / max(1, self.watched.steps))
            steps = self.watched.steps
            rounds, round_tokens = rounds + self.watched.rounds, round_tokens + self.watched.round_tokens
            first = self.watched.trace[0][0]
            traced += [[seed, launched - first, *others] for launched, *others in self.watched.trace]
        if trace is not None:
            trace.mkdir(parents=True, exist_ok=True)
            with open(trace / f"{self.model}-{kind}.csv", "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(TRACED)
                writer.writerows([round(value, 6) for value in step] for step in traced)
        work = requests(kind)
        limits = Limits(MODELS[self.model], ceilings)
        shape = [(len(prompt), count) for prompt, count in work]
        cached = 2048 if kind == "prefix" else 0
        least = limits.run(shape, cached) + (limits.prefill([cached]) if cached else 0.0)
        counted = sum(n for n, _ in shape) if kind == "prefill" else sum(count for _, count in shape)
        limit = counted / least
        if self.draft is not None and kind.startswith("latency"):
            draft = Limits(MODELS[self.draft], ceilings)
            limit = limits.speculation(draft, 640, len(shape), ACCEPTANCE)
        name = self.model if self.draft is None else f"{self.model} + {self.draft}"
        aim = AIMS.get(name, {}).get(kind)
        rate = median(rates)
        return {
            "kind": kind, "model": name, "tok_s": round(rate, 1), "of_limit": round(rate / limit, 3),
            "of_aim": None if aim is None else round(rate / aim, 3), "limit": round(limit),
            "spread": round(max(rates) / min(rates) - 1, 3), "busy": round(median(busy), 3), "steps": steps,
            "ms_a_step": round(1e3 * counted / rate / max(1, steps), 3),
            "idle_ms_a_step": round(1e3 * median(idle), 4),
            "runs": [round(value, 1) for value in rates],
            "tokens_a_round": round(round_tokens / rounds, 3) if rounds else None,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=sorted(MODELS), default=[])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--draft", choices=sorted(MODELS), help="speculate with this model")
    parser.add_argument("--drafts", default="auto", help='drafts a step, or "auto"')
    parser.add_argument("--startup", nargs="*", choices=sorted(MODELS), default=[])
    parser.add_argument(
        "--trace", type=Path, metavar="FOLDER", help="a table of each scenario's steps, as CSV"
    )
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=JSON", help="options of the engine")
    parser.add_argument(
        "--temperature", type=float, help="default: 0, and 0.6 for throughput without a draft model"
    )
    arguments = parser.parse_args()
    options = {
        name: json.loads(value) for name, _, value in (text.partition("=") for text in arguments.option)
    }
    drafts: Any = int(arguments.drafts) if arguments.drafts.isdigit() else arguments.drafts
    with tempfile.TemporaryDirectory() as parent:
        for model in arguments.startup:
            print(json.dumps(time_start(model, Path(parent))), flush=True)
        if not arguments.models:
            return
        from benchmarks.gpu_limits import measure_ceilings

        ceilings = measure_ceilings()
        print(
            json.dumps(
                {
                    "kind": "ceilings", "copy_tb_s": round(ceilings.copy / 1e12, 3),
                    "read_tb_s": round(ceilings.read / 1e12, 3),
                    "matrix_tflop_s": round(ceilings.matrix / 1e12),
                }
            ),
            flush=True,
        )  # fmt: skip
        for model in arguments.models:
            started = time.perf_counter()
            scenarios = Scenarios(model, Path(parent), arguments.draft, drafts, options)
            scenarios.generate([([1, 2, 3], 4)], 0.0)
            ready = {"kind": "engine", "model": model, "seconds": round(time.perf_counter() - started, 2)}
            print(json.dumps(ready), flush=True)
            for kind in arguments.kinds:
                row = scenarios.run(kind, arguments.repeat, ceilings, arguments.temperature, arguments.trace)
                print(json.dumps(row), flush=True)
            scenarios.llm.shutdown()


if __name__ == "__main__":
    main()
