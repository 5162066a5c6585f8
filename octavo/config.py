"""What the user may set, checked once, and what the engine is built from.

`EngineArgs` holds the options as the user wrote them: the keyword arguments of `LLM` and, one
flag a field, the command line. `EngineArgs.from_kwargs` refuses unknown names and
`EngineArgs.__post_init__` refuses wrong values, so nothing behind it has to ask again.

`EngineConfig` is what `octavo.engine.setup.resolve` makes of them together with the model's own
config, the platform and the memory plan. It is frozen and has no holes: no field is None because
it will be filled in later.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError, NotInThisVersionError
from octavo.other_names import ATTENTION_BACKENDS_ELSEWHERE, OUR_ATTENTION_BACKENDS, option_advice

if TYPE_CHECKING:
    from octavo.models.config import ModelConfig
    from octavo.platform import Platform

DTYPES = ("auto", "half", "float16", "bfloat16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "pt", "dummy")
# octavo.platform.backends chooses for auto; torch is the slow reference
ATTENTION_BACKENDS = ("auto", "triton", "sdpa", "cpu", "torch")
SPECULATIVE_METHODS = ("draft_model", "prompt_lookup", "ngram", "suffix", "predicted", "hybrid")
_SPECULATIVE_KEYS = (
    "method", "model", "num_speculative_tokens", "acceptance", "synthetic_acceptance_rates", "history_tokens",
    "draft_kv_share",
)  # fmt: skip
MODEL_METHODS = ("draft_model", "hybrid")  # those with a draft model
DRAFT_KV_SHARE = 0.1  # of the KV cache's bytes: the draft model's own
HISTORY_TOKENS = 1 << 18  # of earlier outputs, which method="suffix" remembers
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*$", re.IGNORECASE)


def parse_size(value: int | str, name: str) -> int:
    """Bytes of `value`: an int, or a text such as "256MB", "1.5GiB". K, M, G are powers of 1024.

    Raises ConfigError naming the option `name`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ConfigError(f'{name} must be a number of bytes or a text such as "256MB", not {value!r}')
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.match(value)
        if match is None:
            raise ConfigError(f'{name}={value!r} is not a size; write bytes or a text such as "256MB"')
        size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
    if size <= 0:
        raise ConfigError(f"{name} must be greater than 0, not {value!r}")
    return size


def check_attention_backend(asked: str, source: str = "attention_backend") -> str:
    """`asked`, if it is one of ATTENTION_BACKENDS; `source` is the option or variable it came from.

    Raises NotInThisVersionError for a backend that other engines have, and ConfigError for any other name.
    """
    if asked in ATTENTION_BACKENDS:
        return asked
    name, ours = asked.lower().replace("-", "_"), f"choose one of {', '.join(ATTENTION_BACKENDS)}"
    if name in ATTENTION_BACKENDS_ELSEWHERE:
        raise NotInThisVersionError(
            f"{source}={asked!r} ({ATTENTION_BACKENDS_ELSEWHERE[name]} in place of Octavo's own kernels)",
            "it plans each step on the host, where a step here is one CUDA graph, and was not faster overall "
            f"beside Octavo's kernels on an H200. Leave it at auto, or {ours}",
        )
    if name in OUR_ATTENTION_BACKENDS:
        raise ConfigError(f"{source}={asked!r}: here it is called {OUR_ATTENTION_BACKENDS[name]}")
    raise ConfigError(f"{source}={asked!r}: this attention backend is unknown; {ours}")


# Drafters that other engines have and this version does not.
SPECULATIVE_METHODS_TO_COME = (
    "eagle", "eagle3", "medusa", "mlp_speculator", "mtp", "deepseek_mtp", "dflash", "lookahead", "nextn",
)  # fmt: skip


def _option(default: Any, help_text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class SpeculativeConfig:
    """The option `speculative`, checked. `method` is a known name or "package.module:Class"."""

    method: str
    num_speculative_tokens: int | None  # 0-16 drafts a step for each request; None is "auto"
    acceptance: str = "replay"  # or "rejection"
    # Benchmarks only: the chance that draft 1, 2, … is accepted if those before it were. Empty: off.
    synthetic_acceptance_rates: tuple[float, ...] = ()
    history_tokens: int = 0  # of earlier outputs, for method="suffix"; 0: none
    model: str | None = None  # the draft model's name; None: the method has none
    draft_kv_share: float = DRAFT_KV_SHARE

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> SpeculativeConfig:
        """Raises ConfigError naming the key that is wrong."""
        for key in given:
            if key not in _SPECULATIVE_KEYS:
                near = difflib.get_close_matches(str(key), _SPECULATIVE_KEYS, n=1)
                hint = f"; did you mean {near[0]}?" if near else f". Keys: {', '.join(_SPECULATIVE_KEYS)}"
                raise ConfigError(f"speculative has no key {key!r}{hint}")
        method = given.get("method")
        if not isinstance(method, str):
            raise ConfigError(f"speculative needs a method: one of {', '.join(SPECULATIVE_METHODS)}")
        if method.lower() in SPECULATIVE_METHODS_TO_COME:
            raise NotInThisVersionError(
                f"speculative method {method!r}", f"there are {', '.join(SPECULATIVE_METHODS)}"
            )
        if method not in SPECULATIVE_METHODS and ":" not in method:
            near = difflib.get_close_matches(method, SPECULATIVE_METHODS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"speculative method {method!r} is not one of {', '.join(SPECULATIVE_METHODS)} "
                f"or a dotted name such as package.module:Class{hint}"
            )
        acceptance = given.get("acceptance", "replay")
        if acceptance not in ("replay", "rejection"):
            raise ConfigError(f"speculative acceptance must be replay or rejection, not {acceptance!r}")
        rates = _synthetic_rates(given.get("synthetic_acceptance_rates"))
        if rates and acceptance == "rejection":
            raise ConfigError(
                "synthetic_acceptance_rates say which drafts are accepted, so there is nothing to reject by: "
                "leave acceptance at replay, or leave the rates out"
            )
        model, share = _draft_model(given, method)
        count = given.get("num_speculative_tokens", "auto")
        if count != "auto" and (
            isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 16
        ):
            raise ConfigError(f'num_speculative_tokens must be "auto" or 0 to 16, not {count!r}')
        name = "prompt_lookup" if method == "ngram" else method
        return cls(
            name,
            None if count == "auto" else count,
            acceptance,
            rates,
            _history_tokens(given.get("history_tokens"), method),
            model,
            share,
        )

    @property
    def reads_predictions(self) -> bool:
        """True if a request's `prediction` is drafted from."""
        return self.has_lookup and ":" not in self.method

    @property
    def has_lookup(self) -> bool:
        """True if drafts may come without a pass of a draft model."""
        return self.method != "draft_model"


def _draft_model(given: dict[str, Any], method: str) -> tuple[str | None, float]:
    """The keys `model` and `draft_kv_share`, which belong to the methods with a draft model."""
    if method not in MODEL_METHODS:
        for key in ("model", "draft_kv_share"):
            if key in given:
                raise ConfigError(
                    f"speculative method {method!r} takes no {key}; a draft model belongs to "
                    f"{' or '.join(MODEL_METHODS)}"
                )
        return None, DRAFT_KV_SHARE
    model = given.get("model")
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str) or not model:
        raise ConfigError(
            f"speculative method {method!r} needs a model: a folder, a .gguf file, a hub id, or an alias"
        )
    share = given.get("draft_kv_share", DRAFT_KV_SHARE)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
        raise ConfigError(
            "draft_kv_share is the size of the draft model's KV cache as a share of the target's, above 0 "
            f"and at most 1, not {share!r}"
        )
    return model, float(share)


def _synthetic_rates(given: object) -> tuple[float, ...]:
    if given is None:
        return ()
    rule = "synthetic_acceptance_rates must be a list of 1 to 16 numbers from 0 to 1"
    if not isinstance(given, (list, tuple)) or not 1 <= len(given) <= 16:
        raise ConfigError(f"{rule}, not {given!r}")
    for rate in given:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 <= rate <= 1.0:
            raise ConfigError(f"{rule}; {rate!r} is none")
    return tuple(float(rate) for rate in given)


def _history_tokens(given: object, method: str) -> int:
    if given is None:
        return HISTORY_TOKENS if method == "suffix" else 0
    if method != "suffix":
        raise ConfigError(f"speculative method {method!r} keeps no history; history_tokens is for suffix")
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= 1 << 26:
        raise ConfigError(f"history_tokens must be 0 (no history) to {1 << 26}, not {given!r}")
    return given


@dataclass(frozen=True)
class EngineArgs:
    """The engine's options as the user gave them. Names are the field's usual ones."""

    model: str = _option("smollm2", "a folder, a .gguf file, a hub id, or an alias")
    tokenizer: str | None = _option(None, "folder or hub id of another tokenizer")
    dtype: str = _option("bfloat16", "type of weights and activations", DTYPES)
    max_model_len: int | None = _option(None, "longest prompt + output; default: what model and memory allow")
    max_num_seqs: int = _option(128, "requests that run at the same time")
    max_num_batched_tokens: int | None = _option(
        None, "token rows of one step (default: 8192 on a GPU, 1024 on a CPU)"
    )
    gpu_memory_utilization: float = _option(0.9, "share of the GPU's total memory Octavo may use")
    kv_cache_memory: int | str | None = _option(
        None, 'size of the KV cache: bytes, or "256MB" (default: planned)'
    )
    max_chunk_tokens: int | None = _option(
        None, "at most this many prompt rows of one request in a step (default: no bound of its own)"
    )
    block_size: int = _option(16, "tokens of one KV block")
    enable_prefix_caching: bool = _option(True, "reuse the KV of prompts that begin alike")
    seed: int = _option(0, "seed of requests that bring none")
    device: str = _option("auto", "where to run", ("auto", "cpu", "cuda"))
    attention_backend: str = _option(
        "auto", f"one of {', '.join(ATTENTION_BACKENDS)}; sdpa is torch's own; also OCTAVO_ATTENTION_BACKEND"
    )
    deterministic: bool = _option(False, "bit-equal output whatever else runs in the batch")
    enforce_eager: bool = _option(False, "no CUDA graphs")
    pipeline_depth: int | None = _option(
        None, "0: read each step before the next starts; 1: one step late (default: by platform)"
    )
    load_format: str = _option(
        "auto", "how weights are read; dummy makes random ones, for speed work", LOAD_FORMATS
    )
    skip_tokenizer_init: bool = _option(False, "work on token ids only")
    chat_template: str | None = _option(None, "a Jinja template or a file that holds one")
    trust_remote_code: bool = _option(False, "allow a model folder's own Python code")
    disable_log_stats: bool = _option(True, "no periodic line of statistics")
    speculative: dict[str, Any] | None = _option(None, "speculative decoding; None is off")  # noqa: RUF009
    quantization: str | None = _option(None, "weight format")
    tensor_parallel_size: int = _option(1, "GPUs that share one model")
    pipeline_parallel_size: int = _option(1, "pipeline stages")
    data_parallel_size: int = _option(1, "replicas, each with the whole model")
    enable_lora: bool = _option(False, "serve LoRA adapters")
    lora_configs: list[dict[str, Any]] | None = _option(None, "adapters: lora_name and lora_path each")  # noqa: RUF009

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineArgs:
        """Build from keyword arguments; an unknown name is a ConfigError that suggests the nearest."""
        names = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in names:
                advice = option_advice(name)
                if advice is not None:
                    raise ConfigError(f"unknown option {name}: {advice}")
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else f". Options: {', '.join(names)}"
                raise ConfigError(f"unknown option {name}{hint}")
        return cls(**{name: _plain(value) for name, value in kwargs.items()})

    def __post_init__(self) -> None:
        self._check_types()
        self._check_values()
        self._refuse_what_is_not_here()

    def _check_types(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = _KINDS[str(f.type)]
            right = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
            if not right:
                raise ConfigError(f"{f.name} must be {f.type}, not {value!r} ({type(value).__name__})")

    def _check_values(self) -> None:
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in choices:
                near = difflib.get_close_matches(value, choices, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{f.name}={value!r} is not one of {', '.join(choices)}{hint}")
        if not self.model:
            raise ConfigError("model is empty; name a folder, a .gguf file, a hub id, or an alias")
        for name in (
            "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_chunk_tokens", "block_size",
            "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.block_size % 16 or self.block_size > 256:
            raise ConfigError(f"block_size must be a multiple of 16, at most 256, not {self.block_size}")
        if not (math.isfinite(self.gpu_memory_utilization) and 0 < self.gpu_memory_utilization <= 1):
            raise ConfigError(
                f"gpu_memory_utilization is a share of the card, above 0 and at most 1, "
                f"not {self.gpu_memory_utilization}"
            )
        if self.kv_cache_memory is not None:
            parse_size(self.kv_cache_memory, "kv_cache_memory")
        check_attention_backend(self.attention_backend)
        if self.pipeline_depth not in (None, 0, 1):
            raise ConfigError(f"pipeline_depth must be 0 or 1, not {self.pipeline_depth}")
        if self.speculative is not None:
            SpeculativeConfig.from_dict(self.speculative)

    def _refuse_what_is_not_here(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(self, name) != 1:
                raise NotInThisVersionError(f"{name}={getattr(self, name)} (more than 1)")
        if self.quantization is not None:
            raise NotInThisVersionError(f"quantization={self.quantization!r}")
        if self.enable_lora or self.lora_configs:
            raise NotInThisVersionError("LoRA (enable_lora, lora_configs)")


def _plain(value: Any) -> Any:
    """Paths as texts, numpy's whole numbers as ints."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (bool, int)):
        return value
    return int(value) if isinstance(value, numbers.Integral) else value


_NONE = type(None)
# The annotations above are texts (PEP 563); these are the classes they stand for.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, _NONE),
    "int": (int,),
    "int | None": (int, _NONE),
    "int | str | None": (int, str, _NONE),
    "float": (float, int),
    "bool": (bool,),
    "dict[str, Any] | None": (dict, _NONE),
    "list[dict[str, Any]] | None": (list, _NONE),
}


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache as planned."""

    block_size: int
    num_blocks: int
    enable_prefix_caching: bool


@dataclass(frozen=True)
class SchedulerConfig:
    """The brain's limits. One step of one request never exceeds max_num_batched_tokens."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_chunk_tokens: int
    pipeline_depth: int
    seed: int = 0
    # Free blocks that admission leaves untouched, so that a request admitted now is not the
    # victim of the next step (thrash).
    watermark_blocks: int = 0
    # A step that has rows already takes in no prompt of which it could compute fewer rows than this.
    least_chunk_rows: int = 0


@dataclass(frozen=True)
class DraftConfig:
    """The draft model as resolved; it runs in the engine's dtype."""

    name: str  # as the user wrote it
    model: ModelConfig
    model_path: Path


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine is built from; made by `octavo.engine.setup.resolve`."""

    args: EngineArgs
    model: ModelConfig
    model_path: Path
    tokenizer_path: Path
    platform: Platform
    dtype: str  # float32, bfloat16 or float16
    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int
    pipeline_depth: int
    attention_backend: str
    speculative: SpeculativeConfig | None
    draft: DraftConfig | None = None  # None: no draft model
