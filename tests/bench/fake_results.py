"""Results that nobody measured: records with chosen times, tokens and texts."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from typing import Any

from octavo.bench import metrics
from octavo.bench.prompts import bundled_prompts
from octavo.bench.record import RequestRecord, RunResult

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def fake_result(
    engine: str = "octavo",
    method: str = "target_ar",
    *,
    tpot: float = 0.02,
    ttft: float = 0.06,
    accept: float = 0.0,
    prompts: int = 12,
    repeats: int = 1,
    differ: Collection[int] = (),
    fail: Collection[int] = (),
    joules_per_token: float | None = None,
    noise: float = 0.0,
    warnings: Collection[str] = (),
) -> RunResult:
    """One closed-loop run over the first bundled prompts, answers the same for equal arguments.

    `differ` are prompts whose answer parts in the middle, `fail` those whose request failed.
    """
    result = RunResult(
        engine,
        method,
        {"model": "/models/smollm2", "sampling": {"temperature": 0.0, "max_tokens": 64},
         "prompts": {"source": "the bundled set", "counts": {"used": prompts}}},
        {"cpu": "Fake CPU", "gpus": "-", "started_at": "2026-11-21T14:00:00+00:00"},
        list(warnings),
    )  # fmt: skip
    draw = random.Random(f"{engine} {method}")
    now, summaries = 0.0, []
    for repeat in range(repeats):
        began, records = now, []
        for index, prompt in enumerate(bundled_prompts()[:prompts]):
            count = random.Random(index).randint(20, 60)
            record = RequestRecord(index, prompt.prompt_id, repeat, prompt_tokens=100, generated_tokens=count,
                                   scheduled_time=now, sent_time=now)  # fmt: skip
            records.append(record)
            if index in fail:
                record.error, record.generated_tokens = f"http_500: {EVIL}", 0
                continue
            now = _answer(record, now, ttft, tpot, accept, draw, noise)
            _say(record, index, count, index in differ)
            record.derive(open_loop=False)
        result.requests += records
        summaries.append(metrics.summarize(records, max(now - began, 1e-6), open_loop=False))
    result.summary = metrics.summarize(result.requests, max(now, 1e-6), open_loop=False)
    result.summary["repeats"] = metrics.repeats(summaries)
    result.gpu_monitoring = _monitoring(joules_per_token, now, result.summary["total_tokens"])
    return result


def _answer(
    record: RequestRecord,
    now: float,
    ttft: float,
    tpot: float,
    accept: float,
    draw: random.Random,
    noise: float,
) -> float:
    def about(seconds: float) -> float:
        return seconds * (draw.lognormvariate(0, noise) if noise else 1.0)

    record.first_token_time = now = now + about(ttft)
    record.arrivals = [(now, 1)]
    left = record.generated_tokens - 1
    drafts = 4
    counted = ([0] * drafts, [0] * drafts, [0] * drafts)
    while left:
        accepted = 0
        while accept and accepted < drafts and draw.random() < accept:
            accepted += 1
        if accept:
            record.drafted = (record.drafted or 0) + drafts
            record.accepted = (record.accepted or 0) + accepted
            record.num_verifications = (record.num_verifications or 0) + 1
            for position in range(drafts):
                counted[0][position] += 1
                counted[1][position] += position < accepted
                counted[2][position] += position <= accepted
        now += about(tpot)
        piece = min(1 + accepted, left)
        record.arrivals.append((now, piece))
        left -= piece
    if accept:
        record.drafted_by_position, record.accepted_by_position, record.reached_by_position = counted
    record.end_time, record.finish_reason = now, "length"
    return now


def _say(record: RequestRecord, index: int, count: int, differs: bool) -> None:
    ids = [random.Random(index * 1000 + place).randint(10, 40000) for place in range(count)]
    text = f"Answer {index} {EVIL}: " + " ".join(map(str, ids))
    if differs:
        ids[count // 2] = 7
        text = text[: len(text) // 2] + " 另一个 ending"
    record.output_token_ids, record.output_text = ids, text


def _monitoring(joules: float | None, duration: float, tokens: int) -> dict[str, Any]:
    if joules is None:
        why = "no GPU was used; no package counter"
        return {
            "gpu_ids": [],
            "joules_per_token": None,
            "reasons": {"joules_per_token": why, "gpus": "no GPU was used"},
            "cpu": {"energy": None, "reasons": {"energy": "no package counter"}},
            "snapshots": [],
        }
    moments = [duration * i / 50 for i in range(51)]
    watts = joules * tokens / duration
    return {
        "gpu_ids": [0], "joules_per_token": joules, "net_joules_per_token": joules / 2, "energy_of": "gpus",
        "tokens_per_joule": 1 / joules, "energy_source": "counter", "idle_power": 80.0, "reasons": {},
        "average_power": watts, "total_energy_all_gpus": joules * tokens,
        "gpus": {"0": {"name": "Fake GPU", "throttled": {"power cap": 0.25}}},
        "snapshots": [{"t": t, "gpus": {"0": {"power_w": watts * (1 + 0.1 * math.sin(t))}}} for t in moments],
    }  # fmt: skip
