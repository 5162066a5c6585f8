"""Octavo's brain alone (benchmarks/brain.py), as one row among the others: no model, no tokens."""

from __future__ import annotations

import json
import sys

from benchmarks.brain import measure
from benchmarks.engines.job import ForeignCores, peak_memory


def main() -> None:
    """Milliseconds of schedule + update a step, at each context length."""
    options = json.load(sys.stdin)["engine"]
    metrics: dict[str, float] = {}
    with ForeignCores() as watch:
        for context in options["contexts"]:
            result = measure(options["running"], context, options["steps"])
            metrics |= {f"{name}_{context}": value for name, value in result.items()}
        blocked = measure(options["running"], options["contexts"][-1], options["steps"], blocked=True)
        metrics["blocked_ms"] = blocked["median_ms"]
    metrics["step_ms"] = max(value for name, value in metrics.items() if name.startswith("median_ms"))
    metrics["peak_mb"] = peak_memory() / 1e6
    print(json.dumps({"version": "octavo", "metrics": metrics, "foreign_cores": watch.cores}))


if __name__ == "__main__":
    main()
