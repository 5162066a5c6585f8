"""Paged attention by the Triton kernels, layer by layer.

KV cache: [num_blocks, 2, num_kv_heads, block_size, head_dim], keys at 0, values at 1: what a program
reads of a block, one head's keys or values, lies in one piece.
"""

from __future__ import annotations

import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec


class TritonBackend:
    """Any mix of chunk, decode and verify rows; sliding window and soft cap; float32 to float16."""

    name = "triton"

    def __init__(self, one_tiling: bool = False) -> None:
        """`one_tiling`: chunks are cut as decode rows are; see octavo.models.gpu_ops."""
        self._one_tiling = one_tiling

    def kv_cache_shape(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> tuple[int, ...]:
        """Shape of one layer's KV cache."""
        return (num_blocks, 2, spec.num_kv_heads, block_size, spec.head_dim)

    def store(
        self,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> None:
        """Write the rows that have a slot."""
        from octavo.kernels.triton import pointwise

        pointwise.store(key, value, metadata.slot_mapping, kv_cache)

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """[num_tokens, num_heads * head_dim]"""
        from octavo.kernels.triton import attention, shared
        from octavo.kernels.triton.query_tiles import plans_of

        query = query.contiguous()
        output = torch.zeros_like(query)
        plans = plans_of(metadata, spec, query.dtype, self._one_tiling)
        scratch = None
        if any(plan.extra > 0 for plan in plans):
            scratch = attention.Scratch.allocate(
                metadata.num_tokens, metadata.max_seq_len, spec, query.device
            )
        prefixes = None
        if metadata.shared is not None:
            prefixes = shared.SharedScratch.allocate(metadata.num_tokens, spec, query.device)
            shared.attend(query, kv_cache, metadata, spec, prefixes)
        for plan in plans:
            attention.attend(query, kv_cache, output, metadata, spec, plan, scratch, prefixes=prefixes)
        return output.flatten(1)
