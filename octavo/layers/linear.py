"""Linear layers that know their shard of the matrix.

`ColumnParallelLinear` cuts the outputs among the ranks, `RowParallelLinear` the inputs (and sums
the partial results). `QKVParallelLinear` and `MergedColumnParallelLinear` are column-parallel
layers whose matrix is several matrices of the checkpoint, one below the other, so that one call
computes them all; `GateUpLinear` multiplies its two halves as well. Each layer's weights carry the
loader that puts a piece of the checkpoint in its place; the tensors themselves belong to the
layer's `QuantMethod`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.layers.checkpoint import CheckpointTensor
from octavo.layers.ops import Kernels
from octavo.layers.parallel import TPGroup, kv_head_range, shard_range
from octavo.quantization.base import PackUse, QuantMethod, ShardId, Weight, copy_whole


@dataclass(frozen=True)
class Placement:
    """Everything a layer's tensors need to know at construction, the same for a whole model."""

    dtype: torch.dtype
    device: torch.device
    tp: TPGroup
    quant: QuantMethod


@dataclass(frozen=True)
class _Piece:
    """One matrix of the checkpoint inside a column-parallel layer."""

    name: str  # of the module in the checkpoint, such as model.layers.0.self_attn.q_proj
    full_rows: int
    rows: range  # this rank's rows of it
    start: int  # where they begin in this rank's matrix


class _Linear:
    """What all linear layers share: their tensors, and the call into the weight format."""

    def __init__(self, in_features: int, out_features: int, place: Placement) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.place = place
        self.weights: dict[str, Weight] = {}
        self.packed: Any = None

    def _pack(self, ops: Kernels, bias: torch.Tensor | None, use: PackUse = "matrix") -> None:
        self.place.quant.after_load(self, ops, bias, use)

    def _loaded_bias(self) -> torch.Tensor | None:
        bias = self.weights.get("bias")
        return None if bias is None else bias.value()


class ColumnParallelLinear(_Linear):
    """y = x W^T + b with the rows of W cut among the ranks; the outputs stay cut."""

    use: PackUse = "matrix"

    def __init__(
        self, pieces: Mapping[ShardId, _Piece], in_features: int, bias: bool, place: Placement
    ) -> None:
        super().__init__(in_features, sum(len(piece.rows) for piece in pieces.values()), place)
        self._pieces = dict(pieces)
        shard_ids = tuple(pieces)
        place.quant.create_weights(self, place.dtype, place.device, self.weight_loader, shard_ids)
        if bias:
            self.weights["bias"] = Weight(
                (self.out_features,), place.dtype, place.device, self.weight_loader, shard_ids
            )

    @classmethod
    def single(cls, name: str, in_features: int, out_features: int, bias: bool, place: Placement) -> Any:
        """A layer that is one matrix of the checkpoint."""
        rows = shard_range(out_features, place.tp)
        return cls({None: _Piece(name, out_features, rows, 0)}, in_features, bias, place)

    def weight_loader(self, param: Weight, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's rows of one matrix (or bias) of the checkpoint into place."""
        piece = self._pieces[shard_id]
        target = param.allocate()[piece.start : piece.start + len(piece.rows)]
        target.copy_(loaded[piece.rows.start : piece.rows.stop])

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """weight, and bias, of every piece."""
        for shard_id, piece in self._pieces.items():
            for suffix, weight in self.weights.items():
                shape = (piece.full_rows, *weight.shape[1:])
                yield CheckpointTensor(f"{piece.name}.{suffix}", shape, weight, shard_id, self)

    def after_load(self, ops: Kernels) -> None:
        """Pack the matrix together with the bias."""
        self._pack(ops, self._loaded_bias(), self.use)

    def forward(self, x: torch.Tensor, ops: Kernels) -> torch.Tensor:
        """[num_tokens, in] -> [num_tokens, this rank's out]"""
        return self.place.quant.apply(self, ops, x)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several matrices of the same input as one; shard_id is the index. Each is cut by itself."""

    def __init__(
        self, names: list[str], in_features: int, out_features: list[int], bias: bool, place: Placement
    ) -> None:
        pieces: dict[ShardId, _Piece] = {}
        start = 0
        for index, (name, rows_of_one) in enumerate(zip(names, out_features, strict=True)):
            rows = shard_range(rows_of_one, place.tp)
            pieces[index] = _Piece(name, rows_of_one, rows, start)
            start += len(rows)
        super().__init__(pieces, in_features, bias, place)


class GateUpLinear(MergedColumnParallelLinear):
    """Gate and up projections as one, and their product: silu(gate) * up."""

    use = "gate_up"


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections as one, cut at whole heads; shard_id is "q", "k" or "v".

    Key and value heads are replicated where there are fewer of them than ranks.
    """

    def __init__(
        self,
        prefix: str,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        place: Placement,
    ) -> None:
        heads = {"q": shard_range(num_heads, place.tp)}
        heads["k"] = heads["v"] = kv_head_range(num_kv_heads, place.tp)
        totals = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}
        pieces: dict[ShardId, _Piece] = {}
        start = 0
        for shard_id, mine in heads.items():
            rows = range(mine.start * head_dim, mine.stop * head_dim)
            name = f"{prefix}.{shard_id}_proj"
            pieces[shard_id] = _Piece(name, totals[shard_id] * head_dim, rows, start)
            start += len(rows)
        self.num_heads = len(heads["q"])  # on this rank
        self.num_kv_heads = len(heads["k"])  # on this rank
        self.head_dim = head_dim
        super().__init__(pieces, in_features, bias, place)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[num_tokens, out] -> views q, k, v of [num_tokens, heads, head_dim]."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        first_v = self.num_heads + self.num_kv_heads
        return heads[:, : self.num_heads], heads[:, self.num_heads : first_v], heads[:, first_v:]


class RowParallelLinear(_Linear):
    """y = x W^T + b with the columns of W, and x, cut among the ranks; the result is summed.

    `columns` is this rank's range of the inputs: the outputs of the layer before it.
    """

    def __init__(
        self, name: str, in_features: int, columns: range, out_features: int, bias: bool, place: Placement
    ) -> None:
        super().__init__(len(columns), out_features, place)
        self._name = name
        self._full_in = in_features
        self._columns = columns
        self._late_bias: torch.Tensor | None = None
        place.quant.create_weights(self, place.dtype, place.device, self.weight_loader, (None,))
        if bias:
            self.weights["bias"] = Weight((out_features,), place.dtype, place.device, copy_whole)

    def weight_loader(self, param: Weight, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's columns."""
        param.allocate().copy_(loaded[:, self._columns.start : self._columns.stop])

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """weight, and bias."""
        for suffix, weight in self.weights.items():
            shape = weight.shape if suffix == "bias" else (self.out_features, self._full_in)
            yield CheckpointTensor(f"{self._name}.{suffix}", shape, weight, None, self)

    def after_load(self, ops: Kernels) -> None:
        """Pack the matrix. The bias is added once, not once a rank: after the sum, if there is one."""
        bias = self._loaded_bias()
        self._late_bias = bias if self.place.tp.size > 1 else None
        self._pack(ops, bias if self.place.tp.size == 1 else None)

    def forward(self, x: torch.Tensor, ops: Kernels) -> torch.Tensor:
        """[num_tokens, this rank's in] -> [num_tokens, out], whole on every rank"""
        y = self.place.tp.all_reduce(self.place.quant.apply(self, ops, x))
        return y if self._late_bias is None else y + self._late_bias
