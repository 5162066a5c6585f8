"""Which blocks each request holds: prefix hits, growth, registration, release.

The ranges of one request, in tokens:

    |<------------------ token_ids ------------------>|
    |<- hit ->|<- computed ->|<- inflight ->|<- rows ->|          <- what this step schedules
    |<------------- capacity = blocks x block_size ------------->|
    |<- registered (full blocks of confirmed tokens) ->|

A full block of confirmed tokens is registered as soon as the rows that fill it are *scheduled*:
every layer stores its keys and values before it reads any, and steps run in order, so a request
scheduled later, in the same step even, may already read them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from octavo.core.block_pool import Block, BlockPool


class BlockHolder(Protocol):
    """A request as seen from here. The manager alone changes the last four."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def cache_namespace(self) -> Hashable | None: ...
    @property
    def read_cache(self) -> bool: ...

    blocks: list[Block]
    capacity: int  # tokens the blocks hold
    num_registered_blocks: int
    prefix_parent: Hashable


class KVCacheManager:
    """The block tables of all requests over one `BlockPool`: the target's, or the draft model's."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.num_prefix_queries = 0  # tokens looked up at admissions
        self.num_prefix_hits = 0  # tokens found

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return self.pool.num_used / len(self.pool.blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: BlockHolder) -> list[Block]:
        """The longest run of registered blocks that `request` begins with.

        It never covers the last known token: that one has to be computed to draw the next.
        """
        if request.cache_namespace is None or not request.read_cache:
            return []
        size, token_ids = self.block_size, request.token_ids
        found: list[Block] = []
        parent: object = ("root", request.cache_namespace)
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            block = self.pool.lookup(parent, tuple(token_ids[start : start + size]))
            if block is None:
                break
            found.append(block)
            parent = block.serial
        return found

    def knows_beginning(self, request: BlockHolder) -> bool:
        """True if the first block at least would be found; how many more is not looked up."""
        if (
            request.cache_namespace is None
            or not request.read_cache
            or len(request.token_ids) <= self.block_size
        ):
            return False
        first = tuple(request.token_ids[: self.block_size])
        return self.pool.lookup(("root", request.cache_namespace), first) is not None

    def num_free_after(self, prefix: list[Block]) -> int:
        """Free blocks left once `prefix` is shared: reviving a cached block uses up a free one."""
        return self.pool.num_free - sum(block.ref_count == 0 for block in prefix)

    def admit(self, request: BlockHolder, prefix: list[Block]) -> None:
        """Give `request`, which holds nothing, the blocks of its prefix."""
        assert not request.blocks, f"{request} holds blocks already"
        self.pool.share(prefix)
        request.blocks = list(prefix)
        request.capacity = len(prefix) * self.block_size
        request.num_registered_blocks = len(prefix)
        request.prefix_parent = prefix[-1].serial if prefix else ("root", request.cache_namespace)
        if request.cache_namespace is not None and request.read_cache:
            self.num_prefix_queries += len(request.token_ids)
            self.num_prefix_hits += request.capacity

    def grow(self, request: BlockHolder, num_tokens: int) -> list[int] | None:
        """Make the blocks of `request` hold `num_tokens`.

        Returns the ids of the new blocks (none needed: an empty list), or None, and changes
        nothing, if there are not enough free ones.
        """
        missing = self.blocks_for(num_tokens) - len(request.blocks)
        if missing <= 0:
            return []
        if missing > self.pool.num_free:
            return None
        new = self.pool.take(missing)
        request.blocks += new
        request.capacity = len(request.blocks) * self.block_size
        return [block.block_id for block in new]

    def register(self, request: BlockHolder, num_tokens: int) -> None:
        """Register the full blocks of the first `num_tokens` confirmed tokens.

        The KV of these tokens is computed by steps that were launched or are being scheduled.
        """
        size = self.block_size
        full = num_tokens // size
        if request.cache_namespace is None or full <= request.num_registered_blocks:
            return
        known = request.num_registered_blocks
        tokens = iter(request.token_ids[known * size : full * size])
        request.prefix_parent = self.pool.register(
            request.blocks[known:full],
            request.prefix_parent,
            zip(*[tokens] * size, strict=True),  # the tokens of each block; all of them are confirmed
        )
        request.num_registered_blocks = full

    def release(self, request: BlockHolder) -> None:
        """Take back all blocks. The last ones go first, so a prefix outlives what follows it."""
        self.pool.release(reversed(request.blocks))
        request.blocks = []
        request.capacity = 0
        request.num_registered_blocks = 0

    def check_integrity(self, requests: Sequence[BlockHolder]) -> None:
        """Assert that the pool is sound and that reference counts equal the tables of `requests`."""
        self.pool.check_integrity()
        users = [0] * len(self.pool.blocks)
        for request in requests:
            assert request.capacity == len(request.blocks) * self.block_size, f"{request}: capacity"
            for block in request.blocks:
                users[block.block_id] += 1
        for block in self.pool.blocks:
            assert block.ref_count == users[block.block_id], f"{block} has {users[block.block_id]} users"
