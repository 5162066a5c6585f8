"""How a layer tells the file reader which tensors it waits for.

Every loadable layer lists the checkpoint's tensors by their full name, with the shape they have in
the file, and says where they go. The reader matches names against that list: what is not on it is
unexpected, what was not crossed off at the end is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from octavo.layers.ops import Kernels
from octavo.quantization.base import ShardId, Weight


class Loadable(Protocol):
    """A layer that owns tensors of the checkpoint."""

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """All tensors of this layer in the checkpoint."""
        ...

    def after_load(self, ops: Kernels) -> None:
        """All of them are in: pack, and drop what is not needed any more."""
        ...


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of the checkpoint and its place in the model."""

    name: str
    shape: tuple[int, ...]  # in the file, before any sharding
    weight: Weight
    shard_id: ShardId
    layer: Loadable
