"""Everything a user can say about a run, with its defaults, in one place.

The flags of `octavo bench` and the environment variables of `run_benchmark.sh` both fill a `BenchOptions`; it
makes the `RunSpec`, the source of the prompts and the output's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from octavo.bench.prompts import PromptSource, parse_source
from octavo.bench.record import result_path
from octavo.bench.spec import BatchSpec, LoadSpec, PlacementSpec, RunSpec, SamplingSpec, parse_engine
from octavo.errors import ConfigError

DEFAULT_OUTPUT = "benchmark_results.json"


@dataclass(frozen=True)
class BenchOptions:
    """One run as its user describes it. None leaves a choice to what follows from the others."""

    engine: str = "octavo"
    method: str | None = None  # speculative with a drafter, otherwise target_ar
    model: str = "smollm2"
    drafter: str | None = None
    num_speculative_tokens: int | str | None = None
    served: bool = False
    endpoint: str = "auto"
    tokenizer: str | None = None
    api_key: str | None = field(default=None, repr=False)
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    prompts: str = "bundled"
    prompt_min_length: int | None = None
    prompt_max_length: int | None = None
    max_load_lines: int | None = None

    arrival: str = "poisson"
    num_prompts: int = 0
    rate: float = 1.0
    duration: float = 300.0
    burstiness: float = 1.0
    concurrency: int = 1
    trace: str | None = None

    max_tokens: int = 100
    ignore_eos: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 42

    enable_batch: bool = True
    batch_size: int = 8
    max_batch_length: int = 512
    placement: PlacementSpec = field(default_factory=PlacementSpec)

    warmup: int = 2
    repeat: int = 1
    monitor: bool = True
    monitor_interval: float = 0.5
    request_timeout: float = 600.0
    slo: str | None = None
    clients: int = 1
    notices: tuple[str, ...] = ()

    output: str = DEFAULT_OUTPUT
    force: bool = False

    @property
    def chosen_method(self) -> str:
        """The method, which follows the draft model where none was given."""
        return self.method or ("speculative" if self.drafter else "target_ar")

    def spec(self) -> RunSpec:
        """The run; not checked yet."""
        engine = parse_engine(self.engine)
        arrival, trace = self.arrival, self.trace
        if trace is None and Path(arrival).suffix in (".jsonl", ".json", ".csv"):
            arrival, trace = "trace", arrival  # ARRIVAL=requests.jsonl
        elif trace is not None and arrival == "poisson":
            arrival = "trace"
        served = engine.pop("served", self.served)
        return RunSpec(
            **engine,
            served=served,
            method=self.chosen_method,
            model=self.model,
            drafter=self.drafter,
            num_speculative_tokens=self.num_speculative_tokens,
            endpoint=self.endpoint,
            tokenizer=self.tokenizer,
            api_key=self.api_key,
            engine_options=dict(self.engine_options),
            sampling=SamplingSpec(
                self.temperature, self.top_p, self.top_k, self.seed, self.max_tokens, self.ignore_eos
            ),
            load=LoadSpec(
                arrival,
                self.num_prompts,
                self.rate,
                self.duration,
                self.burstiness,
                self.concurrency,
                trace,
            ),
            batch=BatchSpec(self.enable_batch, self.batch_size, self.max_batch_length),
            placement=self.placement,
            warmup_requests=self.warmup,
            repeat=self.repeat,
            monitor=self.monitor,
            monitor_interval=self.monitor_interval,
            request_timeout=self.request_timeout,
            slo=self.slo,
            clients=self.clients,
            notices=self.notices,
        )

    def source(self) -> PromptSource:
        """Where the prompts come from. Raises ConfigError for a file that is not there."""
        source = parse_source(self.prompts)
        given: dict[str, Any] = {
            "min_length": self.prompt_min_length,
            "max_length": self.prompt_max_length,
            "max_lines": self.max_load_lines,
        }
        source = replace(source, **{name: value for name, value in given.items() if value is not None})
        source.check()
        return source

    def output_path(self) -> Path:
        """The result file."""
        spec = self.spec()
        return result_path(self.output, spec.method, spec.engine)


def parse_rate(text: str) -> float:
    """Requests a second; "inf" is all at once. Raises ConfigError."""
    try:
        rate = float(text)
    except ValueError:
        raise ConfigError(f"a rate is a number of requests a second, or inf, not {text!r}") from None
    if math.isnan(rate):
        raise ConfigError("a rate is a number of requests a second, or inf, not nan")
    return rate


def parse_drafts(text: str) -> int | str:
    """ "auto" or a number. Raises ConfigError."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the number of speculative tokens is 1 to 16 or auto, not {text!r}") from None
