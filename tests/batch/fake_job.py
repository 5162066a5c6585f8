"""`octavo batch openai` with fake workers, as a process that a test may kill.

    python -m tests.batch.fake_job SECONDS_A_REQUEST[:FIRST] INPUT:OUTPUT …

A prompt whose first token id is FIRST or above never gets its answer. Prints the peak of its own memory
in bytes after each file.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

from octavo.batch.openai.job import OpenAIJob, OpenWorkers, Summary, run_openai_job
from octavo.batch.run import run_async
from octavo.batch.work import WorkItem
from tests.batch.fakes import FakeWorkers


def main() -> int:
    given, _, first = sys.argv[1].partition(":")
    seconds, first_without_end = float(given), int(first or 1 << 30)
    failed = 0
    for pair in sys.argv[2:]:
        summary, ended_by = _one(pair, _workers(seconds, first_without_end))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(peak * (1 if sys.platform == "darwin" else 1024))
        if ended_by is not None:
            return 128 + ended_by
        failed += not summary.all_succeeded
    return 1 if failed else 0


def _one(pair: str, open_workers: OpenWorkers) -> tuple[Summary, int | None]:
    source, _, target = pair.partition(":")
    job = OpenAIJob(Path(source), Path(target), ("fake",), {"model": "fake"}, seed=5, quiet=True)
    return run_async(lambda stop: run_openai_job(job, open_workers, stop))


def _workers(seconds: float, first_without_end: int) -> OpenWorkers:
    def delay(item: WorkItem) -> float:
        prompt: Any = item.prompt
        if prompt[0] >= first_without_end:
            return 1e6
        return seconds * (1 + len(item.key) % 3)

    async def open_workers() -> FakeWorkers:
        return FakeWorkers(delay=delay, max_num_seqs=32)

    return open_workers


if __name__ == "__main__":
    sys.exit(main())
