"""What this machine could do at best for the same work, from two measured figures.

    R = memory read bandwidth, bytes/s      (torch, one pass over 1 GiB with all threads, best of 15)
    F = bf16 matrix products, operations/s  (torch, 2048 x 2048 x 2048, best of 15)

and three of the model: P parameters that one token uses, W = 2 P bytes of them, K bytes of KV cache
a token. One step reads every weight once whatever its number of rows, so a step of n rows (tokens)
over a context of c tokens in all takes at least

    step(n, c) = max( (W + K c) / R ,  2 P n / F )

    single stream      1 / step(1, 0): tokens a second, the context left out
    time to first      step(prompt, 0)
    batch of B         B out / ( step(all prompt tokens, 0) + (out - 1) step(B, mean context) )
    shared prefix      the same, the prefix computed once and read once a step

Attention's own arithmetic, sampling and everything outside the products are free in this model, so
it is a bound and no estimate. F is what torch reaches, not the processor's nominal peak.

`python -m benchmarks.machine` measures R and F and prints them as JSON.
"""

from __future__ import annotations

import json
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
        return cls(bytes_per_token(folder, 1), kv)


def step_seconds(model: ModelSize, machine: Limits, rows: int, context: float = 0.0) -> float:
    """The least time of one step of `rows` tokens that read `context` tokens of KV in all."""
    reading = (model.weight_bytes + model.kv_bytes * context) / machine.read_bytes_s
    return max(reading, 2 * model.parameters * rows / machine.bf16_operations_s)


def stream_limit(model: ModelSize, machine: Limits) -> float:
    """Tokens a second of one request."""
    return 1 / step_seconds(model, machine, 1)


def first_token_limit(model: ModelSize, machine: Limits, prompt: int) -> float:
    """Seconds until the first token of one request."""
    return step_seconds(model, machine, prompt)


def batch_limit(model: ModelSize, machine: Limits, requests: Sequence[Request], shared: int = 0) -> float:
    """Output tokens a second of requests that all run together; `shared` prompt tokens are the same."""
    own = sum(len(request.prompt) - shared for request in requests)
    new = requests[0].new_tokens
    context = shared + own + len(requests) * fmean(range(new))
    prompts = step_seconds(model, machine, shared + own)
    return len(requests) * new / (prompts + (new - 1) * step_seconds(model, machine, len(requests), context))


def measure(repeat: int = 15) -> Limits:
    """Read bandwidth and bf16 products with the threads torch takes."""
    import torch

    memory = torch.ones(1 << 28)  # 1 GiB, far beyond any cache
    square = torch.randn(2048, 2048).bfloat16()
    with ForeignCores() as watch:
        reading = _best(lambda: memory.sum(), repeat)
        multiplying = _best(lambda: square @ square, repeat)
    return Limits(memory.nbytes / reading, 2 * 2048**3 / multiplying, watch.cores)


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
    print(json.dumps(asdict(measure())))
