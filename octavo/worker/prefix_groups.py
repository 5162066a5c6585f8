"""Which requests of a step share the beginning of their block tables, so that it is read once for all.

A block holds one content: the tokens of its own and of all blocks before it. So two requests whose tables
have the same block at one place have the same blocks before it, and looking at one column of the tables
finds groups. The deepest columns are asked first. The host keeps its own copy of the tables for this, and
looks again only when requests enter or other ones run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

LEAST_TOKENS = 512  # of a prefix
LEAST_REQUESTS = 4
LEAST_SAVED = 8192  # tokens that need not be read again, or another launch a layer costs more than it saves
MOST_GROUPS = 8


@dataclass(frozen=True, slots=True)
class Grouping:
    """See octavo.attention.backend.SharedPrefixes."""

    lengths: Ints  # [num_reqs]
    rows: Ints  # [tiles * rows of a tile]
    tiles: Ints  # [tiles, 2]


class PrefixGroups:
    """The host's copy of the block tables, and the groups in them."""

    def __init__(self, num_slots: int, max_blocks: int, block_size: int, tile_rows: int, unit: int) -> None:
        """`tile_rows`: token rows of a tile. `unit`: a prefix is cut to a multiple of so many tokens."""
        self._table = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(num_slots, dtype=np.int64)
        self._block_size = block_size
        self._tile_rows = tile_rows
        self._unit = unit
        self._version = 0
        self._asked: tuple[int, bytes] | None = None
        self._found: Grouping | None = None

    def enter(self, slot: int, block_ids: Sequence[int]) -> None:
        """A request takes a slot."""
        self._num_blocks[slot] = 0
        self.append(slot, block_ids)
        self._version += 1

    def append(self, slot: int, block_ids: Sequence[int]) -> None:
        """A request's table grows, by blocks of its own."""
        first = int(self._num_blocks[slot])
        self._table[slot, first : first + len(block_ids)] = block_ids
        self._num_blocks[slot] += len(block_ids)

    def find(self, slots: Ints, num_rows: Ints, starts: Ints) -> Grouping | None:
        """The groups among these requests, or None; the same object as long as nothing changes.

        `starts`: a position of each request before which all its tokens are computed.
        """
        asked = self._version, slots.tobytes() + num_rows.tobytes() + starts.tobytes()
        if asked != self._asked:
            self._asked, self._found = asked, self._search(slots, num_rows, starts)
        return self._found

    def _search(self, slots: Ints, num_rows: Ints, starts: Ints) -> Grouping | None:
        known = np.minimum(self._num_blocks[slots] * self._block_size, starts)
        if np.count_nonzero(known >= LEAST_TOKENS) < LEAST_REQUESTS:
            return None
        lengths = np.zeros(len(slots), dtype=np.int32)
        groups: list[tuple[int, Ints]] = []  # tokens, members
        depth = LEAST_TOKENS << int(known.max() // LEAST_TOKENS).bit_length() - 1
        while depth >= LEAST_TOKENS and len(groups) < MOST_GROUPS:
            free = np.flatnonzero((lengths == 0) & (known >= depth)).astype(np.int32)
            column = self._table[slots[free], depth // self._block_size - 1]
            blocks, counts = np.unique(column, return_counts=True)
            for block in blocks[counts >= LEAST_REQUESTS][: MOST_GROUPS - len(groups)]:
                members = free[column == block]
                tokens = self._common(slots[members], int(known[members].min()))
                lengths[members] = tokens
                groups.append((tokens, members))
            depth //= 2
        if sum(tokens * (len(members) - 1) for tokens, members in groups) < LEAST_SAVED:
            return None
        first_rows = np.cumsum(num_rows) - num_rows
        rows, tiles = [], []
        for tokens, members in groups:
            mine = np.concatenate([first_rows[m] + np.arange(num_rows[m]) for m in members])
            count = -(-len(mine) // self._tile_rows)
            padded = np.full(count * self._tile_rows, -1, dtype=np.int32)
            padded[: len(mine)] = mine
            rows.append(padded)
            tiles.append(np.tile(np.array([[slots[members[0]], tokens]], dtype=np.int32), (count, 1)))
        return Grouping(lengths, np.concatenate(rows), np.concatenate(tiles))

    def _common(self, slots: Ints, most: int) -> int:
        """Tokens of the prefix that all of these have, at most so many."""
        width = most // self._block_size
        same = (self._table[slots, :width] == self._table[slots[0], :width]).all(axis=0)
        blocks = width if same.all() else int(same.argmin())
        return blocks * self._block_size // self._unit * self._unit


def num_tiles(num_rows: int, tile_rows: int) -> int:
    """Tiles that the groups of a step of so many rows take at most."""
    return num_rows // tile_rows + MOST_GROUPS
