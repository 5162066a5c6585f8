"""A line of statistics now and then, for those who asked for it (disable_log_stats=False)."""

from __future__ import annotations

import logging
import time

from octavo.core.draft_planner import BudgetPlanner
from octavo.core.scheduler import Scheduler

logger = logging.getLogger("octavo")


class StatsLog:
    """Logs what the scheduler did since the last line, at most every `interval` seconds."""

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._last = time.monotonic()
        self._rows = (0, 0)

    def step(self, scheduler: Scheduler) -> None:
        """After every step."""
        now = time.monotonic()
        seconds = now - self._last
        if seconds < self._interval:
            return
        self._last = now
        stats, kv = scheduler.stats, scheduler.kv
        chunk_rows, verify_rows = stats.num_chunk_rows, stats.num_verify_rows
        prompt_rate = (chunk_rows - self._rows[0]) / seconds
        decode_rate = (verify_rows - self._rows[1]) / seconds
        self._rows = (chunk_rows, verify_rows)
        hits = kv.num_prefix_hits / kv.num_prefix_queries if kv.num_prefix_queries else 0.0
        line = (
            f"running {scheduler.num_running}, waiting {scheduler.num_waiting}, "
            f"prompt {prompt_rate:.0f} rows/s, decode {decode_rate:.0f} rows/s, KV {kv.usage:.0%}, "
            f"prefix hits {hits:.0%}, preemptions {stats.num_preemptions}"
        )
        if isinstance(scheduler.planner, BudgetPlanner):
            line += f", speculation {scheduler.planner.budget.report.net_speedup:.2f}x"
        logger.info(line)
