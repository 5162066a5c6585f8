"""Blocks: reference counts, LRU order, exact prefixes."""

from __future__ import annotations

import pytest

from octavo.core.block_pool import BlockPool


def ids(blocks: object) -> list[int]:
    return [block.block_id for block in blocks]  # type: ignore[attr-defined]


def test_blocks_are_reused_in_the_order_they_were_released() -> None:
    pool = BlockPool(4)
    blocks = pool.take(4)
    pool.release([blocks[2], blocks[0], blocks[3], blocks[1]])
    assert ids(pool.take(4)) == [2, 0, 3, 1]
    pool.check_integrity()


def test_a_cached_block_is_revived_by_a_hit_and_lost_when_taken() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.register([block], "root", [(1, 2)])
    pool.release([block])
    assert pool.num_free == 2
    found = pool.lookup("root", (1, 2))
    assert found is block
    pool.share([block])
    assert pool.num_free == 1
    pool.release([block])
    pool.take(2)
    assert pool.lookup("root", (1, 2)) is None
    pool.check_integrity()


def test_a_prefix_is_its_parent_and_its_tokens() -> None:
    pool = BlockPool(4)
    a, b, c = pool.take(3)
    first = pool.register([a], "root", [(1,)])
    other = pool.register([b], "root", [(2,)])
    assert pool.register([c], first, [(3,)]) not in (first, other)
    assert pool.lookup(first, (3,)) is c
    assert pool.lookup(other, (3,)) is None
    assert pool.lookup("another root", (1,)) is None


def test_tokens_with_equal_hashes_are_told_apart() -> None:
    assert hash((1, -1)) == hash((1, -2))  # CPython: hash(-1) == hash(-2)
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.register([block], "root", [(1, -1)])
    assert pool.lookup("root", (1, -2)) is None


def test_a_duplicate_leaves_the_first_one_registered() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2)
    serial = pool.register([first], "root", [(1,)])
    assert pool.register([second], "root", [(1,)]) == serial
    assert pool.lookup("root", (1,)) is first
    assert second.key is None
    pool.check_integrity()


def test_a_recomputed_prefix_gets_a_new_name() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1)
    old = pool.register([block], "root", [(1,)])
    pool.release([block])
    (block,) = pool.take(1)
    assert pool.register([block], "root", [(1,)]) != old  # what followed the old one is unreachable


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="wanted"):
        pool.take(3)
    with pytest.raises(AssertionError, match="free"):
        pool.register([blocks[0]], "root", [(1,)])


def test_integrity_notices_damage() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2)
    blocks[0].ref_count = 0
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity()
