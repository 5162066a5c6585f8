"""vLLM in the workbench's own process, through its AsyncLLM (its engine core runs in a process of its own).

Options have the names of `octavo.config.EngineArgs`, which are mostly vLLM's; one that vLLM does not know is
an error, never dropped. vLLM is imported here only once it was chosen.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any

from octavo.bench.spec import HOW_TO_INSTALL, RunSpec
from octavo.bench.target import Answer, TargetError, TargetRequest
from octavo.bench.targets.octavo_engine import request_seed
from octavo.errors import OctavoError

OPTIONS = (
    "dtype", "tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "max_model_len",
    "max_num_seqs", "max_num_batched_tokens", "quantization", "disable_log_stats", "enforce_eager",
    "enable_prefix_caching", "trust_remote_code", "tokenizer", "block_size", "load_format",
)  # fmt: skip
# An engine argument of newer versions (seen in 0.32): acceptance of every request, step by step.
_EACH_REQUEST = "per_request_spec_decode_metrics"
# vLLM's names of its metrics -> ours.
_METRICS = {
    "vllm:num_preemptions": "preemptions",
    "vllm:prefix_cache_queries": "prefix_queries",
    "vllm:prefix_cache_hits": "prefix_hits",
    "vllm:spec_decode_num_drafts": "verifications",
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
}


def engine_kwargs(spec: RunSpec) -> dict[str, Any]:
    """vLLM's engine arguments; `RunSpec.check` has refused options that it does not have."""
    kwargs = {name: value for name, value in spec.engine_options.items() if value is not None}
    kwargs["model"] = spec.serving_model
    if spec.method == "speculative":
        kwargs["speculative_config"] = {"model": spec.drafter, "num_speculative_tokens": spec.drafts}
    elif spec.method == "prompt_lookup":
        kwargs["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": spec.drafts,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        }
    return kwargs


class VllmTarget:
    """One vLLM engine."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._kwargs = engine_kwargs(spec)
        self._engine: Any = None
        self._version = ""
        self._sampling: Any = None
        self._read_metrics: Any = None
        self._warnings: list[str] = []

    async def open(self) -> None:
        """Load the model. Raises OctavoError if vLLM is not there, or cannot load it."""
        try:
            vllm = importlib.import_module("vllm")
            arguments = importlib.import_module("vllm.engine.arg_utils")
            async_llm = importlib.import_module("vllm.v1.engine.async_llm")
            self._sampling = importlib.import_module("vllm.sampling_params")
        except ImportError as error:
            raise OctavoError(
                f"the engine vllm cannot be imported ({error}): {HOW_TO_INSTALL['vllm']}"
            ) from error
        self._version = str(getattr(vllm, "__version__", "unknown"))
        if self._kwargs.get("disable_log_stats", False):
            self._warnings.append(
                "VLLM_DISABLE_LOG_STATS=true: vLLM counts nothing, so its acceptance and engine metrics "
                "are null"
            )
        else:
            self._load_metrics_reader()
        if "speculative_config" in self._kwargs and hasattr(arguments.AsyncEngineArgs, _EACH_REQUEST):
            self._kwargs[_EACH_REQUEST] = "detailed"
        try:
            # Within the event loop: vLLM's handlers belong to the loop that asks.
            self._engine = async_llm.AsyncLLM.from_engine_args(arguments.AsyncEngineArgs(**self._kwargs))
        except Exception as error:  # whatever it raises while loading is the reason why there is no run
            raise OctavoError(f"vllm could not load {self._kwargs['model']}: {error}") from error

    def _load_metrics_reader(self) -> None:
        try:
            self._read_metrics = importlib.import_module("vllm.v1.metrics.reader").get_metrics_snapshot
        except (ImportError, AttributeError):
            self._warnings.append("this version of vLLM has no metrics reader: its engine metrics are null")

    async def generate(self, request: TargetRequest, answer: Answer) -> None:
        """One request, by token ids."""
        sampling = self._spec.sampling
        params = self._sampling.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k if sampling.top_k > 0 else -1,
            seed=request_seed(sampling.seed, request.index),
            max_tokens=request.max_tokens,
            ignore_eos=sampling.ignore_eos,
            output_kind=self._sampling.RequestOutputKind.DELTA,
        )
        if request.prompt_token_ids is None:
            raise TargetError("prompt", "this engine needs token ids")
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_token_ids)}
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        answer.token_ids, answer.text = [], ""
        answer.prompt_tokens = len(request.prompt_token_ids)
        name = f"bench-{request.cache_salt or ''}-{request.index}"
        try:
            async for output in self._engine.generate(prompt, params, request_id=name):
                delta = output.outputs[0]
                if delta.token_ids:
                    answer.arrived(len(delta.token_ids))
                    answer.token_ids += list(delta.token_ids)
                answer.text += delta.text
                if delta.finish_reason is not None:
                    answer.finish_reason = str(delta.finish_reason)
                if getattr(output, "num_cached_tokens", None) is not None:
                    answer.cached_tokens = int(output.num_cached_tokens)
                _note_metrics(answer, output, delta)
        except asyncio.CancelledError:
            await self._engine.abort(name)
            raise
        except Exception as error:  # vLLM's own classes, which may not be named here
            raise TargetError(type(error).__name__, str(error)) from error

    async def counters(self) -> dict[str, float]:
        """From vLLM's metrics, summed over labels; empty where they are switched off."""
        if self._read_metrics is None:
            return {}
        found: dict[str, float] = {}
        for metric in self._read_metrics():
            name, value = _METRICS.get(metric.name.removesuffix("_total")), getattr(metric, "value", None)
            if name is not None and value is not None:
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def description(self) -> dict[str, Any]:
        """Version and the arguments vLLM was given."""
        return {"engine_version": self._version, "vllm_arguments": self._kwargs}

    def warnings(self) -> Sequence[str]:
        """What was noticed."""
        return self._warnings

    def gpu_ids(self) -> list[int]:
        """As many as it was told to use; none where torch sees none."""
        from octavo.platform import detect

        if detect("auto").device != "cuda":
            return []
        return list(range(self._kwargs.get("tensor_parallel_size", 1)))

    def pids(self) -> list[int]:
        """Its processes are this one's children, which the monitor finds itself."""
        return []

    async def close(self) -> None:
        """End the engine and its processes. The event loop stands still meanwhile (some seconds), as in
        vLLM's own server: its output handler would take the end of the process for a crash otherwise."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()


def _note_metrics(answer: Answer, output: Any, completion: Any) -> None:
    """What vLLM tells about one request: `metrics` (None without its statistics) and, at the end, what became
    of its drafts, verification by verification (None in versions that do not count them by request)."""
    stats = getattr(output, "metrics", None)
    if stats is not None:
        answer.num_preemptions = stats.num_preemptions
        if stats.scheduled_ts > 0:  # the engine process' monotonic clock, which is the machine's
            answer.first_step_time = stats.scheduled_ts
    drafts = getattr(completion, "spec_decode_metrics", None)
    if drafts is not None:
        for drafted, accepted in zip(drafts.per_step_drafted, drafts.per_step_accepted, strict=True):
            answer.verified(drafted, accepted)
