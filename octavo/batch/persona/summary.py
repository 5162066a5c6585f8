"""`inference_summary.json`: what was done, with what, and how fast. Nothing in it is assumed.

A job may have taken several runs. Each run that ended leaves a note beside the journal, and every sample
says which run made it and when; so the time of a run that was killed counts up to its last sample, and
what nobody can know of such a run (its joules) is null, with the reason.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.batch.persona.data import Scenario
from octavo.batch.persona.job import PersonaOptions, Plan, sampling_record
from octavo.batch.persona.results import Record, is_failed

# What differs between two runs that made the same samples.
TIMING_KEYS = frozenset(
    {
        "inference_time_seconds", "load_time_seconds", "throughput_samples_per_sec",
        "generated_tokens_per_sec",
        "gpu_minutes_per_10k_samples", "gpu_utilization", "energy", "not_measured", "timestamp", "num_runs",

    }
)  # fmt: skip


@dataclass
class EngineFacts:
    """What the engine that made the samples really was; plain data."""

    settings: dict[str, Any]  # dtype, max_model_len, …
    device: str  # "cpu" or "cuda"
    num_gpus: int  # that worked
    uses_chat_template: bool
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunNote:
    """One run of a job, as it is kept beside the journal."""

    run: int
    load_time_seconds: float
    inference_time_seconds: float
    energy: Mapping[str, Any]
    gpu_utilization: float | None
    gpu_reason: str | None
    facts: EngineFacts


def inference_seconds(records: Iterable[Record], notes: Sequence[Mapping[str, Any]]) -> float:
    """Over all runs; of a run that was killed, until its last sample."""
    seconds: dict[int, float] = {}
    for record in records:
        seconds[record["run"]] = max(seconds.get(record["run"], 0.0), record["elapsed"])
    for note in notes:
        seconds[note["run"]] = max(seconds.get(note["run"], 0.0), note["inference_time_seconds"])
    return sum(seconds.values())


def make_summary(
    options: PersonaOptions,
    scenario: Scenario,
    plan: Plan,
    records: Sequence[Record],
    notes: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The summary of a job of which every sample has ended. `notes` are RunNotes as plain data."""
    last = notes[-1] if notes else None
    facts = last["facts"] if last else {}
    num_failed = sum(map(is_failed, records))
    num_made = len(records) - num_failed
    seconds = inference_seconds(records, notes)
    cut = {(record["user_hash"], record["item_idx"]) for record in records if record["dropped_turns"]}
    tokens = sum(record["generated_tokens"] for record in records)
    not_measured: dict[str, str] = {}
    num_gpus = facts.get("num_gpus", 0)
    gpu_minutes = None
    if num_gpus and num_made:
        gpu_minutes = round(seconds / 60 * num_gpus / num_made * 10_000, 3)
    else:
        reason = "no GPU was used" if not num_gpus else "no sample was made"
        not_measured["gpu_minutes_per_10k_samples"] = reason
    utilization = last["gpu_utilization"] if last else None
    if utilization is None:
        not_measured["gpu_utilization"] = (last or {}).get("gpu_reason") or "no run that ended measured it"
    return {
        "checkpoint": options.checkpoint,
        "scenario": str(scenario.folder),
        "dataset": options.dataset.name,
        "ablation_config": options.ablation.name,
        "num_users": len(plan.users),
        "num_items": plan.num_items,
        "skipped_items": plan.num_skipped,
        "malformed_items": scenario.num_malformed_items,
        "items_without_history": plan.num_without_history,
        "num_samples_per_item": plan.num_samples,
        "total_samples": plan.total_samples,
        "failed_samples": num_failed,
        "truncated_prompts": len(cut),
        "prompt_tokens": sum(record["prompt_tokens"] for record in records),
        "generated_tokens": tokens,
        "inference_time_seconds": round(seconds, 3),
        "load_time_seconds": last["load_time_seconds"] if last else None,
        "throughput_samples_per_sec": round(num_made / seconds, 4) if seconds else None,
        "generated_tokens_per_sec": round(tokens / seconds, 2) if seconds else None,
        "tensor_parallel_size": options.engine_kwargs.get("tensor_parallel_size") or 1,
        "data_parallel_size": options.num_replicas,
        "gpu_minutes_per_10k_samples": gpu_minutes,
        "gpu_utilization": utilization,
        "energy": _energy(records, notes),
        "sampling_params": sampling_record(options.params),
        "seed": options.seed,
        "engine": options.engine,
        "engine_settings": facts.get("settings", {}),
        "uses_chat_template": facts.get("uses_chat_template"),
        "cleaned": options.cleans,
        "warnings": facts.get("warnings", []),
        "not_measured": not_measured,
        "num_runs": len({record["run"] for record in records} | {note["run"] for note in notes}),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _energy(records: Sequence[Record], notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"joules", "by_counter"} over all runs, or {"joules": None, "reason"}."""
    noted = {note["run"] for note in notes}
    if any(record["run"] not in noted for record in records):
        return {"joules": None, "reason": "a run was killed, and what it took was not read"}
    total: dict[str, float] = {}
    for note in notes:
        if note["energy"].get("joules") is None:
            return {"joules": None, "reason": note["energy"].get("reason") or "not measured"}
        for name, joules in note["energy"].get("by_counter", {}).items():
            total[name] = total.get(name, 0.0) + joules
    if not total:
        return {"joules": None, "reason": "no run of the job was measured"}
    return {"joules": round(sum(total.values()), 3), "by_counter": {k: round(v, 3) for k, v in total.items()}}
