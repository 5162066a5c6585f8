"""The tensor-parallel group, as layers see it.

A group is injected when a layer is built and asked for nothing but its rank, its size and two
collectives; no layer looks at a process-wide state. So two ranks can be built, loaded and compared
in one process, and size 1 is the identity.
"""

from __future__ import annotations

from typing import Protocol

import torch


class TPGroup(Protocol):
    """Ranks that hold one model together."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; may be done in place."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors side by side along the last dimension, rank 0 first."""
        ...


class SingleRank:
    """The group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x"""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x"""
        return x


def shard_range(total: int, tp: TPGroup) -> range:
    """This rank's part of `total` rows or columns; sizes differ by at most one."""
    return range(total * tp.rank // tp.size, total * (tp.rank + 1) // tp.size)


def kv_head_range(num_kv_heads: int, tp: TPGroup) -> range:
    """The KV heads of this rank. With fewer heads than ranks, neighbouring ranks hold the same one."""
    if num_kv_heads >= tp.size:
        return shard_range(num_kv_heads, tp)
    head = tp.rank * num_kv_heads // tp.size
    return range(head, head + 1)
