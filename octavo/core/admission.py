"""Who enters next: the queue of waiting requests, and whether the first of them fits.

Requests enter in order, smaller priority and earlier arrival first; one that does not fit holds back
those behind it, so that nobody is passed over for ever. A request fits if the blocks of its whole
prompt, beyond the prefix that the cache holds, are free and not promised to a prompt that is already
being computed.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from octavo.core.block_pool import Block
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.request import Request, Status

STEPS_BETWEEN_LOOKS = 32  # at the prefix of a request that does not fit


@dataclass(slots=True)
class _Refused:
    """The head of the queue, which needs more blocks than are free.

    Looking its prefix up takes longer the longer it is, so that is not done in every step: not while
    no more is free than then, and only now and then while it needs more than is free by what was
    known of its prefix then (the prefix may have grown meanwhile, if another request has it).
    """

    request: Request | None = None
    num_free: int = 0
    needed: int = 0
    step_id: int = 0

    def still(self, request: Request, num_free: int, owed: int, step_id: int) -> bool:
        """True if `request` would be refused again, as far as can be told without a look."""
        if request is not self.request:
            return False
        if num_free <= self.num_free:
            return True
        return self.needed + owed > num_free and step_id - self.step_id < STEPS_BETWEEN_LOOKS


@dataclass(slots=True)
class Room:
    """What a step has left for requests that enter."""

    step_id: int
    rows: int
    is_busy: bool  # requests run
    has_chunks: bool  # a prompt has rows in this step
    owed: int  # blocks that the prompts being computed still need


class WaitingQueue:
    """Requests that wait, first in order first. One that ended meanwhile leaves lazily."""

    def __init__(self, kv: KVCacheManager, watermark_blocks: int, least_chunk_rows: int) -> None:
        """`watermark_blocks`: kept free while requests run. `least_chunk_rows`: a prompt is not begun
        in the rest of a step that has fewer rows, if other prompts have filled it."""
        self._kv = kv
        self._watermark = watermark_blocks
        self._least_rows = least_chunk_rows
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._refused = _Refused()

    def push(self, request: Request) -> None:
        """A new request, or one that was preempted."""
        heapq.heappush(self._heap, (request.order, request))

    def take(self, room: Room) -> tuple[Request, list[Block]] | None:
        """The first request, with the cached blocks of its prefix; None if it cannot enter now."""
        while self._heap and self._heap[0][1].status is not Status.WAITING:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        request, kv = self._heap[0][1], self._kv
        if request.num_inflight_steps:
            return None  # preempted a moment ago: its unread tokens come first
        num_free = kv.pool.num_free
        if room.is_busy and self._refused.still(request, num_free, room.owed, room.step_id):
            return None
        prefix = kv.find_prefix(request)
        left = request.num_tokens - len(prefix) * kv.block_size
        if room.has_chunks and room.rows < min(left, self._least_rows):
            return None  # what is left of this step is little: the next one takes the prompt whole
        missing = kv.blocks_for(request.num_tokens) - len(prefix)
        spare = self._watermark if room.is_busy else 0
        needed = missing + spare + num_free - kv.num_free_after(prefix)
        if needed + room.owed > num_free:
            self._refused = _Refused(request, num_free, needed, room.step_id)
            return None
        heapq.heappop(self._heap)
        return request, prefix
