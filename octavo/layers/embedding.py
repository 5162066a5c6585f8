"""The vocabulary's table, read by rows at the bottom of a model and multiplied at its top.

One class serves token embedding, output head, and both at once where a model ties them: then there
is one matrix, packed for the head in a form whose rows can still be read. The vocabulary is cut
among the ranks in equal parts, padded with zero rows at the end; `logits` cuts the padding off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from octavo.layers.checkpoint import CheckpointTensor
from octavo.layers.linear import Placement
from octavo.layers.ops import EmbeddingTable, Kernels
from octavo.quantization.base import PackedLinear, ShardId, Weight


class VocabTable:
    """[vocab, hidden], used as embedding, as head, or as both."""

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, place: Placement, *, embeds: bool, heads: bool
    ) -> None:
        self._name = name
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self._place = place
        self._embeds = embeds
        self._heads = heads
        per_rank = -(-vocab_size // place.tp.size)
        self._first = min(per_rank * place.tp.rank, vocab_size)
        self._rows = min(per_rank, vocab_size - self._first)  # without padding
        self.weight = Weight((per_rank, hidden_size), place.dtype, place.device, self.weight_loader)
        self.packed: PackedLinear | None = None

    def weight_loader(self, param: Weight, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's rows; padding rows are zero."""
        target = param.allocate()
        target[: self._rows].copy_(loaded[self._first : self._first + self._rows])
        target[self._rows :].zero_()

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """The table."""
        shape = (self.vocab_size, self.hidden_size)
        yield CheckpointTensor(f"{self._name}.weight", shape, self.weight, None, self)

    def after_load(self, ops: Kernels) -> None:
        """Pack what is multiplied; a table that is only read stays plain."""
        if self._heads:
            self.packed = ops.pack(self.weight.value(), None, "tied" if self._embeds else "head")
            self.weight.tensor = None

    @property
    def table(self) -> EmbeddingTable:
        """What `Kernels.embedding` reads."""
        return self.weight.value() if self.packed is None else self.packed

    def embed(self, input_ids: torch.Tensor, ops: Kernels) -> torch.Tensor:
        """[num_tokens] int64 -> [num_tokens, hidden]"""
        tp = self._place.tp
        if tp.size == 1:
            return ops.embedding(input_ids, self.table)
        local = input_ids - self._first
        mine = (local >= 0) & (local < self._rows)
        rows = ops.embedding(torch.where(mine, local, 0), self.table)
        return tp.all_reduce(rows * mine.unsqueeze(-1))

    def logits(self, hidden: torch.Tensor, ops: Kernels) -> torch.Tensor:
        """[n, hidden] -> [n, vocab_size] float32"""
        assert self.packed is not None
        local = ops.linear(hidden, self.packed, torch.float32)
        return self._place.tp.all_gather(local)[:, : self.vocab_size]
