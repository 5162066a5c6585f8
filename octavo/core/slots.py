"""Who holds a slot, from which request to which: entering, leaving, and what is told to the device.

A running request has a slot of the device and blocks of the KV cache. One that ends or is preempted while
launched steps still hold it is a *zombie*: slot and blocks are released when the last of them was read. A
generation tells the requests of one slot apart, so that an answer which comes late is never booked on the
slot's next one.
"""

from __future__ import annotations

from octavo.core.block_pool import Block
from octavo.core.draft_kv import DraftKV
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.messages import NewSlot
from octavo.core.request import Request, Status


class Slots:
    """The requests that run, and those that are still held by launched steps.

    `running` is in the order of `Request.order`; `unsent` are those of them that the device knows nothing of
    before their next `NewSlot`. Others read both, and only this class changes them.
    """

    def __init__(self, count: int, kv: KVCacheManager, draft_kv: DraftKV | None) -> None:
        self.running: list[Request] = []
        self.unsent: set[Request] = set()
        self._count = count
        self._kv = kv
        self._draft_kv = draft_kv
        self._zombies: set[Request] = set()
        self._free = list(range(count - 1, -1, -1))
        self._generations = [0] * count
        self._freed: list[int] = []  # to be told to the device

    @property
    def has_free(self) -> bool:
        """True if another request may enter."""
        return bool(self._free)

    def enter(self, request: Request, prefix: list[Block]) -> None:
        """A waiting request runs from here on, with the cached blocks of its prefix."""
        self._kv.admit(request, prefix)
        request.slot = slot = self._free.pop()
        self._next_generation(request, slot)
        request.status = Status.RUNNING
        request.num_computed_tokens = request.capacity
        request.decoding = False
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.capacity
        # A resumed request goes back to its place: order is what keeps it from starving.
        running = self.running
        index = len(running)
        while index and running[index - 1].order > request.order:
            index -= 1
        running.insert(index, request)

    def leave(self, request: Request) -> None:
        """A request stops running: what it holds is released, now or when its last step is read."""
        self.running.remove(request)
        self.unsent.discard(request)
        if self._draft_kv is not None:
            self._draft_kv.leave(request)
        if request.num_inflight_steps:
            self._zombies.add(request)
        else:
            self._release(request)

    def read(self, request: Request) -> None:
        """A step launched with `request`, which runs no more, was read: after the last one it is released."""
        if request in self._zombies and not request.num_inflight_steps:
            self._zombies.discard(request)
            self._release(request)

    def _release(self, request: Request) -> None:
        self._kv.release(request)
        request.num_computed_tokens = request.num_inflight_tokens = 0
        request.num_proposed = 0
        request.decoding = False
        if request.slot >= 0:
            self._free.append(request.slot)
            self._freed.append(request.slot)
            request.slot = -1

    def num_zombie_blocks(self) -> int:
        """Blocks that become free when the launched steps are read: those with no other user."""
        return sum(block.ref_count == 1 for zombie in self._zombies for block in zombie.blocks)

    # ------------------------------------------------------------------ what the device is told

    def take_freed(self) -> list[int]:
        """Slots that nobody holds any more, or that are sent anew; each is told once."""
        freed, self._freed = self._freed, []
        return freed

    def send_anew(self) -> None:
        """Have every slot sent again: the device's state is a cache of the host's. Drafts in them are lost.

        Only between steps, when everything launched was read.
        """
        for request in self.running:
            self._next_generation(request, request.slot)
            request.num_proposed = 0
            if self._draft_kv is not None:
                self._draft_kv.leave(request)
            self._freed.append(request.slot)
            self.unsent.add(request)

    def message(self, request: Request) -> NewSlot:
        """All that the device must know of a request."""
        self.unsent.discard(request)
        return NewSlot(
            slot=request.slot,
            generation=request.generation,
            request_id=request.request_id,
            token_ids=list(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            block_ids=[block.block_id for block in request.blocks],
            num_computed_tokens=request.num_computed_tokens,
            params=request.params,
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
            limit=request.limit,
            bad_words_ids=request.bad_words_ids,
            prediction_ids=request.prediction_ids,
        )

    def _next_generation(self, request: Request, slot: int) -> None:
        self._generations[slot] += 1
        request.generation = self._generations[slot]
        request.key = request.key._replace(slot=slot, generation=request.generation)

    # ------------------------------------------------------------------ checks

    def holders(self) -> list[Request]:
        """Whoever holds a slot or blocks: the running, then the zombies."""
        return self.running + list(self._zombies)

    def check_integrity(self) -> None:
        """Assert the invariants that hold between any two calls. For tests; O(everything)."""
        slots = [request.slot for request in self.holders()] + self._free
        assert sorted(slots) == list(range(self._count)), "a slot is lost or held twice"
        assert self.running == sorted(self.running, key=lambda r: r.order), "running is out of order"
        for request in self.running:
            assert request.status is Status.RUNNING, f"{request} is in running"
        for zombie in self._zombies:
            assert zombie.is_zombie, f"{zombie} is not a zombie"
