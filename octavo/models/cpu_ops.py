"""The C kernels as a set of `Kernels`, and the decoder that runs as one call.

For float32 and bfloat16 on a CPU with the kernel library. The residual stream is float32 whatever
the model's dtype. With the CPU attention backend the whole decoder is handed over (`fuse`); with
another backend, or under tensor parallelism, the layers run one by one through the same kernels.
`choose_ops` picks a set for this machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.attention.backend import AttentionBackend, ForwardContext
from octavo.errors import ConfigError
from octavo.kernels.cpu import linear as panels
from octavo.kernels.cpu import norm, onednn
from octavo.kernels.cpu.arena import WeightArena
from octavo.kernels.cpu.choose import Choice, choose
from octavo.kernels.cpu.decoder import DecoderLayer, DecoderSpec, FusedDecoder
from octavo.kernels.cpu.library import CpuLibrary
from octavo.layers.ops import DecoderParts, EmbeddingTable, FusedForward, Kernels, LayerParts, TorchOps
from octavo.quantization.base import PackedLinear, PackUse

CPU_BACKEND = "cpu"  # the attention backend whose KV cache the fused decoder reads and writes
CPU_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class CpuPacked:
    """A weight in panels, and its bias as the kernels take it."""

    weight: panels.PackedLinear
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.weight.storage.nbytes


class CpuOps:
    """Octavo's C kernels. Raises CpuLibraryError when first used if they were not built."""

    name = "octavo"

    def __init__(self, dtype: torch.dtype, library: CpuLibrary | None = None) -> None:
        """`library` is one instruction-set level of the kernels; by default this machine's best."""
        if dtype not in CPU_DTYPES:
            raise ConfigError(f"the CPU kernels compute in float32 and bfloat16, not in {dtype}")
        self._dtype = dtype
        self._library = library
        self._arena = WeightArena()

    def pack(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, use: PackUse = "matrix"
    ) -> PackedLinear:
        """[out, in] into panels of 16 outputs; single rows can be read in any case."""
        packed = self._panels(weight, use)
        return CpuPacked(packed, None if bias is None else panels.pack_bias(bias, packed))

    def linear(
        self, x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[num_tokens, in] -> [num_tokens, out]; sums are float32 until they are stored."""
        assert isinstance(packed, CpuPacked)
        return panels.linear(x, packed.weight, packed.bias, out_dtype, library=self._library)

    def _panels(self, weight: torch.Tensor, use: PackUse) -> panels.PackedLinear:
        if use == "gate_up":
            return panels.pack_gate_up(weight, self._library, self._arena)
        return panels.pack(weight, self._library, self._arena)

    def pack_norm(self, weight: torch.Tensor) -> torch.Tensor:
        """float32"""
        return weight.float().contiguous()

    def embedding(self, input_ids: torch.Tensor, table: EmbeddingTable) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, hidden] float32"""
        if isinstance(table, CpuPacked):
            return panels.embed(input_ids, table.weight, self._library)
        assert isinstance(table, torch.Tensor)
        return panels.embed(input_ids, table, self._library)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Any leading dimensions; the model's dtype comes out."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return norm.rms_norm(rows, weight, eps, self._dtype, self._library).view(x.shape)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum in the model's dtype, the residual stream, changed in place)"""
        return norm.add_rms_norm(x, residual, weight, eps, self._dtype, self._library), residual

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[num_tokens, 2 * width] -> [num_tokens, width]"""
        return norm.silu_mul(gate_up, self._library)

    def fuse(self, parts: DecoderParts, backend: AttentionBackend) -> FusedForward | None:
        """The whole decoder, where the attention backend is the kernels' own."""
        if backend.name != CPU_BACKEND:
            return None
        table = parts.embedding
        fused = FusedDecoder(
            DecoderSpec(parts.hidden_size, parts.dtype, parts.rms_norm_eps),
            [_fused_layer(layer) for layer in parts.layers],
            table.weight if isinstance(table, CpuPacked) else _plain(table),
            parts.final_norm,
            parts.cos,
            parts.sin,
            self._library,
        )

        def forward(input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
            return fused.forward(input_ids, positions, ctx.attention, ctx.kv_caches, ctx.wanted)

        return forward


@dataclass(frozen=True, slots=True)
class OneDnnPacked:
    """A weight in oneDNN's layout, and its plain bias."""

    weight: onednn.OneDnnLinear
    bias: torch.Tensor | None
    activates: bool  # gate and up

    @property
    def nbytes(self) -> int:
        """Bytes of the weight; oneDNN's padding is not known."""
        return self.weight.n * self.weight.k * self.weight.dtype.itemsize


class OneDnnOps(CpuOps):
    """The C kernels with oneDNN's products between them, for processors with bf16 tiles (AMX).

    The vocabulary's table stays in panels: its rows are read, and oneDNN would round the logits.
    """

    name = "onednn"

    def pack(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, use: PackUse = "matrix"
    ) -> PackedLinear:
        """[out, in], reordered by oneDNN."""
        if use in ("head", "tied"):
            return super().pack(weight, bias, use)
        return OneDnnPacked(onednn.pack(weight), bias, use == "gate_up")

    def linear(
        self, x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[num_tokens, in] -> [num_tokens, out]"""
        if not isinstance(packed, OneDnnPacked):
            return super().linear(x, packed, out_dtype)
        y = onednn.linear(x, packed.weight, packed.bias, out_dtype)
        return self.silu_mul(y) if packed.activates else y

    def fuse(self, parts: DecoderParts, backend: AttentionBackend) -> FusedForward | None:
        """The layers run one by one."""
        return None


def choose_ops(dtype: torch.dtype, name: str | None = None, isa: str | None = None) -> tuple[Kernels, Choice]:
    """This machine's ops for a CPU model of this dtype, and why; `name` and `isa` override the rule.

    Raises ConfigError for an unknown name, or one that this machine cannot serve.
    """
    choice = choose(dtype, name, isa)
    if choice.name == "torch":
        return TorchOps(), choice
    if choice.library is None:
        raise ConfigError(f"CPU kernels {choice.name!r} need Octavo's kernel library, which was not built")
    kind = OneDnnOps if choice.name == "onednn" else CpuOps
    return kind(dtype, choice.library), choice


def _plain(table: EmbeddingTable) -> torch.Tensor:
    assert isinstance(table, torch.Tensor)
    return table


def _fused_layer(parts: LayerParts) -> DecoderLayer:
    qkv, o, gate_up, down = parts.qkv, parts.o, parts.gate_up, parts.down
    assert isinstance(qkv, CpuPacked)
    assert isinstance(o, CpuPacked)
    assert isinstance(gate_up, CpuPacked)
    assert isinstance(down, CpuPacked)
    return DecoderLayer(
        attention=parts.attention,
        input_norm=parts.input_norm,
        qkv=qkv.weight,
        o=o.weight,
        post_norm=parts.post_norm,
        gate_up=gate_up.weight,
        down=down.weight,
        qkv_bias=qkv.bias,
        o_bias=o.bias,
        gate_up_bias=gate_up.bias,
        down_bias=down.bias,
        q_norm=parts.q_norm,
        k_norm=parts.k_norm,
    )
