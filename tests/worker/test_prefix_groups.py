"""Which requests share the beginning of their block tables."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.worker import prefix_groups
from octavo.worker.prefix_groups import Grouping, PrefixGroups, num_tiles

BLOCK, TILE, UNIT = 16, 8, 128


class Tables:
    """Requests with tables made of shared and of their own blocks."""

    def __init__(self) -> None:
        self.groups = PrefixGroups(64, 300, BLOCK, TILE, UNIT)
        self._next = 1

    def fresh(self, tokens: int) -> list[int]:
        blocks = list(range(self._next, self._next + tokens // BLOCK))
        self._next += len(blocks)
        return blocks

    def find(self, slots: list[int], starts: list[int], rows: list[int] | None = None) -> Grouping | None:
        return self.groups.find(
            np.array(slots, dtype=np.int32),
            np.array(rows or [1] * len(slots), dtype=np.int32),
            np.array(starts, dtype=np.int32),
        )


def test_one_prefix_is_cut_to_what_all_have_computed() -> None:
    tables = Tables()
    head = tables.fresh(2048)
    for slot in range(10):
        tables.groups.enter(slot, head + tables.fresh(64))
    found = tables.find(list(range(10)), [2112] * 10)
    assert found is not None
    assert found.lengths.tolist() == [2048] * 10
    assert found.tiles.tolist() == [[0, 2048], [0, 2048]]
    assert found.rows.tolist() == [*range(10), *[-1] * 6]
    assert len(found.tiles) <= num_tiles(10, TILE)
    # one of them has computed less of it: its rows would see keys that are not there yet
    found = tables.find(list(range(10)), [2112] * 9 + [1500])
    assert found is not None
    assert found.lengths.tolist() == [2048] * 9 + [0]


def test_the_deepest_groups_come_first() -> None:
    tables = Tables()
    head = tables.fresh(1024)
    deeper = head + tables.fresh(3072)
    for slot in range(12):
        tables.groups.enter(slot, (deeper if slot < 5 else head) + tables.fresh(32))
    tables.groups.enter(12, tables.fresh(4096))  # alone
    starts = [4096] * 5 + [1040] * 7 + [4096]
    found = tables.find(list(range(13)), starts, [2] * 13)
    assert found is not None
    assert found.lengths.tolist() == [4096] * 5 + [1024] * 7 + [0]
    assert sorted(row for row in found.rows.tolist() if row >= 0) == list(range(24))
    for index, (owner, tokens) in enumerate(found.tiles.tolist()):
        mine = [row // 2 for row in found.rows[index * TILE : (index + 1) * TILE].tolist() if row >= 0]
        assert {found.lengths[request] for request in mine} == {tokens}
        assert owner in (0, 5)


@pytest.mark.parametrize(("requests", "tokens"), [(3, 4096), (20, 256), (8, 1024)])
def test_little_is_left_alone(requests: int, tokens: int) -> None:
    tables = Tables()
    head = tables.fresh(tokens)
    for slot in range(requests):
        tables.groups.enter(slot, head + tables.fresh(32))
    assert tables.find(list(range(requests)), [tokens + 16] * requests) is None
    assert prefix_groups.LEAST_SAVED > 7 * 1024


def test_the_same_question_gets_the_same_answer_until_somebody_enters() -> None:
    tables = Tables()
    head = tables.fresh(4096)
    for slot in range(6):
        tables.groups.enter(slot, head + tables.fresh(32))
    slots, starts = list(range(6)), [4100] * 6
    first = tables.find(slots, starts)
    tables.groups.append(2, tables.fresh(16))
    assert first is not None
    assert tables.find(slots, starts) is first
    tables.groups.enter(3, tables.fresh(4128))  # another request took the slot
    again = tables.find(slots, starts)
    assert again is not None
    assert again.lengths.tolist() == [4096, 4096, 4096, 0, 4096, 4096]
