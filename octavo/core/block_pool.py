"""KV blocks: who uses each, which are free, and which hold a prefix that can be reused.

A block is in one of three states. *Used*: its reference count is positive. *Cached*: nobody uses
it, but it still holds a registered prefix, so it waits in the free list and can be revived by a
hit. *Free*: nobody uses it and it holds nothing worth having. Free and cached blocks share one
doubly linked list, least recently used first, so taking, reviving and returning a block are O(1).

A registered block is found by (parent, tokens): `parent` is the *serial* of the block before it,
a number given at registration and never reused, or the root key of its namespace. The
dictionary compares the token ids themselves, so that a hit is exact: equal hashes of different
texts cannot be mistaken for each other, by accident or on purpose.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeAlias

# What stands before a block: the serial of its parent, or the root of a namespace.
ParentKey: TypeAlias = Hashable
PrefixKey: TypeAlias = tuple[ParentKey, tuple[int, ...]]


class Block:
    """One KV block. `serial` is the name of the prefix that ends here, if it is registered."""

    __slots__ = ("block_id", "key", "next", "prev", "ref_count", "serial")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.key: PrefixKey | None = None
        self.serial = -1
        self.prev: Block | None = None
        self.next: Block | None = None

    def __repr__(self) -> str:
        return f"Block({self.block_id}, ref_count={self.ref_count}, serial={self.serial})"


class BlockPool:
    """All blocks of one KV cache.

    Raises AssertionError when it is misused (a free block freed, more taken than there are):
    that is a bug of the caller, never a matter of load.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.num_free = 0  # free and cached ones
        self._registered: dict[PrefixKey, Block] = {}
        self._next_serial = 0
        # A sentinel closes the list to a ring: no special cases at the ends.
        self._ring = Block(-1)
        self._ring.prev = self._ring.next = self._ring
        for block in self.blocks:
            self._append_free(block)

    @property
    def num_used(self) -> int:
        """Blocks that some request uses."""
        return len(self.blocks) - self.num_free

    def take(self, count: int) -> list[Block]:
        """Take `count` blocks, least recently used first; what they cached is forgotten."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        taken = []
        block = self._ring.next
        for _ in range(count):  # a long prompt takes hundreds: the ring is closed once, behind them all
            assert block is not None
            if block.key is not None:
                self._forget(block)
            block.ref_count = 1
            taken.append(block)
            following = block.next
            block.prev = block.next = None
            block = following
        assert block is not None
        self._ring.next, block.prev = block, self._ring
        self.num_free -= count
        return taken

    def share(self, blocks: Iterable[Block]) -> None:
        """Add a user to each block; a cached one leaves the free list."""
        for block in blocks:
            if block.ref_count == 0:
                self._unlink(block)
            block.ref_count += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """Drop a user from each block, in the order in which they should be reused."""
        for block in blocks:
            assert block.ref_count > 0, f"{block} released twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._append_free(block)

    def lookup(self, parent: ParentKey, tokens: tuple[int, ...]) -> Block | None:
        """The block that holds `tokens` after `parent`, if there is one."""
        return self._registered.get((parent, tokens))

    def register(
        self, blocks: Iterable[Block], parent: ParentKey, texts: Iterable[tuple[int, ...]]
    ) -> ParentKey:
        """Make blocks findable, one behind the other, and return the serial of the prefix that they end.

        If another block holds the same prefix already, that one stays the registered one and its
        serial counts: the duplicate is left to its user, so that block tables only ever grow.
        """
        registered = self._registered
        for block, tokens in zip(blocks, texts, strict=True):
            key = (parent, tokens)
            known = registered.setdefault(key, block)
            if known is block and block.key is None:
                assert block.ref_count > 0, f"{block} registered while free"
                block.key, block.serial = key, self._next_serial
                self._next_serial += 1
            assert known.key == key, f"{block} registered twice"
            parent = known.serial
        return parent

    def check_integrity(self) -> None:
        """Assert that every block is in exactly one state and that all links agree. O(blocks)."""
        seen: set[int] = set()
        previous, block = self._ring, self._ring.next
        while block is not self._ring:
            assert block is not None
            assert block.prev is previous, f"{block}: broken link"
            assert block.ref_count == 0, f"{block} is in use and in the free list"
            assert block.block_id not in seen, f"{block} is in the free list twice"
            seen.add(block.block_id)
            previous, block = block, block.next
        assert len(seen) == self.num_free, f"num_free is {self.num_free}, the list holds {len(seen)}"
        for block in self.blocks:
            assert block.ref_count >= 0, f"{block}: negative reference count"
            assert (block.ref_count == 0) == (block.block_id in seen), f"{block} is lost"
            assert (block.key is None) == (block.serial < 0), f"{block}: key and serial disagree"
            if block.key is not None:
                assert self._registered.get(block.key) is block, f"{block} is not found by its key"
        assert all(b.key == key for key, b in self._registered.items()), "a stale registration"

    def _forget(self, block: Block) -> None:
        assert block.key is not None
        del self._registered[block.key]
        block.key, block.serial = None, -1

    def _append_free(self, block: Block) -> None:
        last = self._ring.prev
        assert last is not None
        last.next, block.prev, block.next, self._ring.prev = block, last, self._ring, block
        self.num_free += 1

    def _unlink(self, block: Block) -> None:
        before, after = block.prev, block.next
        assert before is not None
        assert after is not None
        before.next, after.prev = after, before
        block.prev = block.next = None
        self.num_free -= 1
