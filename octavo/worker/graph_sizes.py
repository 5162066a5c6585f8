"""The sizes that CUDA graphs are captured for, and which of them a step takes.

There are four kinds of graphs. In one every request has a row or two, as in decoding. Where drafts are made,
another is for steps that verify them: its attention packs the rows of a request together, which would be
slower for one row each. The third also holds chunks of prompts, for which attention takes a second launch a
layer; the last reads prefixes that requests share once for all of them, which takes another launch too.
There are fewer sizes of those.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

# A request of at most so many rows is one that decodes or verifies, or a chunk as short as that.
SHORT_ROWS = 16
_CHUNK_SIZES = (32, 64, 128, 256, 384)  # padded rows of steps with a chunk, below the largest
SHARED_SIZES = (16, 32, 64, 128, 256)  # padded rows of steps whose requests share prefixes
# Where drafts are made there are more kinds, and perhaps those of a draft model, so each has fewer sizes:
# those behind which a step takes longer, as measured. Padding rows read no KV, and products are cut for
# powers of two up to 64 rows, and nearly so up to 128.
_FEWER_CHUNK_SIZES = (64, 128, 256)
_FEWER_SHARED_SIZES = (16, 64, 256)
_DECODE_SIZES = (1, 2, 4, 6, 8, 16, 32, 64, 96, 128, 160, 192, 256)
_VERIFY_SIZES = (4, 6, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
# A draft model's chunks: a prompt or two of those who join. Longer ones hide their launches.
_CATCH_UP_SIZES = (640, 1280)


def graph_sizes(most: int) -> list[int]:
    """Padded numbers of rows, ascending: close together at first, at most a quarter apart later."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16]
    step = 8
    while sizes[-1] < most:
        if sizes[-1] >= 8 * step and step < 64:
            step *= 2
        sizes.append(sizes[-1] + step)
    return [size for size in sizes if size < most] + [most]


class GraphKey(NamedTuple):
    """What tells one graph from another."""

    rows: int
    has_chunk: bool  # a request may have more than SHORT_ROWS rows
    shares: bool = False  # prefixes may be shared
    is_long: bool = False  # of one row: for contexts that its other graph is not for
    verifies: bool = False  # requests have several rows as a rule, where others have one or two


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """The padded numbers of rows there are graphs for, ascending."""

    short: tuple[int, ...]  # of steps without a chunk
    chunks: tuple[int, ...]  # of steps in which a request has more than SHORT_ROWS rows
    shared: tuple[int, ...] = ()  # of steps without a chunk whose requests share prefixes
    verify: tuple[int, ...] = ()  # of short steps in which a request has more than `most_decoded` rows
    most_decoded: int = SHORT_ROWS

    @classmethod
    def up_to(cls, most: int, shares: bool = False) -> GraphSizes:
        """Up to `most` rows. `shares`: shared prefixes are read once."""
        sizes = cls.of(graph_sizes(most))
        if not shares:
            return sizes
        return cls(sizes.short, sizes.chunks, tuple(size for size in SHARED_SIZES if size <= most))

    @classmethod
    def with_drafts(cls, most: int, requests: int, most_decoded: int, shares: bool = False) -> GraphSizes:
        """The same with two kinds of short steps, of up to `requests` requests, and fewer of the others.

        Steps in which a request has more than `most_decoded` rows are those that verify.
        """
        whole = cls.up_to(most, shares)
        chunks = tuple(size for size in whole.chunks if size in (*_FEWER_CHUNK_SIZES, most))
        decoding = min(most, requests, _DECODE_SIZES[-1])
        return cls(
            _below(_DECODE_SIZES, decoding),
            chunks,
            tuple(size for size in whole.shared if size in _FEWER_SHARED_SIZES),
            _below(_VERIFY_SIZES, most),
            most_decoded,
        )

    @classmethod
    def of_a_draft_model(cls, most: int, catch_up: int) -> GraphSizes:
        """Passes of up to `most` rows, each size twice the one before; a few for chunks of up to `catch_up`.

        A padding row of a small model reads no KV, and products are cut for powers of two anyway.
        """
        short = [1]
        while 2 * short[-1] < most:
            short.append(2 * short[-1])
        chunks = _below(_CATCH_UP_SIZES, min(catch_up, _CATCH_UP_SIZES[-1]))
        return cls(tuple(sorted({*short, most})), chunks if catch_up > SHORT_ROWS else ())

    @classmethod
    def of(cls, sizes: Sequence[int]) -> GraphSizes:
        """These sizes for short steps, and fewer up to the same number of rows for those with a chunk."""
        short = tuple(sorted(sizes))
        return cls(short, ()).with_chunks(short[-1])

    def with_chunks(self, most: int) -> GraphSizes:
        """The same, and chunks in steps of up to `most` rows."""
        chunks = {size for size in (*_CHUNK_SIZES, most) if SHORT_ROWS < size <= most}
        return replace(self, chunks=tuple(sorted(chunks.union(self.chunks))))

    @property
    def largest(self) -> int:
        """Rows of the largest step without a chunk."""
        return max(*self.short, *self.verify)

    @property
    def keys(self) -> list[GraphKey]:
        """All graphs of these sizes."""
        return [
            *(GraphKey(size, False) for size in self.short),
            *(GraphKey(size, False, verifies=True) for size in self.verify),
            *(GraphKey(size, True) for size in self.chunks),
            *(GraphKey(size, False, True) for size in self.shared),
        ]

    def graph_for(self, num_tokens: int, longest: int = 1, shares: bool = False) -> GraphKey | None:
        """The graph of a step whose longest request has `longest` rows; None: none is that large."""
        has_chunk = longest > SHORT_ROWS
        if shares:
            sizes = () if has_chunk else self.shared
        elif has_chunk:
            sizes = self.chunks
        elif self.verify and (longest > self.most_decoded or num_tokens > self.short[-1]):
            sizes = self.verify
        else:
            sizes = self.short
        index = bisect_left(sizes, num_tokens)
        if index == len(sizes):
            return None
        return GraphKey(sizes[index], has_chunk, shares, verifies=sizes is self.verify)

    def padded(self, num_tokens: int, longest: int = 1, shares: bool = False) -> int | None:
        """Rows that such a step is padded to; None: no graph is that large."""
        key = self.graph_for(num_tokens, longest, shares)
        return None if key is None else key.rows


def _below(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """Those of the sizes that are below `most`, and that."""
    return (*(size for size in sizes if size < most), most)
