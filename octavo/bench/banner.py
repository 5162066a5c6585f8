"""What a run says of itself before it begins and after it has ended, in plain lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.bench.record import RunResult
from octavo.bench.spec import RunSpec

METHODS = {
    "target_ar": "plain decoding",
    "drafter_ar": "plain decoding of the draft model",
    "speculative": "speculative decoding",
    "prompt_lookup": "speculative decoding by prompt lookup",
}
_SERVERS_OWN = "the one that the server names"
_OPTION_NAMES = {
    "tensor_parallel_size": "Tensor Parallel",
    "pipeline_parallel_size": "Pipeline Parallel",
    "disable_log_stats": "Disable Log Stats",
    "gpu_memory_utilization": "GPU Memory Utilization",
    "max_model_len": "Max Model Length",
    "max_num_seqs": "Max Num Seqs",
    "max_num_batched_tokens": "Max Num Batched Tokens",
    "dtype": "Data Type",
    "quantization": "Quantization",
    "kv_cache_memory": "KV Cache Memory",
    "device": "Device",
}


def configuration(spec: RunSpec, prompts: str, output: str | None) -> list[str]:
    """The effective configuration."""
    speculates = spec.drafts is not None
    lines = [
        "=" * 70,
        f"Inference Engine: {spec.engine}" + (" (served over HTTP)" if spec.served else ""),
        f"Inference Method: {spec.method} ({METHODS[spec.method]})",
    ]
    if spec.engine == "url":
        lines.append(f"URL: {spec.url}")
    lines += [
        "",
        "Models:",
        f"  Target Model: {spec.model or _SERVERS_OWN}",
        f"  Drafter Model: {spec.drafter or '-'}",
    ]
    options = {name: value for name, value in spec.engine_options.items() if value is not None}
    if options:
        lines += ["", f"{spec.engine} Configuration:"]
        lines += [f"  {_OPTION_NAMES.get(name, name)}: {value}" for name, value in options.items()]
    lines += ["", f"{spec.engine} Speculative Decoding:", f"  Enabled: {'Yes' if speculates else 'No'}"]
    if speculates:
        lines.append(f"  Num Speculative Tokens: {spec.drafts}")
    lines += [
        "",
        "Benchmark:",
        f"  Load: {spec.load.describe()}",
        f"  Prompts: {prompts}",
        f"  Generation Length: {spec.sampling.max_tokens}"
        + (" exactly (IGNORE_EOS)" if spec.sampling.ignore_eos else " at most"),
        f"  Sampling: {_sampling(spec)}",
        f"  Warm-up: {spec.warmup_requests} requests, not counted; repeats: {spec.repeat}",
    ]
    if spec.engine == "transformers":
        lines.append(f"  Batch Mode: {_batching(spec)}")
    lines.append(f"  GPU Monitor: {f'every {spec.monitor_interval:g} s' if spec.monitor else 'off'}")
    if output is not None:
        lines.append(f"  Output: {output}")
    return [*lines, "=" * 70]


def starting(spec: RunSpec) -> list[str]:
    """The lines before the engine is opened."""
    lines = [f"Starting the {spec.engine} engine ({METHODS[spec.method]}) ..."]
    lines.append(f"  Target model: {spec.model or _SERVERS_OWN}")
    if spec.drafter:
        lines.append(f"  Drafter model: {spec.drafter}")
    if spec.drafts is not None:
        lines.append(f"  Speculative tokens: {spec.drafts}")
    return lines


def outcome(result: RunResult) -> list[str]:
    """The summary in a dozen lines, failures and validity included."""
    s = result.summary
    lines = [
        "-" * 70,
        f"{result.engine} {result.method}: {s['total_requests'] - s['failed_requests']} of "
        f"{s['total_requests']} "
        f"requests answered in {s['total_duration']:.2f} s",
        f"  Throughput: {_show(s['overall_throughput'], ' tok/s')} generated, "
        f"{_show(s['request_throughput'], ' requests/s')}",
        f"  Tokens: {s['total_tokens']} generated"
        + (" (estimated)" if s["tokens_estimated"] else "")
        + f", {s['total_prompt_tokens'] if s['total_prompt_tokens'] is not None else 'unknown'} of prompts",
    ]
    for name, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E latency"),
                        ("queue_time", "Queue time")):  # fmt: skip
        lines.append(f"  {title + ':':<13}{_spread(s[name])}")
    if s["total_drafted"] is not None:
        rate = s["avg_acceptance_rate"]
        lines.append(
            f"  Acceptance: {'-' if rate is None else f'{rate:.1%}'} of {s['total_drafted']:.0f} drafts, "
            f"mean length "
            f"{_show(s['mean_acceptance_length'])}"
        )
    if s.get("slo"):
        lines.append(
            f"  Goodput: {_show(s['goodput'], ' requests/s')} ({s['slo']['share']:.0%} met every limit)"
        )
    lines.append(f"  Energy: {_energy(result.gpu_monitoring)}")
    used = s.get("utilisation") or {}
    if used.get("bandwidth") is not None:
        lines.append(
            f"  Of what {used['device']} can do: {used['bandwidth']:.0%} of "
            f"{used['measured_read_gb_s']:.1f} GB/s, "
            f"{used['flops']:.0%} of {used['measured_tflop_s']:.2f} TFLOP/s ({used['measured_with']})"
        )
    spread = s["repeats"]["spread"].get("overall_throughput") if s["repeats"]["count"] > 1 else None
    if spread:
        lines.append(
            f"  Repeats: {s['repeats']['count']}, throughput {_show(spread['min'])} to "
            f"{_show(spread['max'])} tok/s "
            f"(mean {_show(spread['mean'])} ± {_show(spread['ci95'])}, 95%)"
        )
    for kind, count in s["failures"].items():
        example = next(record.error for record in result.failures if (record.error or "").startswith(kind))
        lines.append(f"  FAILED: {count} requests: {example}")
    if not result.valid:
        lines.append(f"  INVALID: {s['client']['reason']}")
    return lines


def _sampling(spec: RunSpec) -> str:
    sampling = spec.sampling
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    if sampling.temperature > 0:
        how += f", top_p {sampling.top_p:g}, top_k {sampling.top_k}"
    return f"{how}, seed {sampling.seed}"


def _batching(spec: RunSpec) -> str:
    size = spec.effective()["effective_batch_size"]
    return "off: one request at a time" if size == 1 else f"static, up to {size}"


def _spread(values: Mapping[str, float | None]) -> str:
    if values["mean"] is None:
        return "-"
    return ", ".join(f"{name} {_seconds(value)}" for name, value in values.items() if value is not None)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _show(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}" if value < 100 else f"{value:,.0f}{unit}"


def _energy(monitoring: Mapping[str, Any]) -> str:
    joules = monitoring.get("total_energy_all_gpus")
    per_token = monitoring.get("joules_per_token")
    if per_token is None:
        reasons = monitoring.get("reasons") or {}
        return f"not measured ({reasons.get('joules_per_token') or reasons.get('gpus') or 'no reason given'})"
    total = f"{joules:,.1f} J, " if joules is not None else ""
    return f"{total}{per_token:.4g} J a token"
