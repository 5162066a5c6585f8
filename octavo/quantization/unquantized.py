"""Plain weights: one matrix in the model's dtype."""

from __future__ import annotations

import torch

from octavo.quantization.base import LinearOps, LinearShape, PackUse, ShardId, Weight, WeightLoader


class UnquantizedLinearMethod:
    """The matrix as it is in the checkpoint, packed for the kernels after loading."""

    def create_weights(
        self,
        layer: LinearShape,
        dtype: torch.dtype,
        device: torch.device,
        weight_loader: WeightLoader,
        shard_ids: tuple[ShardId, ...],
    ) -> None:
        """One tensor, [out, in]."""
        shape = (layer.out_features, layer.in_features)
        layer.weights["weight"] = Weight(shape, dtype, device, weight_loader, shard_ids)

    def after_load(self, layer: LinearShape, ops: LinearOps, bias: torch.Tensor | None, use: PackUse) -> None:
        """Pack, and let the plain tensor go: one copy of each weight."""
        weight = layer.weights["weight"]
        layer.packed = ops.pack(weight.value(), bias, use)
        weight.tensor = None

    def apply(self, layer: LinearShape, ops: LinearOps, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] -> [num_tokens, out]"""
        return ops.linear(x, layer.packed)
