"""What one GPU can do at most, and the least time that a workload can take on it.

The limit of a step is the longer of two times: every weight and every KV token read once at the
measured bandwidth, and the arithmetic at the measured matrix rate. Prompts are computed at the matrix
rate. No launch, no gap and no sampling is counted.
"""

# mypy: disable-error-code="no-untyped-call, misc"
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ceilings:
    """Measured on the card that is used."""

    copy: float  # bytes a second, read and written
    read: float  # bytes a second
    matrix: float  # bf16 operations a second


def _seconds(work: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def measure_ceilings() -> Ceilings:
    """Copy and read gigabytes, and multiply 8192 x 8192 matrices of random numbers."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    source = random(2**30)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source))  # noqa: F821
    del source, target
    weights, row = [random(151936, 4096) for _ in range(4)], random(1, 4096)
    read = 4 * weights[0].nbytes / _seconds(lambda: [row @ weight.T for weight in weights])  # noqa: F821
    del weights
    a, b = random(8192, 8192), random(8192, 8192)
    matrix = 2 * 8192**3 / _seconds(lambda: a @ b)
    torch.cuda.empty_cache()
    return Ceilings(copied, read, matrix)


class Limits:
    """The least seconds of work with one model on one card."""

    def __init__(self, config: dict[str, Any], ceilings: Ceilings) -> None:
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        self._q = config["num_attention_heads"] * config["head_dim"]
        kv = config["num_key_value_heads"] * config["head_dim"]
        self._layers = layers
        self._body = layers * (hidden * (2 * self._q + 2 * kv) + 3 * hidden * config["intermediate_size"])
        self._head = hidden * config["vocab_size"]
        self._kv_bytes = layers * 4 * kv
        self._ceilings = ceilings

    def step(self, contexts: Sequence[int], rows: int = 1) -> float:
        """One step of requests with these contexts and so many rows each."""
        weights = self._body + self._head
        memory = (2 * weights + sum(contexts) * self._kv_bytes) / self._ceilings.read
        attention = 4 * self._q * self._layers * sum(contexts)
        arithmetic = rows * (2 * weights * len(contexts) + attention) / self._ceilings.matrix
        return float(max(memory, arithmetic))

    def prefill(self, lengths: Sequence[int], cached: int = 0) -> float:
        """Prompts of these lengths, of each of which `cached` tokens need not be computed."""
        arithmetic = sum(
            2 * self._body * (length - cached)
            + 2 * self._q * self._layers * (length * length - cached * cached)
            for length in lengths
        )
        return float(arithmetic / self._ceilings.matrix + 2 * self._head / self._ceilings.read)

    def run(self, requests: Sequence[tuple[int, int]], cached: int = 0) -> float:
        """Requests of (prompt tokens, output tokens), all at once; the prompts first."""
        total = self.prefill([prompt for prompt, _ in requests], cached)
        live = [(prompt + 1, count - 1) for prompt, count in requests if count > 1]
        while live:
            total += self.step([context for context, _ in live])
            live = [(context + 1, count - 1) for context, count in live if count > 1]
        return total

    def speculation(self, draft: Limits, context: int, batch: int, rates: Sequence[float]) -> float:
        """Tokens a second with the best number of drafts, at unconditional acceptance by position."""
        best = 0.0
        for drafts in range(len(rates) + 1):
            seconds = self.step([context] * batch, drafts + 1) + drafts * draft.step([context] * batch)
            best = max(best, batch * (1 + sum(rates[:drafts])) / seconds)
        return best
