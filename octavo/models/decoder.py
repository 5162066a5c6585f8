"""The decoder-only transformer: one block, whose flags make it Llama, Mistral, Qwen2 or Qwen3.

A `CausalLM` is built empty (no memory yet), filled by octavo.models.weights, and then finished by
`after_load`, which offers all packed weights to the kernels: a set that can run the whole decoder
in one call takes it over, otherwise the layers run one by one. Kernels, attention backend and
tensor-parallel group are arguments; a forward's batch comes in its `ForwardContext`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from octavo.attention.backend import AttentionBackend, AttentionSpec, ForwardContext
from octavo.attention.layer import Attention
from octavo.layers.checkpoint import CheckpointTensor, Loadable
from octavo.layers.embedding import VocabTable
from octavo.layers.linear import (
    GateUpLinear,
    Placement,
    QKVParallelLinear,
    RowParallelLinear,
)
from octavo.layers.norm import RMSNorm
from octavo.layers.ops import DecoderParts, FusedForward, Kernels, LayerParts
from octavo.layers.parallel import TPGroup, shard_range
from octavo.layers.rotary import apply_rotary, rotary_tables
from octavo.models.config import ModelConfig
from octavo.quantization.unquantized import UnquantizedLinearMethod


class DecoderLayer:
    """norm, attention, norm, gated MLP; the residual stream runs beside it."""

    def __init__(
        self, config: ModelConfig, index: int, backend: AttentionBackend, ops: Kernels, place: Placement
    ) -> None:
        prefix = f"model.layers.{index}"
        attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        heads, head_dim, tp = config.num_heads, config.head_dim, place.tp
        self._ops = ops
        self.input_norm = _norm(f"{prefix}.input_layernorm", config.hidden_size, config, place)
        self.qkv = QKVParallelLinear(
            attn, config.hidden_size, heads, config.num_kv_heads, head_dim, config.qkv_bias, place
        )
        self.q_norm = _norm(f"{attn}.q_norm", head_dim, config, place) if config.qk_norm else None
        self.k_norm = _norm(f"{attn}.k_norm", head_dim, config, place) if config.qk_norm else None
        mine = shard_range(heads, tp)
        columns = range(mine.start * head_dim, mine.stop * head_dim)
        self.o = RowParallelLinear(
            f"{attn}.o_proj", heads * head_dim, columns, config.hidden_size, config.o_bias, place
        )
        spec = AttentionSpec(
            num_heads=self.qkv.num_heads,
            num_kv_heads=self.qkv.num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            sliding_window=config.sliding_windows[index],
        )
        self.attention = Attention(spec, backend, index)
        self.post_norm = _norm(f"{prefix}.post_attention_layernorm", config.hidden_size, config, place)
        width = config.intermediate_size
        self.gate_up = GateUpLinear(
            [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
            config.hidden_size,
            [width, width],
            config.mlp_bias,
            place,
        )
        self.down = RowParallelLinear(
            f"{mlp}.down_proj", width, shard_range(width, tp), config.hidden_size, config.mlp_bias, place
        )

    def loadables(self) -> Iterator[Loadable]:
        """Everything of this layer that waits for tensors."""
        yield from (self.input_norm, self.qkv, self.o, self.post_norm, self.gate_up, self.down)
        yield from (norm for norm in (self.q_norm, self.k_norm) if norm is not None)

    def forward(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden]: the layer before, not yet added to the residual
        residual: torch.Tensor | None,  # [num_tokens, hidden]; None in the first layer
        cos: torch.Tensor,  # [num_tokens, rotary_dim / 2], of each row's position
        sin: torch.Tensor,
        ctx: ForwardContext,
        wanted: torch.Tensor | None = None,  # rows that go on behind attention; None: all
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, residual) for the next layer, both [num_tokens, hidden], or [wanted, hidden]."""
        ops = self._ops
        if residual is None:
            hidden, residual = self.input_norm.forward(hidden, ops), hidden
        else:
            hidden, residual = self.input_norm.add(hidden, residual, ops)
        q, k, v = self.qkv.split(self.qkv.forward(hidden, ops))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.forward(q, ops), self.k_norm.forward(k, ops)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        hidden = self.attention.forward(q, k, v, ctx)
        if wanted is not None:
            hidden, residual = hidden[wanted], residual[wanted]
        hidden = self.o.forward(hidden, ops)
        hidden, residual = self.post_norm.add(hidden, residual, ops)
        hidden = self.down.forward(self.gate_up.forward(hidden, ops), ops)
        return hidden, residual

    def parts(self) -> LayerParts:
        """The packed weights, for kernels that run whole decoders."""
        return LayerParts(
            attention=self.attention.spec,
            input_norm=self.input_norm.weight.value(),
            qkv=self.qkv.packed,
            q_norm=None if self.q_norm is None else self.q_norm.weight.value(),
            k_norm=None if self.k_norm is None else self.k_norm.weight.value(),
            o=self.o.packed,
            post_norm=self.post_norm.weight.value(),
            gate_up=self.gate_up.packed,
            down=self.down.packed,
        )


class CausalLM:
    """Token ids in, hidden states and logits out. Built empty; see octavo.models.weights."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        ops: Kernels,
        backend: AttentionBackend,
        tp: TPGroup,
        max_model_len: int,
    ) -> None:
        config.check_tensor_parallel_size(tp.size)
        self.config = config
        self.dtype = dtype
        self.device = device
        self.max_model_len = max_model_len
        self._ops = ops
        self._backend = backend
        place = Placement(dtype, device, tp, UnquantizedLinearMethod())
        self._tp = tp
        self._cos, self._sin = rotary_tables(config.rope, max_model_len, device)

        def table(name: str, *, embeds: bool, heads: bool) -> VocabTable:
            return VocabTable(name, config.vocab_size, config.hidden_size, place, embeds=embeds, heads=heads)

        tied = config.tie_word_embeddings
        self.embedding = table("model.embed_tokens", embeds=True, heads=tied)
        self.layers = [DecoderLayer(config, index, backend, ops, place) for index in range(config.num_layers)]
        self.final_norm = _norm("model.norm", config.hidden_size, config, place)
        self.head = self.embedding if tied else table("lm_head", embeds=False, heads=True)
        self._fused: FusedForward | None = None

    @property
    def attention_specs(self) -> list[AttentionSpec]:
        """One a layer; the KV cache is allocated from them."""
        return [layer.attention.spec for layer in self.layers]

    @property
    def is_fused(self) -> bool:
        """True if the kernels run the whole decoder in one call."""
        return self._fused is not None

    @property
    def fused(self) -> FusedForward | None:
        """The kernels' own forward of the whole decoder, if they have one."""
        return self._fused

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """Every tensor this model needs from its checkpoint, in the usual order of the files."""
        yield from self.embedding.checkpoint_tensors()
        for layer in self.layers:
            for loadable in layer.loadables():
                yield from loadable.checkpoint_tensors()
        yield from self.final_norm.checkpoint_tensors()
        if self.head is not self.embedding:
            yield from self.head.checkpoint_tensors()

    def pack(self, layer: Loadable) -> None:
        """A layer has all its tensors."""
        layer.after_load(self._ops)

    def after_load(self) -> None:
        """Every layer is packed: let the kernels take over the decoder if they can."""
        if self._tp.size > 1:  # the sums between ranks lie inside the layers
            return
        parts = DecoderParts(
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            rms_norm_eps=self.config.rms_norm_eps,
            dtype=self.dtype,
            layers=[layer.parts() for layer in self.layers],
            embedding=self.embedding.table,
            final_norm=self.final_norm.weight.value(),
            cos=self._cos,
            sin=self._sin,
        )
        self._fused = self._ops.fuse(parts, self._backend)

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens] int64
        positions: torch.Tensor,  # [num_tokens] int64, -1 for padding rows
        ctx: ForwardContext,
    ) -> torch.Tensor:
        """Hidden states after the final norm: [num_tokens, hidden], or of the rows that `ctx` wants."""
        if self._fused is not None:
            return self._fused(input_ids, positions, ctx)
        hidden = self.embedding.embed(input_ids, self._ops)
        rows = positions.clamp(min=0)
        cos, sin = self._cos[rows], self._sin[rows]
        residual: torch.Tensor | None = None
        for layer in self.layers:
            wanted = ctx.wanted if layer is self.layers[-1] else None
            hidden, residual = layer.forward(hidden, residual, cos, sin, ctx, wanted)
        assert residual is not None
        return self.final_norm.add(hidden, residual, self._ops)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab_size] float32"""
        return self.head.logits(hidden, self._ops)


def _norm(name: str, size: int, config: ModelConfig, place: Placement) -> RMSNorm:
    return RMSNorm(name, size, config.rms_norm_eps, place.dtype, place.device)
