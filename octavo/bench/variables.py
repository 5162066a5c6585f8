"""The environment variables of `run_benchmark.sh`: names, defaults, and what they mean.

An empty variable is one that was not given. Those that begin with VLLM_ may also be spelled with OCTAVO_ in
its place, which wins. `PRESETS` are sets of values for common purposes; whatever the caller gave wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo.bench.options import BenchOptions, parse_drafts, parse_rate
from octavo.bench.spec import SPECULATIVE_METHODS, PlacementSpec, parse_engine
from octavo.errors import ConfigError


@dataclass(frozen=True)
class Variable:
    """One line of the script. `place` is a field of BenchOptions, "engine:NAME" an option of the engine,
    "placement:NAME" a field of PlacementSpec; "" is read on its own."""

    name: str
    default: str
    place: str
    read: Callable[[str], Any]
    text: str


def _flag(text: str) -> bool:
    word = text.strip().lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ConfigError(f"write true or false, not {text!r}")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"write a whole number, not {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"write a number, not {text!r}") from None


VARIABLES = (
    Variable("PRESET", "", "", str, "quick, throughput, latency, long_text, stress, acceptance"),
    Variable("INFERENCE_ENGINE", "octavo", "engine", str, "octavo, transformers, vllm, url=http://HOST:PORT"),
    Variable("INFERENCE_METHOD", "", "method", str, "target_ar, speculative, drafter_ar, prompt_lookup"),
    Variable("TARGET_MODEL", "smollm2", "model", str, "folder, .gguf file, hub id, alias, or served name"),
    Variable("DRAFTER_MODEL", "", "drafter", str, "the draft model of speculative and drafter_ar"),
    Variable("VLLM_ENABLE_SPECULATIVE", "", "", _flag, "false runs target_ar whatever the method says"),
    Variable(
        "VLLM_NUM_SPECULATIVE_TOKENS", "", "num_speculative_tokens", parse_drafts, "drafts a step: 1-16, auto"
    ),
    Variable("GAMMA_VALUE", "", "", parse_drafts, "the same, older name"),
    Variable("VLLM_TENSOR_PARALLEL_SIZE", "1", "engine:tensor_parallel_size", _whole, "GPUs of one model"),
    Variable("VLLM_PIPELINE_PARALLEL_SIZE", "1", "engine:pipeline_parallel_size", _whole, "only 1"),
    Variable(
        "VLLM_GPU_MEMORY_UTILIZATION",
        "0.9",
        "engine:gpu_memory_utilization",
        _number,
        "share of a GPU's memory",
    ),
    Variable("VLLM_MAX_MODEL_LEN", "4096", "engine:max_model_len", _whole, "longest prompt + output"),
    Variable("VLLM_MAX_NUM_SEQS", "128", "engine:max_num_seqs", _whole, "requests that run together"),
    Variable(
        "VLLM_MAX_NUM_BATCHED_TOKENS", "8192", "engine:max_num_batched_tokens", _whole, "token rows of a step"
    ),
    Variable("VLLM_DTYPE", "auto", "engine:dtype", str, "auto, half, float16, bfloat16, float32"),
    Variable("VLLM_QUANTIZATION", "", "engine:quantization", str, "weight format"),
    Variable("VLLM_DISABLE_LOG_STATS", "true", "engine:disable_log_stats", _flag, "no lines of statistics"),
    Variable("VLLM_USE_V2_BLOCK_MANAGER", "", "", _flag, "accepted: there is only one block manager"),
    Variable("GPU_STRATEGY", "shared_all", "placement:strategy", str, "shared_all, single, separate, ratio"),
    Variable("TARGET_GPU", "0", "placement:target_gpu", _whole, "of single and separate"),
    Variable("DRAFTER_GPU", "0", "placement:drafter_gpu", _whole, "of separate"),
    Variable("TARGET_GPU_RATIO", "0.8", "placement:target_ratio", _number, "of ratio: share of each card"),
    Variable("DRAFTER_GPU_RATIO", "0.2", "placement:drafter_ratio", _number, "of ratio"),
    Variable(
        "NUM_PROMPTS", "0", "num_prompts", _whole, "requests in all; 0: as many as AUTO_DURATION brings"
    ),
    Variable("AUTO_RATE", "1.0", "rate", parse_rate, "requests a second; inf: all at once"),
    Variable("AUTO_DURATION", "300", "duration", _number, "seconds in which requests are sent"),
    Variable("ARRIVAL", "poisson", "arrival", str, "poisson, constant, gamma, closed, or a trace file"),
    Variable("BURSTINESS", "1.0", "burstiness", _number, "of gamma: below 1 clumps, above 1 is regular"),
    Variable("CONCURRENCY", "1", "concurrency", _whole, "of closed: requests open at a time"),
    Variable("GENERATION_LENGTH", "100", "max_tokens", _whole, "the most tokens a request may generate"),
    Variable("IGNORE_EOS", "false", "ignore_eos", _flag, "true: exactly that many"),
    Variable("SEED", "42", "seed", _whole, "decides prompts, arrivals and draws"),
    Variable("TEMPERATURE", "0", "temperature", _number, "0 is greedy"),
    Variable("TOP_P", "1", "top_p", _number, "1 is off"),
    Variable("TOP_K", "0", "top_k", _whole, "0 is off"),
    Variable("ENABLE_BATCH", "true", "enable_batch", _flag, "static batches of the transformers engine"),
    Variable("BATCH_SIZE", "8", "batch_size", _whole, "of such a batch"),
    Variable("MAX_BATCH_LENGTH", "512", "max_batch_length", _whole, "a longer prompt runs alone"),
    Variable("PROMPTS", "bundled", "prompts", str, "bundled, bundled:KIND,…, a file, synthetic:512, …"),
    Variable("SHAREGPT_DIR", "", "", str, "folder of ShareGPT files; the same as PROMPTS=FOLDER"),
    Variable("PROMPT_MIN_LENGTH", "", "prompt_min_length", _whole, "tokens; shorter prompts are left out"),
    Variable("PROMPT_MAX_LENGTH", "", "prompt_max_length", _whole, "tokens; longer prompts are left out"),
    Variable("MAX_LOAD_LINES", "", "max_load_lines", _whole, "lines that are read of a file"),
    Variable("ENABLE_GPU_MONITOR", "true", "monitor", _flag, "power, energy, utilisation, temperature"),
    Variable("GPU_MONITOR_INTERVAL", "0.5", "monitor_interval", _number, "seconds between two looks"),
    Variable("OUTPUT_FILE", "benchmark_results.json", "output", str, "its name gets method and engine"),
)

# The sets that the guides recommend. Methods and models are the caller's.
PRESETS: dict[str, dict[str, str]] = {
    "quick": {"NUM_PROMPTS": "8", "AUTO_RATE": "inf", "GENERATION_LENGTH": "32"},
    "throughput": {
        "VLLM_NUM_SPECULATIVE_TOKENS": "5",
        "VLLM_MAX_NUM_SEQS": "256",
        "VLLM_GPU_MEMORY_UTILIZATION": "0.9",
        "AUTO_RATE": "10.0",
    },
    "latency": {
        "VLLM_NUM_SPECULATIVE_TOKENS": "4",
        "VLLM_MAX_NUM_SEQS": "32",
        "VLLM_GPU_MEMORY_UTILIZATION": "0.8",
        "AUTO_RATE": "1.0",
    },
    "long_text": {
        "PROMPTS": "bundled:long_context",
        "VLLM_MAX_MODEL_LEN": "8192",
        "VLLM_GPU_MEMORY_UTILIZATION": "0.85",
        "VLLM_MAX_NUM_SEQS": "64",
    },
    "stress": {
        "NUM_PROMPTS": "0",
        "AUTO_RATE": "10.0",
        "AUTO_DURATION": "600",
        "VLLM_MAX_NUM_SEQS": "256",
    },
    "acceptance": {"VLLM_NUM_SPECULATIVE_TOKENS": "3", "NUM_PROMPTS": "32", "AUTO_RATE": "inf"},
}

# Options of the VLLM_ group that engines without such a thing ignore, and are told so.
_ENGINE_OPTIONS = {
    "transformers": ("dtype",),
    "url": (),
}


def read_variables(environment: Mapping[str, str]) -> BenchOptions:
    """The run that an environment describes. Raises ConfigError naming the variable that is wrong."""
    values: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    placement: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    given: set[str] = set()  # those that differ from their default
    for variable in VARIABLES:
        name, text = _lookup(environment, variable.name)
        if text != variable.default:
            given.add(variable.name)
        if not text:
            continue
        try:
            value = variable.read(text)
        except ConfigError as error:
            raise ConfigError(f"{name}={text!r}: {error}") from None
        place, _, key = variable.place.partition(":")
        if place == "engine" and key:
            engine[key] = value
        elif place == "placement":
            placement[key] = value
        elif place:
            values[place] = value
        else:
            alone[variable.name] = value
    options = replace(BenchOptions(), **values, placement=PlacementSpec(**placement))
    options = replace(options, api_key=environment.get("OPENAI_API_KEY") or None)
    options = _with_prompts_folder(options, alone, given)
    options = _with_drafts(options, alone)
    options = _with_engine_options(options, engine, given)
    return _with_speculation_switch(options, alone)


def preset_lines(name: str) -> list[str]:
    """Shell lines that set what the caller left open. Raises ConfigError for a name that is none."""
    if name not in PRESETS:
        raise ConfigError(f"PRESET={name!r} is not one of {', '.join(PRESETS)}")
    # Those the caller gave under the other spelling stay as they are: that spelling wins.
    return [f': "${{{variable}:={value}}}"' for variable, value in PRESETS[name].items()]


def _lookup(environment: Mapping[str, str], name: str) -> tuple[str, str]:
    """(the spelling that was used, its text); the default where nothing was given."""
    default = next(variable.default for variable in VARIABLES if variable.name == name)
    spellings = [name]
    if name.startswith("VLLM_"):
        spellings.insert(0, "OCTAVO_" + name[len("VLLM_") :])
    for spelling in spellings:
        text = environment.get(spelling, "").strip()
        if text:
            return spelling, text
    return name, default


def _with_prompts_folder(options: BenchOptions, alone: Mapping[str, Any], given: set[str]) -> BenchOptions:
    folder = alone.get("SHAREGPT_DIR")
    if not folder:
        return options
    if "PROMPTS" in given:
        raise ConfigError("PROMPTS and SHAREGPT_DIR both say where the prompts are: give one")
    return replace(options, prompts=folder)


def _with_drafts(options: BenchOptions, alone: Mapping[str, Any]) -> BenchOptions:
    if options.num_speculative_tokens is not None:
        return options
    return replace(options, num_speculative_tokens=alone.get("GAMMA_VALUE"))


def _with_engine_options(options: BenchOptions, engine: dict[str, Any], given: set[str]) -> BenchOptions:
    kind = parse_engine(options.engine)["engine"]
    notices = list(options.notices)
    if "VLLM_USE_V2_BLOCK_MANAGER" in given:
        notices.append("VLLM_USE_V2_BLOCK_MANAGER: there is only one block manager; it is used in any case")
    kept = _ENGINE_OPTIONS.get(kind)
    if kept is not None:
        ignored = [
            variable.name
            for variable in VARIABLES
            if variable.place.startswith("engine:")
            and variable.place[len("engine:") :]
            not in (*kept, "tensor_parallel_size", "pipeline_parallel_size")
            and variable.name in given
        ]
        if ignored:
            notices.append(
                f"{', '.join(ignored)}: the {kind} engine has nothing of the kind, so they do nothing"
            )
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        engine = {k: v for k, v in engine.items() if k in kept or (k in sizes and v != 1)}
    return replace(options, engine_options=engine, notices=tuple(notices))


def _with_speculation_switch(options: BenchOptions, alone: Mapping[str, Any]) -> BenchOptions:
    switch = alone.get("VLLM_ENABLE_SPECULATIVE")
    if switch is None:
        return options
    method = options.chosen_method
    speculates = method in SPECULATIVE_METHODS
    if switch == speculates:
        return options
    if speculates:
        notice = (
            f"INFERENCE_METHOD={method} but VLLM_ENABLE_SPECULATIVE=false: speculation is OFF, target_ar was "
            "run"
        )
        return replace(options, method="target_ar", notices=(*options.notices, notice))
    notice = (
        f"VLLM_ENABLE_SPECULATIVE=true but INFERENCE_METHOD={method}: INFERENCE_METHOD wins, speculation is "
        "OFF"
    )
    return replace(options, notices=(*options.notices, notice))
