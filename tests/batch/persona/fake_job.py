"""A persona job with fake workers, as a process that a test may kill.

python -m tests.batch.persona.fake_job MODEL OUTPUT SECONDS_A_SAMPLE
"""

from __future__ import annotations

import sys
from pathlib import Path

from octavo.batch.work import WorkItem
from tests.batch.persona.jobs import options, run_fake


def main() -> int:
    model, output, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

    def delay(item: WorkItem) -> float:
        return seconds * (1 + (item.params.seed or 0) % 3)

    outcome = run_fake(model, options(model, output, num_samples=5), delay=delay, max_num_seqs=8)
    return 1 if outcome.num_left or outcome.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
