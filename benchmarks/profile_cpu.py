"""Where the time of a batch goes on the CPU: each step's rows, and the seconds of its parts.

    python -m benchmarks.profile_cpu --model MODEL [--row batch|prefix] [--steps]

Runs a row of `benchmarks/cpu.py` once in this process, with clocks around the parts of a step:

    forward   the decoder, from token ids to hidden states
    head      the logits of the rows that are sampled
    sample    drawing and the counters
    host      everything else of a step: scheduling, bookkeeping, text

and prints, for each kind of step, the median of a step and the least time that the arithmetic of all
of them needs (`benchmarks/machine.py`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines.job import ForeignCores, Request
from benchmarks.machine import Limits, ModelSize, measure, step_seconds
from benchmarks.workloads import Sizes, Workloads
from octavo import LLM, SamplingParams
from octavo.core.messages import ModelOutput, RowKind, SchedulerOutput

PARTS = ("forward", "head", "sample", "host")


@dataclass
class StepRecord:
    """Rows of one step, and the seconds of its parts."""

    decode_rows: int
    chunk_rows: int
    samples: int
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.seconds.values())


class Recorder:
    """Puts clocks around the parts of an engine's steps."""

    def __init__(self, llm: LLM) -> None:
        self.steps: list[StepRecord] = []
        parts = llm._engine_parts()
        runner: Any = parts.engine.executor.runner  # type: ignore[attr-defined]
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._end_of_last = 0.0
        model = runner.model
        model.forward = self._timed("forward", model.forward)
        model.logits = self._timed("head", model.logits)
        self._forward, self._sample = runner.forward, runner.sample
        runner.forward, runner.sample = self._step_forward, self._timed("sample", self._step_sample)
        self._out: SchedulerOutput | None = None

    def start(self) -> None:
        """Forget what was recorded so far."""
        self.steps.clear()
        self._end_of_last = time.perf_counter()

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            self._seconds[part] += time.perf_counter() - start
            return result

        return timed

    def _step_forward(self, out: SchedulerOutput) -> None:
        self._out = out
        self._forward(out)

    def _step_sample(self, masks: Any = None) -> ModelOutput:
        output: ModelOutput = self._sample(masks)
        return output

    def close_step(self) -> None:
        """The step is over: what the clocks did not see was the host's."""
        now, out = time.perf_counter(), self._out
        seconds = dict(self._seconds)
        seconds["host"] = now - self._end_of_last - sum(seconds.values())
        self._end_of_last, self._seconds, self._out = now, dict.fromkeys(PARTS, 0.0), None
        if out is None:
            return
        chunk = sum(rows.num_rows for rows in out.rows if rows.kind is RowKind.CHUNK)
        every = sum(rows.num_rows for rows in out.rows)
        self.steps.append(StepRecord(every - chunk, chunk, sum(r.samples for r in out.rows), seconds))


def run(llm: LLM, requests: list[Request], recorder: Recorder) -> float:
    """Serve all requests; returns the seconds it took."""
    engine = llm._engine_parts().engine
    step = engine.step

    def recorded() -> Any:
        outputs = step()
        recorder.close_step()
        return outputs

    engine.step = recorded  # type: ignore[method-assign]
    params = [
        SamplingParams(temperature=0.0, max_tokens=each.new_tokens, ignore_eos=True) for each in requests
    ]
    recorder.start()
    start = time.perf_counter()
    llm.generate([each.prompt for each in requests], params, use_tqdm=False)
    engine.step = step  # type: ignore[method-assign]
    return time.perf_counter() - start


def show(steps: list[StepRecord], name: str, size: ModelSize, machine: Limits) -> None:
    """One line for some steps."""
    if not steps:
        return
    parts = {part: sum(step.seconds[part] for step in steps) for part in PARTS}
    total = sum(parts.values())
    least = sum(
        step_seconds(size, machine, step.decode_rows + step.chunk_rows, step.samples) for step in steps
    )
    rows = sum(step.decode_rows + step.chunk_rows for step in steps)
    figures = [parts[part] for part in PARTS] + [total, statistics.median(step.total for step in steps)]
    columns = " ".join(f"{seconds * 1e3:9.1f}" for seconds in [*figures, least])
    print(f"{name:20} {len(steps):5} {rows:7} {columns} {least / total:6.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--row", choices=("batch", "prefix"), default="batch")
    parser.add_argument("--out", type=int, default=0, help="tokens each request makes, if not the row's own")
    parser.add_argument("--steps", action="store_true", help="a line for every step that has prompt rows")
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--peak", type=float, help="bf16 TFLOP/s of this machine, if known")
    parser.add_argument("--kv-mb", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    sizes = Sizes()
    if arguments.out:
        sizes = Sizes(batch_out=arguments.out, prefix_out=arguments.out)
    work = Workloads(arguments.model, sizes)
    chosen = work.batch() if arguments.row == "batch" else work.prefix()
    size = ModelSize.of(arguments.model)
    llm = LLM(
        str(arguments.model),
        dtype="bfloat16",
        kv_cache_memory=arguments.kv_mb << 20,
        max_num_seqs=64,
        max_model_len=1024,
        enable_prefix_caching=True,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
    )
    machine = Limits(6.0e10, arguments.peak * 1e12) if arguments.peak else measure(2)
    recorder = Recorder(llm)
    run(llm, chosen.warmup, recorder)
    for index in range(arguments.repeat):
        requests = chosen.requests
        if index:  # other tokens, so that the prefix cache is of no use
            requests = [
                Request([token + index for token in each.prompt], each.new_tokens) for each in requests
            ]
        with ForeignCores() as watch:
            seconds = run(llm, requests, recorder)
        made = sum(each.new_tokens for each in requests)
        steps = recorder.steps
        print(f"{seconds:.2f} s, {made / seconds:.0f} tok/s, others took {watch.cores} cores; milliseconds:")
        titles = " ".join(f"{title:>9}" for title in (*PARTS, "total", "a step", "least"))
        print(f"{'steps':20} {'count':>5} {'rows':>7} {titles}")
        if arguments.steps:
            for number, step in enumerate(steps):
                if step.chunk_rows or number % 16 == 0:
                    show([step], f"{step.decode_rows} + {step.chunk_rows}", size, machine)
        show([s for s in steps if not s.decode_rows], "prompt rows only", size, machine)
        show([s for s in steps if s.decode_rows and s.chunk_rows], "mixed", size, machine)
        most = max(step.decode_rows for step in steps)
        full = [s for s in steps if s.decode_rows == most and not s.chunk_rows]
        show(full, f"decode, {most} rows", size, machine)
        show(
            [s for s in steps if 0 < s.decode_rows < most and not s.chunk_rows],
            "decode, fewer",
            size,
            machine,
        )
        show(steps, "all", size, machine)
    llm.shutdown()


if __name__ == "__main__":
    main()
