"""What an engine holds and has done, as plain data that may cross to another process."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.outputs import SpeculationMetrics


@dataclass(frozen=True)
class EngineStats:
    """One look at the engine, between two steps. Counts of tokens, requests and steps are since the start."""

    num_running: int  # sequences that hold a slot
    num_waiting: int  # sequences in the queue
    num_blocks: int  # of the KV cache
    num_used_blocks: int  # held by a sequence; cached blocks that nobody holds are free
    num_steps: int = 0
    num_chunk_rows: int = 0  # prompt tokens computed
    num_verify_rows: int = 0  # decode rows computed, drafts included
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # found there
    speculation: SpeculationMetrics | None = None  # of all requests together; None: no speculation
    energy_joules: dict[str, float] | None = None  # by counter, since the start; None: not measured

    @property
    def kv_usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return self.num_used_blocks / self.num_blocks
