"""How long the draft budget thinks: plan + observe a step, at several batch sizes.

    python benchmarks/draft_budget.py [--steps 1000] [--batches 1,8,64,256]

Prints one JSON line a batch size and kind of drafter: milliseconds a step (mean, median, 99th
percentile, maximum), and the number of drafts a request it settled on. A step's time spreads the
decision about the whole batch over several steps, so the mean is what counts and the 99th
percentile is what one step may wait. Bounds: a mean of 0.3 ms at 256 requests, 0.03 ms at 1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from octavo.core.cost_model import CostModel
from octavo.core.draft_budget import DraftBudget, StepFacts, StepResult

ROWS = (1, 8, 32, 64, 128, 256, 512, 1024)


def machine_seconds(rows: float) -> float:
    """A GPU: flat to 128 rows, then linear."""
    return 8e-3 + 0.6e-3 * rows / 128 if rows <= 128 else 8.6e-3 + 50e-6 * (rows - 128)


def measure(batch: int, steps: int, acceptance: float, model: bool) -> dict[str, float]:
    """Milliseconds of plan + observe in steady decoding, where speculation pays or does not."""
    rng = random.Random(0)
    table = [(rows, machine_seconds(rows)) for rows in ROWS]
    draft = CostModel([(rows, seconds / 6) for rows, seconds in table]) if model else None
    budget = DraftBudget(CostModel(table), draft, max_num_batched_tokens=8192)
    states = [
        budget.add(str(index), model="draft" if model else None, lookup=None if model else "lookup")
        for index in range(batch)
    ]
    rooms = [10_000] * batch
    asked = [0] * batch
    times: list[float] = []
    mean_drafts = 0.0
    for step in range(steps + 50):
        accepted = []
        for count in asked:
            right = 0
            while right < count and rng.random() < acceptance:
                right += 1
            accepted.append(right)
        facts = StepFacts(states, rooms, kv_tokens=500 * batch)
        started = time.perf_counter()
        plan = budget.plan(facts)
        planned = time.perf_counter() - started
        rows = batch + sum(asked)
        result = StepResult(
            plan=plan,
            rows=rows,
            kv_tokens=500 * batch,
            chunk_rows=0,
            target_seconds=machine_seconds(rows) * rng.lognormvariate(0.0, 0.03),
            draft_seconds=plan.passes * machine_seconds(batch) / 6,
            states=states,
            asked=asked,
            drafted=asked,
            accepted=accepted,
        )
        started = time.perf_counter()
        budget.observe(result)
        if step >= 50:
            times.append(1e3 * (planned + time.perf_counter() - started))
            mean_drafts += sum(plan.num_drafts) / batch / steps
        asked = plan.num_drafts
    return {
        "batch": batch,
        "draft_model": model,
        "acceptance": acceptance,
        "mean_drafts": round(mean_drafts, 2),
        "mean_ms": round(statistics.fmean(times), 4),
        "median_ms": round(statistics.median(times), 4),
        "p99_ms": round(sorted(times)[int(0.99 * len(times))], 4),
        "max_ms": round(max(times), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batches", default="1,8,64,256")
    options = parser.parse_args()
    for batch in map(int, options.batches.split(",")):
        for model in (False, True):
            for acceptance in (0.03, 0.7, 0.95):
                print(json.dumps(measure(batch, options.steps, acceptance, model)), flush=True)


if __name__ == "__main__":
    main()
