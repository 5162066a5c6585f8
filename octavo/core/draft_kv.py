"""The draft model's KV cache, as the host sees it: who holds blocks of it, and who is how far behind.

The draft model has a block pool of its own, a second `KVCacheManager`. Plain decoding loses nothing
to it: a request gets draft blocks only when drafts are wanted of it, and when the pool is full the
requests that go last lose theirs and decode on without drafts. The text is the same either way.

A request's *gap* is the number of its known tokens, the last one excepted, that the draft model has
not computed. A round of drafts can start at a gap of 0 or 1: after a round, 0 if some draft was
refused, and 1 if all were accepted, since the last draft itself was never computed. What is more has
to be caught up first. A step changes the gap in this order:

    verify     n new tokens: the gap grows by n, or is 0 or 1 if these drafts came from a round
    catch-up   c rows: the gap shrinks by c
    round      k drafts: computes the gap, the last token and all drafts but the last

The device's own counters are the truth. The host knows an upper bound of the gap, exact once the
steps were read. Blocks follow the rules of the target's: they are registered when the rows that fill
them are scheduled, or when the round that filled them was read, and released when the last step
launched with them was read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from octavo.core.block_pool import Block
from octavo.core.kv_cache_manager import KVCacheManager
from octavo.core.messages import DraftEntry, DraftGroup, DraftRows, RowKind, Rows, SlotBlocks
from octavo.core.request import Request, Status

_IDLE_STEPS = 16  # without drafts, after which a request gives its draft blocks back
_SPARE_SHARE = 8  # at most one block in so many is kept free for those that are in already


class _Round(IntEnum):
    """Does the draft model run for a request at the end of a step?"""

    NO = 0
    MAYBE = 1  # only if the lookup finds nothing
    YES = 2


@dataclass(slots=True, eq=False)
class DraftBlocks:
    """A request's blocks in the draft pool: what a KVCacheManager calls a holder."""

    request: Request
    blocks: list[Block] = field(default_factory=list)
    capacity: int = 0
    num_registered_blocks: int = 0
    prefix_parent: Hashable = None
    num_inflight_steps: int = 0  # launched and unread steps that use them

    @property
    def token_ids(self) -> list[int]:
        """The request's confirmed tokens."""
        return self.request.token_ids

    @property
    def cache_namespace(self) -> Hashable | None:
        """See Request."""
        return self.request.cache_namespace

    @property
    def read_cache(self) -> bool:
        """See Request."""
        return self.request.read_cache


@dataclass(slots=True)
class _UnreadStep:
    max_emitted: int
    catch_up: int = 0
    round: _Round = _Round.NO


@dataclass(slots=True, eq=False)
class DraftProgress:
    """How far the draft model is with a request that runs."""

    request: Request
    # Known tokens it has computed, as of the steps that were read; at least. Without blocks: those
    # that the cache is expected to hold.
    num_computed_tokens: int
    blocks: DraftBlocks | None = None
    after_round: bool = False  # the last step that was read ended with a round
    from_model: bool = False  # and so its drafts are the draft model's
    unread: deque[_UnreadStep] = field(default_factory=deque)
    num_idle_steps: int = 0
    refused_at: int | None = None  # blocks that were free when they were not enough

    def gap(self) -> int:
        """The most that it can be after everything launched."""
        gap = self.request.num_tokens - 1 - self.num_computed_tokens
        round_before = _Round.YES if self.after_round else _Round.NO
        for step in self.unread:
            gap = 1 if round_before is _Round.YES else max(gap + step.max_emitted, int(round_before))
            gap = max(0, gap - step.catch_up)
            round_before = step.round
        return gap


@dataclass(slots=True)
class DraftKVStats:
    """Counters since the start."""

    num_evictions: int = 0
    num_catch_up_rows: int = 0


class DraftKV:
    """The draft group of the scheduler. Once a step: `survey`, then `launch`; `read` for each request.

    `max_len` is the draft model's longest context: beyond it nothing is drafted. `with_lookup`: a
    lookup goes first, and the draft model runs where that finds nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, max_len: int, *, with_lookup: bool = False) -> None:
        self.kv = KVCacheManager(num_blocks, block_size)
        self.max_len = max_len
        self.with_lookup = with_lookup
        self.stats = DraftKVStats()
        self._members: set[DraftProgress] = set()  # those with blocks
        self._zombies: set[DraftBlocks] = set()

    # ------------------------------------------------------------------ a step is built

    def survey(self, requests: Sequence[Request], rows: Sequence[Rows]) -> tuple[list[int], dict[int, str]]:
        """How many rows each request has to catch up before drafts, and which cannot have any, and why.

        `requests` are those that sample in the step, with their `rows`. Indices are theirs.
        """
        owed: list[int] = []
        blocked: dict[int, str] = {}
        for index, (request, its_rows) in enumerate(zip(requests, rows, strict=True)):
            progress = request.draft_progress
            if progress is None:
                prefix = self.kv.find_prefix(request)
                progress = DraftProgress(request, len(prefix) * self.kv.block_size)
                request.draft_progress = progress
            progress.unread.append(_UnreadStep(its_rows.num_rows if its_rows.kind is RowKind.VERIFY else 1))
            owed.append(max(0, progress.gap() - 1))
            why = self._why_blocked(progress)
            if why:
                blocked[index] = why
        return owed, blocked

    def _why_blocked(self, progress: DraftProgress) -> str:
        last = _last_position(progress.request)
        if last >= self.max_len:
            return f"beyond the draft model's context of {self.max_len} tokens"
        if progress.blocks is not None:
            return ""
        free = self.kv.pool.num_free
        missing = self.kv.blocks_for(last + 1) - progress.num_computed_tokens // self.kv.block_size
        refused = progress.refused_at is not None and free <= progress.refused_at
        if refused or missing + self._num_spare() > free:
            return "no room in the draft model's KV cache"
        return ""

    def _num_spare(self) -> int:
        """Blocks kept for the growth of those who hold some, so that nobody enters to be evicted."""
        return min(len(self._members), len(self.kv.pool.blocks) // _SPARE_SHARE)

    def launch(
        self, requests: Sequence[Request], counts: Sequence[int], passes: int, catch_up: Mapping[int, int]
    ) -> tuple[DraftGroup, list[int], list[DraftBlocks]]:
        """Turn a plan into the step's draft group; see SchedulerOutput.

        counts: drafts wanted of each request. passes: draft model passes, at most. catch_up: rows
        granted, by index. Returns the group, the counts that are left where the draft model cannot
        do its part, and the blocks that the step uses.
        """
        group = DraftGroup()
        left = list(counts)
        used: list[DraftBlocks] = []
        in_step: set[DraftProgress] = set()
        for index, request in enumerate(requests):
            progress = request.draft_progress
            assert progress is not None, "surveyed before"
            last = _last_position(request)
            wanted = max(0, min(counts[index], passes, self.max_len - last))
            rows, drafts = 0, 0
            if wanted or catch_up.get(index, 0):
                rows, drafts = self._place(progress, last, wanted, catch_up.get(index, 0), group, in_step)
            if not self.with_lookup:
                left[index] = drafts
            if not rows and not drafts:
                self._be_idle(progress, last, group)
                continue
            progress.num_idle_steps = 0
            in_step.add(progress)
            blocks = progress.blocks
            assert blocks is not None
            blocks.num_inflight_steps += 1
            used.append(blocks)
            step = progress.unread[-1]
            step.catch_up = rows
            if drafts:
                step.round = _Round.MAYBE if self.with_lookup else _Round.YES
            group.rows.append(DraftRows(request.slot, rows, drafts))
            if rows:
                self.stats.num_catch_up_rows += rows
                known = progress.num_computed_tokens + sum(step.catch_up for step in progress.unread)
                self.kv.register(blocks, min(known, request.num_tokens - 1))
        return group, left, used

    def _place(
        self,
        progress: DraftProgress,
        last: int,
        wanted: int,
        granted: int,
        group: DraftGroup,
        in_step: set[DraftProgress],
    ) -> tuple[int, int]:
        """The rows and drafts a request really gets, with blocks for them."""
        # The last draft is not computed, and KV of the last token a request may hold is never needed.
        reach = min(last + max(1, wanted), progress.request.limit - 1)
        if progress.blocks is None and not self._enter(progress, reach, group):
            return 0, 0
        gap = progress.gap()
        rows = min(granted, max(0, gap - 1))
        drafts = wanted if gap - rows <= 1 else 0
        if (rows or drafts) and not self._grow(progress, reach, group, in_step):
            return 0, 0
        return rows, drafts

    def _enter(self, progress: DraftProgress, reach: int, group: DraftGroup) -> bool:
        request = progress.request
        prefix = self.kv.find_prefix(request)
        progress.num_computed_tokens = len(prefix) * self.kv.block_size
        missing = self.kv.blocks_for(reach) - len(prefix)
        if missing + self._num_spare() > self.kv.num_free_after(prefix):
            progress.refused_at = self.kv.pool.num_free
            return False
        blocks = progress.blocks = DraftBlocks(request)
        self.kv.admit(blocks, prefix)
        new = self.kv.grow(blocks, reach)
        assert new is not None, "counted wrongly"
        progress.refused_at = None
        self._members.add(progress)
        ids = [block.block_id for block in blocks.blocks]
        group.entered.append(DraftEntry(request.slot, progress.num_computed_tokens, ids))
        return True

    def _grow(
        self, progress: DraftProgress, reach: int, group: DraftGroup, in_step: set[DraftProgress]
    ) -> bool:
        """Blocks up to `reach`, from those who go last if need be. False: not in this step."""
        blocks = progress.blocks
        assert blocks is not None
        while (new := self.kv.grow(blocks, reach)) is None:
            missing = self.kv.blocks_for(reach) - len(blocks.blocks)
            if missing <= self.kv.pool.num_free + self._num_zombie_blocks():
                return False
            behind = [m for m in self._members if m.request.order > progress.request.order]
            victim = max((m for m in behind if m not in in_step), key=lambda m: m.request.order, default=None)
            if victim is None:
                self._evict(progress, group)
                return False
            self._evict(victim, group)
        if new:
            group.new_blocks.append(SlotBlocks(progress.request.slot, new))
        return True

    def _num_zombie_blocks(self) -> int:
        return sum(block.ref_count == 1 for zombie in self._zombies for block in zombie.blocks)

    def _be_idle(self, progress: DraftProgress, last: int, group: DraftGroup) -> None:
        """No drafts in this step. Who makes none for long, or cannot any more, gives its blocks back."""
        if progress.blocks is None:
            return
        progress.num_idle_steps += 1
        if progress.num_idle_steps > _IDLE_STEPS or last >= self.max_len:
            self._forget_slot(progress, group)
            self._drop(progress)

    # ------------------------------------------------------------------ leaving

    def leave(self, request: Request) -> None:
        """A request stops running, or its slot is rebuilt: what the device held of it is gone."""
        progress = request.draft_progress
        request.draft_progress = None
        if progress is not None and progress.blocks is not None:
            self._drop(progress)

    def _evict(self, progress: DraftProgress, group: DraftGroup) -> None:
        self.stats.num_evictions += 1
        self._forget_slot(progress, group)
        self._drop(progress)

    def _forget_slot(self, progress: DraftProgress, group: DraftGroup) -> None:
        """The slot goes on without the draft model; what this step had sent for it is taken back."""
        slot = progress.request.slot
        entered = [entry for entry in group.entered if entry.slot == slot]
        if entered:
            group.entered.remove(entered[0])
        else:
            group.left.append(slot)

    def _drop(self, progress: DraftProgress) -> None:
        blocks = progress.blocks
        assert blocks is not None
        self._members.discard(progress)
        progress.blocks = None
        progress.num_idle_steps = 0
        progress.after_round = False
        progress.num_computed_tokens = blocks.num_registered_blocks * self.kv.block_size
        for step in progress.unread:
            step.catch_up, step.round = 0, _Round.NO
        if blocks.num_inflight_steps:
            self._zombies.add(blocks)
        else:
            self.kv.release(blocks)

    # ------------------------------------------------------------------ a step was read

    def read(self, request: Request, drafted_by_model: bool) -> bool:
        """The oldest unread step of a request that sampled in it was read, its tokens were taken.

        `drafted_by_model`: the drafts made at its end are the draft model's. Returns the same of the
        drafts that it verified.
        """
        progress = request.draft_progress
        if progress is None:  # it ended, or left its slot
            return False
        step = progress.unread.popleft()
        was_from_model = progress.from_model
        num_tokens = request.num_tokens
        if progress.after_round:
            progress.num_computed_tokens = max(progress.num_computed_tokens, num_tokens - 2)
        progress.num_computed_tokens = min(progress.num_computed_tokens + step.catch_up, num_tokens - 1)
        made = step.round is _Round.YES or (step.round is _Round.MAYBE and drafted_by_model)
        progress.after_round = progress.from_model = made
        if made:
            progress.num_computed_tokens = num_tokens
        if progress.blocks is not None and request.status is Status.RUNNING:
            self.kv.register(progress.blocks, progress.num_computed_tokens)
        return was_from_model

    def release(self, used: Iterable[DraftBlocks]) -> None:
        """A step that was launched with these blocks was read."""
        for blocks in used:
            blocks.num_inflight_steps -= 1
            if blocks in self._zombies and not blocks.num_inflight_steps:
                self._zombies.discard(blocks)
                self.kv.release(blocks)

    # ------------------------------------------------------------------ checks

    def check_integrity(self, running: Sequence[Request], launched: Iterable[Sequence[DraftBlocks]]) -> None:
        """Assert the invariants that hold between any two calls. For tests; O(everything)."""
        members = {r.draft_progress for r in running if r.draft_progress and r.draft_progress.blocks}
        assert members == self._members, "blocks of a request that does not run"
        holders = [m.blocks for m in self._members if m.blocks] + list(self._zombies)
        self.kv.check_integrity(holders)
        inflight: dict[DraftBlocks, int] = {}
        for used in launched:
            for blocks in used:
                inflight[blocks] = inflight.get(blocks, 0) + 1
        for holder in holders:
            assert holder.num_inflight_steps == inflight.pop(holder, 0), f"{holder.request}: in flight"
        assert not inflight, "blocks released while a launched step uses them"
        for zombie in self._zombies:
            assert zombie.num_inflight_steps, f"{zombie.request}: no zombie"
        for request in running:
            progress = request.draft_progress
            if progress is not None:
                assert progress.num_computed_tokens <= request.num_tokens, f"{request}: draft counter"


def _last_position(request: Request) -> int:
    """Position of the last known token after everything launched; at most."""
    return request.num_computed_tokens + request.num_inflight_tokens
