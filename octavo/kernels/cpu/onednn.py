"""The same linear layers over oneDNN, as torch carries it: prepacked bf16 weights.

On processors with AMX (bf16 tiles) oneDNN multiplies many rows faster than our kernels, which do
not use the tiles. `choose` decides which of the two a machine gets. Only bfloat16 is offered:
oneDNN's float32 products were seen to depend on the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.kernels.cpu._checks import check


@dataclass(frozen=True, slots=True)
class OneDnnLinear:
    """A weight `[n, k]`, bfloat16, in oneDNN's own layout."""

    storage: torch.Tensor  # an mkldnn tensor
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16


def available() -> bool:
    """Whether this torch has oneDNN with bf16 products on this processor."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: torch.Tensor) -> OneDnnLinear:
    """Pack a bfloat16 weight `[n, k]`."""
    check(weight, "weight", [None, None], torch.bfloat16)
    n, k = weight.shape
    if n == 0 or k == 0:
        raise ValueError(f"weight must not be empty, but has shape {[n, k]}")
    return OneDnnLinear(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), n, k)


def linear(
    x: torch.Tensor,
    packed: OneDnnLinear,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias `[rows, n]`; x `[rows, k]` bfloat16, bias bfloat16 `[n]`.

    oneDNN rounds the result to bfloat16 whatever `out_dtype` says.
    """
    check(x, "x", [None, packed.k], torch.bfloat16)
    if bias is not None:
        check(bias, "bias", [packed.n], torch.bfloat16)
    if x.shape[0] == 0:
        y = torch.empty(0, packed.n, dtype=torch.bfloat16)
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, packed.storage, bias, "none", [], "")
    if out is not None:
        if out_dtype not in (None, out.dtype):
            raise ValueError(f"out_dtype is {out_dtype}, but out is {out.dtype}")
        check(out, "out", [x.shape[0], packed.n], rows_only=True)
        return out.copy_(y)
    return y if out_dtype is None else y.to(out_dtype)


def unpack(packed: OneDnnLinear) -> torch.Tensor:
    """The plain weight `[n, k]`; for tests and debugging."""
    identity = torch.eye(packed.k, dtype=torch.bfloat16)
    return linear(identity, packed).T.contiguous()
