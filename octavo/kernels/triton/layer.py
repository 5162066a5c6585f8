"""The weights of one decoder layer, as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.attention.backend import AttentionSpec


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights, plain: [out, in]."""

    attention: AttentionSpec
    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
