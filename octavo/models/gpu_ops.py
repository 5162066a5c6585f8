"""The Triton kernels as a set of `Kernels`, and the decoder that they run as one.

Weights stay as they are, row after row, so that the library's products can read them too: it
computes the steps of many rows, and everything in float32. The residual stream has the model's
dtype. With the Triton attention backend the whole decoder is handed over (`fuse`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from octavo.attention.backend import AttentionBackend
from octavo.kernels.triton import pointwise, products
from octavo.kernels.triton.decoder import FEW_ROWS, FusedDecoder
from octavo.kernels.triton.layer import Layer
from octavo.layers.ops import DecoderParts, EmbeddingTable, FusedForward, LayerParts
from octavo.quantization.base import PackedLinear, PackUse

TRITON_BACKEND = "triton"  # the attention backend whose KV cache the fused decoder reads and writes


@dataclass(frozen=True, slots=True)
class GpuPacked:
    """A weight as it is."""

    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None
    use: PackUse

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes


class GpuOps:
    """Octavo's Triton kernels, and the library's products where those are better."""

    name = "triton"

    def __init__(
        self,
        narrow_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
        few_rows: int = FEW_ROWS,
        one_tiling: bool = False,
        runs_as_one: bool = False,
    ) -> None:
        """`narrow_dtypes`: in which dtypes up to `few_rows` rows take Octavo's own products.

        `one_tiling`: attention cuts chunks as it cuts decode rows, so that it does not matter how a
        prompt was cut into chunks. `runs_as_one`: steps of one row of a small model run as one kernel,
        whose bits differ from those of other steps.
        """
        self._narrow_dtypes = narrow_dtypes
        self._few_rows = few_rows
        self._one_tiling = one_tiling
        self.runs_as_one = runs_as_one
        self._workspaces: list[products.Workspace] = []
        self.decoder: FusedDecoder | None = None  # the last one made, for measurements

    def pack(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, use: PackUse = "matrix"
    ) -> PackedLinear:
        """Nothing to pack."""
        return GpuPacked(weight.contiguous(), bias, use)

    def linear(
        self, x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[num_tokens, in] -> [num_tokens, out]; sums are float32 until they are stored."""
        assert isinstance(packed, GpuPacked)
        weight, bias = packed.weight, packed.bias
        activates = packed.use == "gate_up"
        if 0 < len(x) <= self._few_rows and x.dtype in self._narrow_dtypes:
            x = x.contiguous()
            width = weight.shape[0] // 2 if activates else weight.shape[0]
            out = torch.empty(len(x), width, dtype=out_dtype or x.dtype, device=x.device)
            kind = "head" if packed.use in ("head", "tied") else "plain"
            tiling = products.choose_tiling(kind, weight.shape[0], weight.shape[1], len(x))
            workspace = self._workspace(weight.shape[0], tiling, x.device, whole=not activates)
            if activates:
                products.gate_up(x, weight, bias, None, 0.0, out, workspace, tiling)
            else:
                products.plain(x, weight, bias, out, workspace, tiling)
            return out
        if out_dtype not in (None, x.dtype) and x.is_cuda and bias is None and not activates:
            return torch.mm(x, weight.t(), out_dtype=out_dtype)
        y = F.linear(x, weight, bias)
        if activates:
            y = pointwise.silu_mul(y)
        return y if out_dtype is None else y.to(out_dtype)

    def pack_norm(self, weight: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return weight

    def embedding(self, input_ids: torch.Tensor, table: EmbeddingTable) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, hidden]"""
        weight = _table(table)
        out = torch.empty(len(input_ids), weight.shape[1], dtype=weight.dtype, device=weight.device)
        pointwise.embed(input_ids, weight, out)
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Any leading dimensions; rounded to x's dtype before the weight, as transformers does."""
        return pointwise.norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum, the residual stream, changed in place)"""
        return pointwise.norm(x, weight, eps, residual), residual

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[num_tokens, 2 * width] -> [num_tokens, width]"""
        return pointwise.silu_mul(gate_up.contiguous())

    def fuse(self, parts: DecoderParts, backend: AttentionBackend) -> FusedForward | None:
        """The whole decoder, where the attention backend is the kernels' own."""
        if backend.name != TRITON_BACKEND:
            return None
        few_rows = self._few_rows if parts.dtype in self._narrow_dtypes else 0
        self.decoder = FusedDecoder(
            [_layer(layer) for layer in parts.layers],
            _table(parts.embedding),
            parts.final_norm,
            parts.cos,
            parts.sin,
            parts.rms_norm_eps,
            few_rows,
            self._one_tiling,
            self.runs_as_one,
        )
        return self.decoder.forward

    def _workspace(
        self, n: int, tiling: products.Tiling, device: torch.device, *, whole: bool
    ) -> products.Workspace:
        """Room for a product's partial sums. Earlier rooms stay: captured graphs point there."""
        tiles = -(-n // tiling.block_n)
        elements = 0 if whole and tiling.split == 1 else tiles * tiling.block_n * tiling.split
        elements *= self._few_rows
        last = self._workspaces[-1] if self._workspaces else None
        if last is None or last.partial.numel() < elements or last.counters.numel() < tiles:
            self._workspaces.append(products.Workspace.allocate(max(elements, 1), tiles, device))
        return self._workspaces[-1]


def _table(table: EmbeddingTable) -> torch.Tensor:
    if isinstance(table, GpuPacked):
        return table.weight
    assert isinstance(table, torch.Tensor)
    return table


def _layer(parts: LayerParts) -> Layer:
    qkv, o, gate_up, down = parts.qkv, parts.o, parts.gate_up, parts.down
    assert isinstance(qkv, GpuPacked)
    assert isinstance(o, GpuPacked)
    assert isinstance(gate_up, GpuPacked)
    assert isinstance(down, GpuPacked)
    norms = None if parts.q_norm is None or parts.k_norm is None else (parts.q_norm, parts.k_norm)
    return Layer(
        attention=parts.attention,
        input_norm=parts.input_norm,
        qkv=qkv.weight,
        qkv_bias=qkv.bias,
        qk_norms=norms,
        o=o.weight,
        o_bias=o.bias,
        post_norm=parts.post_norm,
        gate_up=gate_up.weight,
        gate_up_bias=gate_up.bias,
        down=down.weight,
        down_bias=down.bias,
    )
