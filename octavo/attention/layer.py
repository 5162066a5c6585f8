"""Attention as a decoder layer uses it: one spec, one backend, one layer's KV cache."""

from __future__ import annotations

import torch

from octavo.attention.backend import AttentionBackend, AttentionSpec, ForwardContext


class Attention:
    """Stores this step's keys and values, then attends; the backend does both."""

    def __init__(self, spec: AttentionSpec, backend: AttentionBackend, layer_index: int) -> None:
        self.spec = spec
        self._backend = backend
        self._layer_index = layer_index

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim], rotary applied
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], rotary applied
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        ctx: ForwardContext,
    ) -> torch.Tensor:
        """[num_tokens, num_heads * head_dim]"""
        kv_cache = ctx.kv_caches[self._layer_index]
        self._backend.store(key, value, kv_cache, ctx.attention, self.spec)
        return self._backend.attend(query, kv_cache, ctx.attention, self.spec)
