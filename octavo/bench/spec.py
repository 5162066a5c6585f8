"""What is to be measured: one run's specification, checked before anything is loaded.

A `RunSpec` is plain data. It comes from the flags of `octavo bench`, from the environment variables of
`run_benchmark.sh` (`octavo.bench.variables`) or from a program; `effective` is what the result file says
was run.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from octavo.bench.openai_stream import server_root
from octavo.bench.slo import parse_slo
from octavo.bench.spec_parts import BatchSpec, LoadSpec, PlacementSpec, SamplingSpec, one_of
from octavo.errors import ConfigError, OctavoError

__all__ = ["BatchSpec", "LoadSpec", "PlacementSpec", "RunSpec", "SamplingSpec"]

ENGINES = ("octavo", "transformers", "vllm", "url")
SPECULATIVE_METHODS = ("speculative", "prompt_lookup")
METHODS = ("target_ar", "drafter_ar", *SPECULATIVE_METHODS)
DTYPES = ("auto", "half", "float16", "bfloat16", "float32")
DEFAULT_DRAFTS = 5  # engines that cannot choose the number themselves

# How each engine that is not ours is got.
HOW_TO_INSTALL = {
    "vllm": "pip install vllm (it needs its own version of torch: best in a virtual environment of its own, "
    "served there and measured from here with --engine url=http://…)",
    "transformers": "pip install 'octavo[transformers]'",
}


@dataclass(frozen=True)
class RunSpec:
    """One run of one engine with one method."""

    engine: str = "octavo"
    method: str = "target_ar"
    model: str = "smollm2"
    drafter: str | None = None
    num_speculative_tokens: int | str | None = None  # None: auto (octavo), 5 (other engines)
    served: bool = False  # through HTTP, from a server that the run starts and ends
    url: str | None = None  # engine "url": where it is
    endpoint: str = "auto"  # of a url: chat, completions; auto: chat where the prompt has messages
    api_key: str | None = field(default=None, repr=False)
    tokenizer: str | None = None  # of a url: to count tokens where the server does not
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    load: LoadSpec = field(default_factory=LoadSpec)
    engine_options: Mapping[str, Any] = field(default_factory=dict)  # names of octavo.config.EngineArgs
    batch: BatchSpec = field(default_factory=BatchSpec)
    placement: PlacementSpec = field(default_factory=PlacementSpec)
    warmup_requests: int = 2
    repeat: int = 1
    monitor: bool = True
    monitor_interval: float = 0.5
    request_timeout: float = 600.0
    slo: str | None = None
    clients: int = 1  # processes that send, for served and url targets
    notices: tuple[str, ...] = ()  # what the reader of the result must know of how this spec came about

    @property
    def label(self) -> str:
        """A short name: "octavo prompt_lookup"."""
        return f"{self.engine}{' (served)' if self.served else ''} {self.method}"

    @property
    def over_http(self) -> bool:
        """True if requests go over HTTP, from client processes of their own."""
        return self.served or self.engine == "url"

    @property
    def serving_model(self) -> str:
        """The model that answers: the drafter for drafter_ar."""
        return self.drafter if self.method == "drafter_ar" and self.drafter else self.model

    @property
    def speculates(self) -> bool:
        """True if the method asks for drafts."""
        return self.method in SPECULATIVE_METHODS

    @property
    def static_batch_size(self) -> int:
        """The most requests of one generate() of transformers, which speculates for one at a time."""
        return 1 if self.speculates or not self.batch.enabled else self.batch.size

    @property
    def drafts(self) -> int | str | None:
        """Drafts a step as this engine is told, None without speculation."""
        if not self.speculates:
            return None
        if self.num_speculative_tokens is not None:
            return self.num_speculative_tokens
        return "auto" if self.engine == "octavo" else DEFAULT_DRAFTS

    # ------------------------------------------------------------------ checks

    def check(self) -> list[str]:
        """Raise ConfigError (or OctavoError for what is not installed) before anything is loaded.

        Returns warnings: what is unusual enough to stand in the result.
        """
        one_of(self.engine, ENGINES, "INFERENCE_ENGINE (--engine)")
        one_of(self.method, METHODS, "INFERENCE_METHOD (--method)")
        self._check_method()
        self._check_engine()
        self._check_counts()
        self.sampling.check()
        self.load.check()
        if self.slo is not None:
            parse_slo(self.slo)
        self._check_parallel()
        self._check_options()
        return [*self.notices, *self._warnings()]

    def _check_method(self) -> None:
        if self.method in ("speculative", "drafter_ar") and not self.drafter and self.engine != "url":
            raise ConfigError(
                f"INFERENCE_METHOD={self.method} needs a draft model: name one with DRAFTER_MODEL (--drafter)"
                + (
                    ", or use INFERENCE_METHOD=prompt_lookup, which drafts from the text itself"
                    if self.method == "speculative"
                    else ""
                )
            )
        if self.engine == "url" and self.method == "drafter_ar":
            raise ConfigError("a URL serves one model: name the draft model as TARGET_MODEL, with target_ar")
        count = self.num_speculative_tokens
        if count is None:
            return
        if isinstance(count, str):
            if count != "auto":
                raise ConfigError(f'VLLM_NUM_SPECULATIVE_TOKENS must be 1 to 16 or "auto", not {count!r}')
            if self.engine != "octavo" and self.speculates:
                raise ConfigError(
                    f"only octavo chooses the number of drafts itself; give {self.engine} a number from 1 "
                    "to 16 (VLLM_NUM_SPECULATIVE_TOKENS or GAMMA_VALUE)"
                )
        elif not 1 <= count <= 16:
            raise ConfigError(
                f"VLLM_NUM_SPECULATIVE_TOKENS (or GAMMA_VALUE, --num-speculative-tokens) must be 1 to 16 or "
                f"auto, not {count}"
            )

    def _check_engine(self) -> None:
        if self.engine == "url":
            if not self.url or not self.url.startswith(("http://", "https://")):
                raise ConfigError("a url engine is written url=http://HOST:PORT (or https://…)")
            if self.served:
                raise ConfigError("a URL is a server already; leave --served out")
            one_of(self.endpoint, ("auto", "chat", "completions"), "--endpoint")
        elif self.engine == "transformers" and self.served:
            raise ConfigError("transformers is measured in process only: it has no server here")
        if self.over_http and importlib.util.find_spec("aiohttp") is None:
            raise OctavoError("measuring over HTTP needs aiohttp: pip install 'octavo[bench]'")
        needed = self.engine
        if needed in HOW_TO_INSTALL and not is_installed(needed):
            raise OctavoError(f"the engine {needed} is not installed: {HOW_TO_INSTALL[needed]}")

    def _check_counts(self) -> None:
        for name, least in (("warmup_requests", 0), ("repeat", 1), ("clients", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.request_timeout > 0:
            raise ConfigError(f"the request timeout must be above 0 seconds, not {self.request_timeout:g}")
        if not self.monitor_interval > 0:
            raise ConfigError(
                f"GPU_MONITOR_INTERVAL (--monitor-interval) must be above 0 s, not {self.monitor_interval:g}"
            )
        self.batch.check()
        self.placement.check()

    def _check_parallel(self) -> None:
        pipeline = self.engine_options.get("pipeline_parallel_size", 1)
        if pipeline != 1:
            raise ConfigError(
                f"VLLM_PIPELINE_PARALLEL_SIZE={pipeline}: only 1 is supported; share a model between GPUs "
                "with VLLM_TENSOR_PARALLEL_SIZE"
            )
        size = self.engine_options.get("tensor_parallel_size", 1)
        if size < 1:
            raise ConfigError(
                f"VLLM_TENSOR_PARALLEL_SIZE (--tensor-parallel-size) must be at least 1, not {size}"
            )
        if size == 1 or self.engine == "url":
            return
        there = gpu_count()
        if size > there:
            raise ConfigError(
                f"VLLM_TENSOR_PARALLEL_SIZE={size} is more than the GPUs of this machine: {_gpus(there)}. "
                + (f"Give {there} or fewer" if there else "Leave it at 1, which runs on the CPU")
            )

    def _check_options(self) -> None:
        if self.engine == "octavo":
            from octavo.config import EngineArgs

            EngineArgs.from_kwargs(**self.octavo_kwargs())
        elif self.engine != "url":
            from octavo.bench.targets import known_options

            known = known_options(self.engine)
            unknown = sorted(set(self.engine_options) - set(known))
            if unknown:
                raise ConfigError(
                    f"the {self.engine} engine has no option {', '.join(unknown)}; it has {', '.join(known)}"
                )
        elif self.engine_options:
            raise ConfigError(
                f"a URL is configured where it is served: {', '.join(self.engine_options)} cannot be set "
                "from here"
            )
        dtype = self.engine_options.get("dtype", "auto")
        one_of(dtype, DTYPES, "VLLM_DTYPE (--dtype)")

    def _warnings(self) -> list[str]:
        found = []
        if self.engine == "transformers" and self.speculates:
            found.append(
                "transformers speculates for one request at a time (it refuses larger batches): compare "
                "it with target_ar at BATCH_SIZE=1 as well"
            )
        if self.engine == "url" and self.speculates:
            found.append(
                f"whether the server at {self.url} speculates is its own affair: method={self.method} "
                "only names this result"
            )
        if self.engine == "octavo" and self.batch != BatchSpec():
            found.append(
                "ENABLE_BATCH, BATCH_SIZE and MAX_BATCH_LENGTH do nothing here: octavo batches always"
            )
        if self.engine != "transformers" and self.placement != PlacementSpec():
            found.append("GPU_STRATEGY and its relatives place the models of the transformers engine only")
        return found

    # ------------------------------------------------------------------ what engines are given

    def octavo_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `octavo.LLM`, as method and options have them."""
        options = {name: value for name, value in self.engine_options.items() if value is not None}
        options.setdefault("dtype", "auto")
        if self.method == "prompt_lookup":
            options["speculative"] = {"method": "prompt_lookup", "num_speculative_tokens": self.drafts}
        elif self.method == "speculative":
            options["speculative"] = {
                "method": "draft_model",
                "model": self.drafter,
                "num_speculative_tokens": self.drafts,
            }
        return {"model": self.serving_model, **options}

    def effective(self) -> dict[str, Any]:
        """What was run, for the result file. Keys and tokens of the user are not in it."""
        plain = asdict(self)
        for name in ("api_key", "notices", "engine", "method"):
            del plain[name]
        plain["num_speculative_tokens"] = self.drafts
        plain["served_over_http"] = self.over_http
        if self.engine == "transformers":
            plain["effective_batch_size"] = self.static_batch_size
        else:
            del plain["batch"], plain["placement"]
        if math.isinf(self.load.rate):
            plain["load"]["rate"] = "inf"
        if not self.slo:
            del plain["slo"]
        if self.engine != "url":
            for name in ("url", "endpoint", "tokenizer"):
                del plain[name]
        return plain


def parse_engine(text: str) -> dict[str, Any]:
    """Fields of a RunSpec from what a user writes: octavo, octavo-served, vllm, url=http://…

    Raises ConfigError for anything else, with the nearest name.
    """
    if text.startswith(("url=", "http://", "https://")):
        return {"engine": "url", "url": server_root(text.removeprefix("url="), "a url engine (url=…, --url)")}
    if text in ("octavo-served", "vllm-served"):
        return {"engine": text.removesuffix("-served"), "served": True}
    if text == "url":
        raise ConfigError("a url engine is written url=http://HOST:PORT")
    one_of(text, ENGINES, "INFERENCE_ENGINE (--engine)", "octavo-served, vllm-served, url=http://…")
    return {"engine": text}


def is_installed(package: str) -> bool:
    """True if `package` could be imported; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a stand-in in sys.modules without a spec
        return True


def gpu_count() -> int:
    """GPUs that this process may use; 0 without a driver. Loads torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return 0
    from octavo.platform import detect

    return len(detect("auto").gpus)


def _gpus(count: int) -> str:
    return {0: "it has none", 1: "it has 1"}.get(count, f"it has {count}")
