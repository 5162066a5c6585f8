"""From records to a summary: throughput, percentiles, acceptance, goodput, and whether to believe any of it.

Only answered requests count towards latencies and tokens; the failed ones are counted apart. A figure that
nothing was measured for is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from octavo.bench.record import RequestRecord
from octavo.bench.slo import count_good, parse_slo
from octavo.bench.target import COUNTERS

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
# A client may be late by this much, or by this share of the median latency if that is more.
LAG_LIMIT = 0.010
LAG_SHARE = 0.02
LAG_QUANTILE = 0.95
# Student's t for a two-sided 95% interval, by degrees of freedom; beyond the table the normal's 1.96.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
SPREAD_OF = (
    "total_duration", "overall_throughput", "request_throughput", "avg_ttft", "avg_latency",
    "avg_acceptance_rate",
)  # fmt: skip


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy does by default."""
    if not values:
        raise ValueError("no values have no quantile")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def distribution(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles; all None where there are no values."""
    if not values:
        return dict.fromkeys(("mean", *QUANTILES))
    return {"mean": fmean(values), **{name: quantile(values, q) for name, q in QUANTILES.items()}}


def summarize(
    records: Sequence[RequestRecord],
    duration: float,
    *,
    slo: str | None = None,
    lags: Sequence[float] = (),
    open_loop: bool = True,
    num_clients: int = 1,
) -> dict[str, Any]:
    """The summary of SPEC D. `duration` is the measured time in seconds, from the first request's moment to
    the last token; `lags` are the heartbeat's of all clients."""
    ok = [record for record in records if record.ok]
    tokens = sum(record.generated_tokens for record in ok)
    prompts = [record.prompt_tokens for record in ok if record.prompt_tokens is not None]
    ttft = _known([record.ttft for record in ok])
    latency = _known([record.latency for record in ok])
    summary: dict[str, Any] = {
        "total_requests": len(records),
        "failed_requests": len(records) - len(ok),
        "total_duration": duration,
        "total_tokens": tokens,
        "total_prompt_tokens": sum(prompts) if len(prompts) == len(ok) else None,
        "tokens_estimated": any(record.tokens_estimated for record in ok),
        "overall_throughput": tokens / duration if duration > 0 else None,
        "request_throughput": len(ok) / duration if duration > 0 else None,
        "avg_ttft": fmean(ttft) if ttft else None,
        "avg_latency": fmean(latency) if latency else None,
        **acceptance(ok),
        "ttft": distribution(ttft),
        "tpot": distribution(_known([record.tpot for record in ok])),
        "itl": distribution([gap for record in ok for gap in record.itl]),
        "e2el": distribution(latency),
        "queue_time": distribution(_known([record.queue_time for record in ok])),
        "goodput": None,
        "failures": _failures(records),
        "client": client_verdict(records, lags, open_loop=open_loop, num_clients=num_clients),
    }
    if slo:
        limits = parse_slo(slo)
        good = count_good(records, limits)
        summary["goodput"] = good / duration if duration > 0 else None
        summary["slo"] = {
            "limits": limits,
            "good_requests": good,
            "share": good / len(records) if records else None,
        }
    return summary


def acceptance(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Acceptance over all drafts, and by position.

    By position: of all drafts at a position the share that was accepted; conditional: of those whose
    predecessors all were. Both are empty where nothing was drafted, or where the engine does not tell.
    """
    told = [record for record in records if record.drafted is not None]
    drafted = sum(record.drafted or 0 for record in told)
    accepted = sum(record.accepted or 0 for record in told)
    counted = [record for record in told if record.num_verifications is not None]
    verifications = sum(record.num_verifications or 0 for record in counted)
    by_position = [
        _added([getattr(record, f"{name}_by_position") for record in told])
        for name in ("accepted", "drafted", "reached")
    ]
    length = None
    if verifications:
        length = 1 + sum(record.accepted or 0 for record in counted) / verifications
    return {
        "total_drafted": drafted if told else None,
        "total_accepted": accepted if told else None,
        "avg_acceptance_rate": accepted / drafted if drafted else None,
        "mean_acceptance_length": length,
        "acceptance_by_position": _ratios(by_position[0], by_position[1]),
        "acceptance_by_position_conditional": _ratios(by_position[0], by_position[2]),
    }


def client_verdict(
    records: Sequence[RequestRecord], lags: Sequence[float], *, open_loop: bool, num_clients: int = 1
) -> dict[str, Any]:
    """Could the client keep up? Its lag beside the limit, and a reason where it could not.

    Dispatch lag: how much later than scheduled requests were sent (open loads only). Event loop lag: how
    late the client noticed things. If more than a twentieth of either is beyond the limit, the figures are
    partly the client's, and the run is invalid.
    """
    latencies = _known([record.latency for record in records if record.ok])
    median = quantile(latencies, 0.5) if latencies else 0.0
    limit = max(LAG_LIMIT, LAG_SHARE * median)
    dispatch = [
        record.sent_time - record.scheduled_time
        for record in records
        if open_loop and record.sent_time is not None
    ]
    verdict: dict[str, Any] = {"clients": num_clients, "lag_limit": limit, "valid": True, "reason": None}
    for name, values in (("dispatch_lag", dispatch), ("event_loop_lag", lags)):
        verdict[name] = None
        if not values:
            continue
        late = quantile(values, LAG_QUANTILE)
        verdict[name] = {"mean": fmean(values), "p95": late, "max": max(values)}
        if late > limit and verdict["valid"]:
            verdict["valid"] = False
            verdict["reason"] = (
                f"the client could not keep up: the 95th percentile of its {name.replace('_', ' ')} is "
                f"{late * 1e3:.1f} ms and the limit {limit * 1e3:.1f} ms (the larger of "
                f"{LAG_LIMIT * 1e3:.0f} ms "
                f"and {LAG_SHARE:.0%} of the median latency). Use more --clients, a lower rate, or a quieter "
                "machine"
            )
    return verdict


def repeats(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The repetitions of a run side by side, and their spread with a 95% confidence interval of the mean."""
    spread = {}
    for name in SPREAD_OF:
        values = [summary[name] for summary in summaries if summary.get(name) is not None]
        if not values:
            continue
        deviation = stdev(values) if len(values) > 1 else None
        spread[name] = {
            "mean": fmean(values),
            "min": min(values),
            "max": max(values),
            "stdev": deviation,
            "ci95": None if deviation is None else t95(len(values) - 1) * deviation / math.sqrt(len(values)),
        }
    each = [{name: summary.get(name) for name in (*SPREAD_OF, "failed_requests")} for summary in summaries]
    return {"count": len(summaries), "each": each, "spread": spread}


def t95(degrees: int) -> float:
    """Student's t of a two-sided 95% interval."""
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.96


def engine_metrics(
    before: Mapping[str, float],
    after: Mapping[str, float],
    samples: Sequence[Mapping[str, float]],
    source: str,
) -> dict[str, Any]:
    """What the engine did in the measured part, from its counters before and after it and from looks at it
    in between. What it does not tell is None, and `source` says where the rest comes from."""
    done = {name: after[name] - before.get(name, 0) for name in COUNTERS if name in after}
    queries = done.get("prefix_queries")
    usage = [sample["kv_usage"] for sample in samples if "kv_usage" in sample]
    told: dict[str, Any] = {
        "source": source,
        "steps": done.get("steps"),
        "prompt_rows": done.get("prompt_rows"),
        "decode_rows": done.get("decode_rows"),
        "preemptions": done.get("preemptions"),
        "kv_usage": {"mean": fmean(usage), "peak": max(usage)} if usage else None,
        "prefix_cache": None,
        "running_peak": max((s["running"] for s in samples if "running" in s), default=None),
        "waiting_peak": max((s["waiting"] for s in samples if "waiting" in s), default=None),
    }
    if queries is not None:
        hits = done.get("prefix_hits", 0)
        told["prefix_cache"] = {
            "queries": queries,
            "hits": hits,
            "hit_rate": hits / queries if queries else None,
        }
    if "drafted" in done:
        told["drafted"], told["accepted"] = done["drafted"], done.get("accepted")
        told["verifications"] = done.get("verifications")
    return told


def fill_acceptance(summary: dict[str, Any], engine: Mapping[str, Any]) -> None:
    """Acceptance from the engine's own totals, where single requests do not tell theirs."""
    if summary.get("total_drafted") is not None or engine.get("drafted") is None:
        return
    drafted, accepted = engine["drafted"], engine["accepted"]
    summary["total_drafted"], summary["total_accepted"] = drafted, accepted
    summary["avg_acceptance_rate"] = accepted / drafted if drafted else None
    if engine.get("verifications"):
        summary["mean_acceptance_length"] = 1 + accepted / engine["verifications"]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _added(lists: Sequence[Sequence[int]]) -> list[int]:
    total = [0] * max((len(each) for each in lists), default=0)
    for each in lists:
        for position, count in enumerate(each):
            total[position] += count
    return total


def _ratios(parts: Sequence[int], wholes: Sequence[int]) -> list[float]:
    """Up to the first position of which nothing is known."""
    known = list(wholes).index(0) if 0 in wholes else len(wholes)
    return [part / whole for part, whole in zip(parts[:known], wholes[:known], strict=True)]


def _failures(records: Sequence[RequestRecord]) -> dict[str, int]:
    """How many requests failed in which way; the kind is what stands before the first colon."""
    kinds: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            kind = record.error.partition(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds
