"""RMS norm: a weight and the two operations it takes part in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from octavo.layers.checkpoint import CheckpointTensor
from octavo.layers.ops import Kernels
from octavo.quantization.base import Weight


class RMSNorm:
    """x / rms(x) * weight, over the last dimension. Not cut by tensor parallelism."""

    def __init__(self, name: str, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self._name = name
        self.eps = eps
        self.weight = Weight((size,), dtype, device)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """The weight."""
        yield CheckpointTensor(f"{self._name}.weight", self.weight.shape, self.weight, None, self)

    def after_load(self, ops: Kernels) -> None:
        """Into the kernels' form."""
        self.weight.tensor = ops.pack_norm(self.weight.value())

    def forward(self, x: torch.Tensor, ops: Kernels) -> torch.Tensor:
        """[..., size] -> [..., size]"""
        return ops.rms_norm(x, self.weight.value(), self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor, ops: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); either argument may be overwritten."""
        return ops.add_rms_norm(x, residual, self.weight.value(), self.eps)
