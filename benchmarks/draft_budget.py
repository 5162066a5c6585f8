"""How long the draft budget thinks: plan + observe a step, at several batch sizes.

    python benchmarks/draft_budget.py [--steps 1000] [--batches 1,8,64,256]

Prints one JSON line a batch size, machine and kind of drafter: milliseconds a step (the mean in the
quietest fifth of the run, the median, the 99th percentile), and the number of drafts a request it
settled on. The decision about the whole batch comes every few steps, so the mean is what counts and
the 99th percentile is what one step may wait. The machine is flat to 128 rows and linear beyond, or,
so that all of a large batch drafts, flat to 4096. Bounds: a mean of 0.3 ms at 256 requests and of
0.03 ms at 1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from octavo.core.cost_model import CostModel
from octavo.core.draft_budget import DraftBudget, DraftPlan, StepFacts, StepResult
from octavo.core.messages import DraftPasses

ROWS = (1, 8, 32, 64, 128, 256, 512, 1024, 4096)


def measure(batch: int, steps: int, acceptance: float, model: bool, flat_rows: int) -> dict[str, float]:
    """Milliseconds of plan + observe in steady decoding, where speculation pays or does not."""
    rng = random.Random(0)

    def machine_seconds(rows: float) -> float:
        return 8e-3 + 0.6e-3 * min(rows, flat_rows) / flat_rows + 50e-6 * max(0.0, rows - flat_rows)

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
        rests = budget.rests(batch)
        plan = DraftPlan(states, [0] * batch) if rests else budget.plan(facts)
        planned = time.perf_counter() - started
        rows = batch + sum(asked)
        result = StepResult(
            plan=plan,
            rows=rows,
            kv_tokens=500 * batch,
            chunk_rows=0,
            num_verify=batch,
            target_seconds=machine_seconds(rows) * rng.lognormvariate(0.0, 0.03),
            draft_seconds=plan.passes * machine_seconds(batch) / 6,
            states=states,
            asked=asked,
            drafted=asked,
            accepted=accepted,
            passes=DraftPasses([batch] * plan.passes) if plan.passes else None,
        )
        started = time.perf_counter()
        if rests and not any(asked):
            budget.observe_rest(batch, 500 * batch, result.target_seconds)
        else:
            budget.observe(result)
        if step >= 50:
            times.append(1e3 * (planned + time.perf_counter() - started))
            mean_drafts += sum(plan.num_drafts) / batch / steps
        asked = plan.num_drafts
    fifth = steps // 5
    parts = [times[start : start + fifth] for start in range(0, 5 * fifth, fifth)]
    return {
        "batch": batch,
        "draft_model": model,
        "flat_rows": flat_rows,
        "acceptance": acceptance,
        "mean_drafts": round(mean_drafts, 2),
        "mean_ms": round(min(statistics.fmean(part) for part in parts), 4),
        "median_ms": round(statistics.median(times), 4),
        "p99_ms": round(sorted(times)[int(0.99 * len(times))], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batches", default="1,8,64,256")
    options = parser.parse_args()
    for batch in map(int, options.batches.split(",")):
        for model in (False, True):
            for acceptance in (0.03, 0.7, 0.95):
                for flat_rows in (128, 4096):
                    line = measure(batch, options.steps, acceptance, model, flat_rows)
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
