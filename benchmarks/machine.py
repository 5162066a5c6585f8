"""What this machine could do at best for the same work, from two measured figures.

    R = memory read bandwidth, bytes/s      the best of several ways to read, all threads at once
    F = bf16 multiply-adds, operations/s    the best of torch's product of 2048 x 2048 x 2048 and the
                                            processor's instruction for it alone (cpu_peak.c; only
                                            with a C compiler, on x86 with AVX-512 bf16)

and of the model: P parameters that one token uses, H of them in the output head, W = 2 P bytes in
all, K bytes of KV cache a token. One step reads every weight once whatever its number of rows. So a
step of n rows (tokens), s of which are sampled from, over c tokens of context in all takes at least

    step(n, s, c) = max( (W + K c) / R ,  2 ((P - H) n + H s) / F )

    single stream      1 / step(1, 1, 0): tokens a second, the context left out
    time to first      step(prompt, 1, 0)
    batch of B         B out / ( step(all prompt tokens, B, 0) + (out - 1) step(B, B, mean context) )
    shared prefix      the same, the prefix computed once and read once a step

Attention's own arithmetic, sampling and everything outside the products are free in this model: it
is a bound and no estimate.

`python -m benchmarks.machine THREADS [--quick]` measures R and F and prints them as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.engines.job import ForeignCores, Request


@dataclass(frozen=True)
class Limits:
    """The machine's two figures."""

    read_bytes_s: float
    bf16_operations_s: float
    foreign_cores: float | None = None

    def better(self, other: Limits) -> Limits:
        """The best of two measurements; a limit is never lowered by a disturbed one."""
        return Limits(
            max(self.read_bytes_s, other.read_bytes_s),
            max(self.bf16_operations_s, other.bf16_operations_s),
            max(filter(None, (self.foreign_cores, other.foreign_cores)), default=None),
        )


@dataclass(frozen=True)
class ModelSize:
    """What one token costs."""

    parameters: int
    head_parameters: int
    kv_bytes: int  # of one token, bf16

    @property
    def weight_bytes(self) -> int:
        """In bf16."""
        return 2 * self.parameters

    @classmethod
    def of(cls, folder: Path) -> ModelSize:
        """From a model folder's config and the headers of its weights."""
        from octavo.cli.demo import bytes_per_token
        from octavo.models.config import ModelConfig

        config = ModelConfig.from_folder(folder)
        kv = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2
        return cls(bytes_per_token(folder, 1), config.vocab_size * config.hidden_size, kv)


def step_seconds(model: ModelSize, machine: Limits, rows: int, samples: int, context: float = 0.0) -> float:
    """The least time of one step of `rows` tokens that read `context` tokens of KV in all."""
    reading = (model.weight_bytes + model.kv_bytes * context) / machine.read_bytes_s
    body = model.parameters - model.head_parameters
    return max(reading, 2 * (body * rows + model.head_parameters * samples) / machine.bf16_operations_s)


def stream_limit(model: ModelSize, machine: Limits) -> float:
    """Tokens a second of one request."""
    return 1 / step_seconds(model, machine, 1, 1)


def first_token_limit(model: ModelSize, machine: Limits, prompt: int) -> float:
    """Seconds until the first token of one request."""
    return step_seconds(model, machine, prompt, 1)


def batch_limit(model: ModelSize, machine: Limits, requests: Sequence[Request], shared: int = 0) -> float:
    """Output tokens a second of requests that all run together; `shared` prompt tokens are the same."""
    count, new = len(requests), requests[0].new_tokens
    prompts = shared + sum(len(request.prompt) - shared for request in requests)
    context = prompts + count * fmean(range(new))
    seconds = step_seconds(model, machine, prompts, count)
    seconds += (new - 1) * step_seconds(model, machine, count, count, context)
    return count * new / seconds


def measure(threads: int, thorough: bool = True) -> Limits:
    """Both figures, with `threads` threads. Not thorough: fast, for trying the script."""
    import torch

    from benchmarks import cpu_kernels
    from octavo.errors import OctavoError
    from octavo.kernels.cpu.build import BuildError
    from octavo.kernels.cpu.library import available_isas
    from octavo.platform import memory_bandwidth_probe

    torch.set_num_threads(threads)
    repeat, seconds = (15, 1.0) if thorough else (2, 0.05)
    memory = torch.ones(1 << (28 if thorough else 24))  # 1 GiB, far beyond any cache
    square = torch.randn(2048, 2048).bfloat16()
    with ForeignCores() as watch:
        reading = max(
            memory.nbytes / _best(lambda: memory.sum(), repeat), memory_bandwidth_probe(seconds) * 1e9
        )
        multiplying = 2 * 2048**3 / _best(lambda: square @ square, repeat)
        with contextlib.suppress(OctavoError, BuildError):  # no kernels or no compiler: torch alone
            if thorough and "avx512bf16" in available_isas():
                found = cpu_kernels.machine_limits(threads)
                reading, multiplying = max(reading, found[0]), max(multiplying, found[1])
    return Limits(reading, multiplying, watch.cores)


def _best(call: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest call."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(int(sys.argv[1]), thorough="--quick" not in sys.argv))))
