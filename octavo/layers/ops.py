"""The numeric operations a model is made of, as an argument.

`Kernels` is handed to a model when it is built; nothing looks kernels up. `TorchOps` is the
reference: plain torch, on every device and dtype, and the oracle of the faster sets.

A set of kernels may also take over the whole decoder: `fuse` gets every packed weight once they
are loaded and answers with one callable for the forward, or None to leave the layers as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from octavo.attention.backend import AttentionBackend, AttentionSpec, ForwardContext
from octavo.quantization.base import LinearOps, PackedLinear, PackUse

# A gathered table: a plain [rows, width] tensor, or a weight packed as tied.
EmbeddingTable = torch.Tensor | PackedLinear

# (input_ids [num_tokens], positions [num_tokens], ctx) -> [num_tokens, hidden] after the final norm,
# or [L, hidden] where the context wants L rows
FusedForward = Callable[[torch.Tensor, torch.Tensor, ForwardContext], torch.Tensor]


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer, packed: biases are inside. Norms are as `Kernels.pack_norm` made them."""

    attention: AttentionSpec
    input_norm: torch.Tensor  # [hidden]
    qkv: PackedLinear
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    o: PackedLinear
    post_norm: torch.Tensor  # [hidden]
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True)
class DecoderParts:
    """A whole decoder of one rank, packed, for kernels that run it in one call."""

    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    dtype: torch.dtype
    layers: Sequence[LayerParts]
    embedding: EmbeddingTable
    final_norm: torch.Tensor
    cos: torch.Tensor  # [max_len, rotary_dim / 2] float32
    sin: torch.Tensor


class Kernels(LinearOps, Protocol):
    """Everything a decoder computes outside attention.

    The residual stream's dtype is the kernels' choice: `embedding` begins it, `add_rms_norm` carries
    it on. What the norms return, and what linears take, is in the model's dtype.
    """

    @property
    def name(self) -> str: ...

    def pack_norm(self, weight: torch.Tensor) -> torch.Tensor:
        """A norm's weight as `rms_norm` wants it."""
        ...

    def embedding(self, input_ids: torch.Tensor, table: EmbeddingTable) -> torch.Tensor:
        """Rows input_ids [num_tokens] of the table: [num_tokens, hidden], the residual stream."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension, computed in float32."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual); either argument may be overwritten."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [num_tokens, 2 * width], gate first: [num_tokens, width]."""
        ...

    def fuse(self, parts: DecoderParts, backend: AttentionBackend) -> FusedForward | None:
        """One callable for the whole decoder with this backend, or None."""
        ...


class PlainLinear:
    """A weight left as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, use: PackUse) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]
        self.use = use
        self.nbytes = weight.nbytes


class TorchOps:
    """Plain torch, on every device and in every dtype. The residual stream has the model's dtype."""

    name = "torch"

    def pack(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, use: PackUse = "matrix"
    ) -> PackedLinear:
        """Nothing to pack."""
        return PlainLinear(weight, bias, use)

    def linear(
        self, x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[num_tokens, in] -> [num_tokens, out].

        On a CPU torch offers no wider result than its inputs: a wider out_dtype holds rounded sums.
        """
        assert isinstance(packed, PlainLinear)
        if out_dtype not in (None, x.dtype) and x.is_cuda and packed.bias is None:
            return torch.mm(x, packed.weight.t(), out_dtype=out_dtype)
        y = F.linear(x, packed.weight, packed.bias)
        if packed.use == "gate_up":
            y = self.silu_mul(y)
        return y if out_dtype is None else y.to(out_dtype)

    def pack_norm(self, weight: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return weight

    def embedding(self, input_ids: torch.Tensor, table: EmbeddingTable) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, hidden]"""
        if isinstance(table, PlainLinear):
            table = table.weight
        assert isinstance(table, torch.Tensor)
        return F.embedding(input_ids, table)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Rounded to x's dtype before the weight, as transformers does."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum, sum)"""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[num_tokens, 2 * width] -> [num_tokens, width]"""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def fuse(self, parts: DecoderParts, backend: AttentionBackend) -> FusedForward | None:
        """Layers stay as they are."""
        return None
