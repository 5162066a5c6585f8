"""Looking at a running engine: `take_stats` for whoever asks, and a line now and then for those who wanted
it (disable_log_stats=False)."""

from __future__ import annotations

import copy
import logging
import time

from octavo.core.draft_planner import BudgetPlanner
from octavo.core.scheduler import Scheduler
from octavo.engine.engine_stats import EngineStats
from octavo.outputs import SpeculationMetrics

logger = logging.getLogger("octavo")


def take_stats(
    scheduler: Scheduler,
    speculation: SpeculationMetrics | None,
    energy_joules: dict[str, float] | None = None,
) -> EngineStats:
    """Cheap: a few attributes. For whoever owns the scheduler, between two of its calls."""
    stats, kv = scheduler.stats, scheduler.kv
    return EngineStats(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_blocks=len(kv.pool.blocks),
        num_used_blocks=kv.pool.num_used,
        num_steps=stats.num_steps,
        num_chunk_rows=stats.num_chunk_rows,
        num_verify_rows=stats.num_verify_rows,
        num_preemptions=stats.num_preemptions,
        num_prefix_queries=kv.num_prefix_queries,
        num_prefix_hits=kv.num_prefix_hits,
        speculation=copy.deepcopy(speculation),  # the engine goes on counting in its own
        energy_joules=energy_joules,
    )


class StatsLog:
    """Logs what the scheduler did since the last line, at most every `interval` seconds.

    `synthetic`: drafts are accepted by coins, and every line says so.
    """

    def __init__(self, interval: float = 5.0, *, synthetic: bool = False) -> None:
        self._interval = interval
        self._synthetic = synthetic
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
        if self._synthetic:
            line += " (SYNTHETIC acceptance: the texts mean nothing)"
        logger.info(line)
