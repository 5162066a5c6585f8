"""The parts of a `RunSpec`: how engines draw, when requests come, and what only transformers is told."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ConfigError

ARRIVALS = ("poisson", "constant", "gamma", "trace", "closed")
STRATEGIES = ("shared_all", "single", "separate", "ratio")


def one_of(value: str, known: tuple[str, ...], name: str, more: str = "") -> None:
    """Raise ConfigError, with the nearest name, if `value` is not one of `known`."""
    if value in known:
        return
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    also = f" (also {more})" if more else ""
    raise ConfigError(f"{name}={value!r} is not one of {', '.join(known)}{also}{hint}")


@dataclass(frozen=True)
class SamplingSpec:
    """How every engine draws. temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 42
    max_tokens: int = 100
    ignore_eos: bool = False  # exactly max_tokens tokens

    def check(self) -> None:
        """Raise ConfigError for an illegal value."""
        if self.max_tokens < 1:
            raise ConfigError(f"GENERATION_LENGTH (--max-tokens) must be at least 1, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"TEMPERATURE (--temperature) must be 0 (greedy) or more, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"TOP_P (--top-p) must be above 0 and at most 1 (off), not {self.top_p}")
        if self.top_k < -1:
            raise ConfigError(f"TOP_K (--top-k) must be 0 (off) or more, not {self.top_k}")
        if self.seed < 0:
            raise ConfigError(f"SEED (--seed) must be 0 or more, not {self.seed}")


@dataclass(frozen=True)
class LoadSpec:
    """When requests come.

    With `num_prompts` above 0 that many come, otherwise as many as `duration` seconds bring. An infinite
    `rate` sends all at once. "closed" keeps `concurrency` requests open and knows no rate.
    """

    arrival: str = "poisson"
    num_prompts: int = 0
    rate: float = 1.0  # requests a second
    duration: float = 300.0  # seconds in which requests are sent
    burstiness: float = 1.0  # of "gamma": 1 is Poisson, below it clumps, above it is more regular
    concurrency: int = 1
    trace_file: str | None = None

    @property
    def open_loop(self) -> bool:
        """True if requests come whether or not earlier ones have been answered."""
        return self.arrival != "closed"

    @property
    def all_at_once(self) -> bool:
        """True if every request is sent at the start."""
        return self.open_loop and self.arrival != "trace" and math.isinf(self.rate)

    def check(self) -> None:
        """Raise ConfigError for an illegal value."""
        one_of(self.arrival, ARRIVALS, "ARRIVAL (--arrival)")
        if self.num_prompts < 0:
            raise ConfigError(
                f"NUM_PROMPTS (--num-prompts) must be 0 (by time) or more, not {self.num_prompts}"
            )
        if self.open_loop and self.arrival != "trace" and not self.rate > 0:
            raise ConfigError(
                f"AUTO_RATE (--rate) is {self.rate:g} requests a second, so none would ever come: give a "
                f"rate "
                "above 0, inf (all at once, with NUM_PROMPTS), or ARRIVAL=closed with CONCURRENCY"
            )
        if self.all_at_once and not self.num_prompts:
            raise ConfigError("AUTO_RATE=inf sends everything at once: say how many with NUM_PROMPTS")
        if not self.num_prompts and not (math.isfinite(self.duration) and self.duration > 0):
            raise ConfigError(f"AUTO_DURATION (--duration) must be above 0 seconds, not {self.duration:g}")
        if not (math.isfinite(self.burstiness) and self.burstiness > 0):
            raise ConfigError(
                f"BURSTINESS (--burstiness) must be above 0 (1 is Poisson), not {self.burstiness:g}"
            )
        if self.concurrency < 1:
            raise ConfigError(f"CONCURRENCY (--concurrency) must be at least 1, not {self.concurrency}")
        if self.arrival == "trace":
            if not self.trace_file:
                raise ConfigError("ARRIVAL=trace needs a file: ARRIVAL=path/to/trace.jsonl, or --trace FILE")
            if not Path(self.trace_file).is_file():
                raise ConfigError(f"there is no trace file {self.trace_file}")

    def describe(self) -> str:
        """One line for people."""
        many = f"{self.num_prompts} requests" if self.num_prompts else f"for {self.duration:g} s"
        if not self.open_loop:
            return f"closed loop, {self.concurrency} at a time, {many}"
        if self.arrival == "trace":
            return f"trace {self.trace_file}"
        if self.all_at_once:
            return f"{many}, all at once"
        how = f"gamma (burstiness {self.burstiness:g})" if self.arrival == "gamma" else self.arrival
        return f"{self.rate:g} requests/s, {how}, {many}"


@dataclass(frozen=True)
class BatchSpec:
    """Static batching of the transformers engine."""

    enabled: bool = True
    size: int = 8
    max_length: int = 512  # a longer prompt is never padded together with others

    def check(self) -> None:
        """Raise ConfigError for an illegal value."""
        if self.size < 1:
            raise ConfigError(f"BATCH_SIZE (--batch-size) must be at least 1, not {self.size}")
        if self.max_length < 1:
            raise ConfigError(f"MAX_BATCH_LENGTH must be at least 1, not {self.max_length}")


@dataclass(frozen=True)
class PlacementSpec:
    """Where the transformers engine puts target and drafter, if there are GPUs."""

    strategy: str = "shared_all"
    target_gpu: int = 0
    drafter_gpu: int = 0
    target_ratio: float = 0.8
    drafter_ratio: float = 0.2

    def check(self) -> None:
        """Raise ConfigError for an illegal value."""
        one_of(self.strategy, STRATEGIES, "GPU_STRATEGY")
        if self.target_gpu < 0 or self.drafter_gpu < 0:
            raise ConfigError("TARGET_GPU and DRAFTER_GPU are device numbers: 0, 1, …")
        if min(self.target_ratio, self.drafter_ratio) <= 0 or self.target_ratio + self.drafter_ratio > 1:
            raise ConfigError(
                "TARGET_GPU_RATIO and DRAFTER_GPU_RATIO are shares of a card's memory: both above 0, "
                "together "
                f"at most 1, not {self.target_ratio:g} and {self.drafter_ratio:g}"
            )
