"""How a linear layer keeps its weight: the seam between layers and weight formats.

A layer knows its shape and its shard; a `QuantMethod` knows the tensors that hold the numbers.
The layer calls three methods: `create_weights` when it is built, `after_load` once all pieces of
its tensors are in (pack them for the kernels, drop the originals), and `apply` in every forward.

A `Weight` is a tensor that is announced at construction and gets memory only when its first piece
arrives, so that a model under construction costs nothing and a packed layer never stands beside
two plain ones. It knows which pieces it waits for, and its `weight_loader` copies each into place:
the file reader knows no layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

ShardId = str | int | None
WeightLoader = Callable[["Weight", torch.Tensor, ShardId], None]


# What a packed weight is for:
#   matrix    products in the model's dtype
#   gate_up   gate rows above up rows; the product wanted is silu(gate) * up
#   head      logits: products wanted in float32, unrounded where the kernels can
#   tied      head, whose single rows are read too because it is the embedding as well
PackUse = Literal["matrix", "gate_up", "head", "tied"]


class PackedLinear(Protocol):
    """A weight, and its bias, in the layout its kernels want. Only the ops that packed it look inside."""

    @property
    def nbytes(self) -> int: ...


class LinearOps(Protocol):
    """What a weight format needs from the kernels (the whole set is octavo.layers.ops.Kernels)."""

    def pack(
        self,
        weight: torch.Tensor,  # [out, in]
        bias: torch.Tensor | None = None,  # [out]
        use: PackUse = "matrix",
    ) -> PackedLinear:
        """Pack for `linear`. The plain tensors may be dropped afterwards."""
        ...

    def linear(
        self,
        x: torch.Tensor,  # [num_tokens, in]
        packed: PackedLinear,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """x W^T + bias: [num_tokens, out], in x's dtype unless `out_dtype` says otherwise.

        For a weight packed as gate_up: silu(gate) * up, [num_tokens, out / 2].
        """
        ...


def copy_whole(weight: Weight, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
    """The weight_loader of an unsharded tensor."""
    weight.allocate().copy_(loaded)


class Weight:
    """One tensor of a layer on this rank. `tensor` is None before the first piece and after packing."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        weight_loader: WeightLoader = copy_whole,
        shard_ids: tuple[ShardId, ...] = (None,),
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.weight_loader = weight_loader
        self.shard_ids = shard_ids
        self.tensor: torch.Tensor | None = None

    def allocate(self) -> torch.Tensor:
        """The tensor, made when first asked for. Contents are undefined until loaded."""
        if self.tensor is None:
            self.tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.tensor

    def load(self, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy one piece of the checkpoint, whole or this rank's share of it, into place."""
        self.weight_loader(self, loaded, shard_id)

    def is_verbatim(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """True if a tensor of that form is this weight byte for byte, so that a file can be read into it.

        A weight of one piece whose shape is the checkpoint's is not sharded: its loader only copies.
        """
        same_form = shape == self.shape and dtype == self.dtype
        return same_form and self.device.type == "cpu" and self.shard_ids == (None,)

    def value(self) -> torch.Tensor:
        """The loaded tensor."""
        if self.tensor is None:
            raise RuntimeError("a weight is used before it was loaded, or after it was packed")
        return self.tensor


class LinearShape(Protocol):
    """What a QuantMethod sees of a linear layer."""

    in_features: int  # on this rank
    out_features: int  # on this rank
    weights: dict[str, Weight]  # by the suffix of the tensor's name in the checkpoint: weight, bias, …
    packed: Any  # what after_load made of them; only the method looks inside


class QuantMethod(Protocol):
    """One weight format."""

    def create_weights(
        self,
        layer: LinearShape,
        dtype: torch.dtype,
        device: torch.device,
        weight_loader: WeightLoader,
        shard_ids: tuple[ShardId, ...],
    ) -> None:
        """Announce the tensors that hold the layer's matrix in `layer.weights`."""
        ...

    def after_load(self, layer: LinearShape, ops: LinearOps, bias: torch.Tensor | None, use: PackUse) -> None:
        """Everything is loaded: pack into `layer.packed`, with `bias`, and drop the plain tensors."""
        ...

    def apply(
        self,
        layer: LinearShape,
        ops: LinearOps,
        x: torch.Tensor,  # [num_tokens, in]
    ) -> torch.Tensor:
        """As `LinearOps.linear`: [num_tokens, out], activated if packed as gate_up."""
        ...
