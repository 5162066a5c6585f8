"""How long the brain thinks: schedule + update with 256 running requests, at several context lengths.

    python benchmarks/brain.py [--running 256] [--steps 200]

Prints one JSON line a row: milliseconds a step (minimum and median over the steps), for plain
decoding, with 4 drafts a request, and with a blocked queue. There the request at its head begins like
a running one, needs more blocks than ever come free, and is looked at again whenever a request ends,
which happens in every step. The time must not grow with the context.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.draft_planner import EachRequest
from octavo.core.messages import Finish, ModelOutput, SchedulerOutput
from octavo.core.request import FinishReason, Request
from octavo.core.scheduler import Scheduler
from octavo.sampling_params import SamplingParams

BLOCK_SIZE = 16
WARM_UP = 3  # steps
PARAMS = SamplingParams(temperature=0)


def answer(out: SchedulerOutput) -> ModelOutput:
    """What a device would say: one token for every request that samples."""
    count = len(out.rows)
    return ModelOutput(
        step_id=out.step_id,
        keys=out.row_keys,
        tokens=[[1] if rows.samples else [] for rows in out.rows],
        num_drafts_valid=[0] * count,
        num_accepted=[0] * count,
        finished=[Finish.NO] * count,
        logprobs=[None] * count,
        prompt_logprobs=[None] * count,
    )


def measure(
    running: int, context: int, steps: int, drafts: int = 0, *, blocked: bool = False
) -> dict[str, float]:
    """Milliseconds of schedule + update in steady decoding."""
    count = running + steps if blocked else running  # as many as end meanwhile
    length = context + 3 * steps
    blocks = count * (length // BLOCK_SIZE + 2)
    config = SchedulerConfig(
        max_num_seqs=count + 1,
        max_num_batched_tokens=count * context,
        max_model_len=blocks * BLOCK_SIZE,
        max_chunk_tokens=length,
        pipeline_depth=1,
    )
    scheduler = Scheduler(
        config, CacheConfig(BLOCK_SIZE, blocks, True), EachRequest(lambda _: drafts) if drafts else None
    )
    for index in range(count):
        prompt = [index % 1000, *range(context - 1)]
        scheduler.add(Request(str(index), prompt, PARAMS, seed=0, limit=length, arrival=index))
    unread: list[ModelOutput] = []
    times: list[float] = []
    for step in range(steps + WARM_UP):
        if blocked and step == WARM_UP:
            prompt = [0, *range(context - 1)]
            prompt += [7] * ((blocks - 1) * BLOCK_SIZE - len(prompt))
            scheduler.add(Request("blocked", prompt, PARAMS, seed=0, limit=len(prompt) + 1, arrival=count))
        if blocked and step >= WARM_UP:
            scheduler.finish(str(count - 1 - (step - WARM_UP)), FinishReason.ABORT)
        started = time.perf_counter()
        out = scheduler.schedule()
        middle = time.perf_counter()
        assert out is not None
        unread.append(answer(out))
        resumed = time.perf_counter()
        if len(unread) > 1:
            scheduler.update(unread.pop(0))
        if step >= WARM_UP:  # the first ones hold the prompts
            times.append(middle - started + time.perf_counter() - resumed)
    assert scheduler.num_waiting == blocked, "the head of the queue was not blocked"
    return {"min_ms": round(min(times) * 1e3, 3), "median_ms": round(statistics.median(times) * 1e3, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 1024, 4096, 16384])
    args = parser.parse_args()
    for context in args.contexts:
        for drafts, blocked in ((0, False), (4, False), (0, True)):
            result = measure(args.running, context, args.steps, drafts, blocked=blocked)
            row = {"running": args.running, "context": context, "drafts": drafts, "blocked": blocked}
            print(json.dumps({**row, **result}), flush=True)


if __name__ == "__main__":
    main()
