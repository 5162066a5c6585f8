"""Paged attention by Octavo's C kernels; the cache's layout is theirs."""

from __future__ import annotations

import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.cpu import attention as kernels
from octavo.kernels.cpu.library import CpuLibrary


class CpuBackend:
    """One block is one contiguous read: keys and values of all KV heads."""

    name = "cpu"

    def __init__(self, library: CpuLibrary | None = None) -> None:
        """`library` is one instruction-set level of the kernels; by default this machine's best."""
        self._library = library

    def kv_cache_shape(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> tuple[int, ...]:
        """Shape of one layer's KV cache."""
        return kernels.kv_cache_shape(num_blocks, block_size, spec)

    def store(
        self,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> None:
        """Write the rows that have a slot."""
        kernels.store(key, value, kv_cache, metadata, spec, library=self._library)

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """[num_tokens, num_heads * head_dim]"""
        return kernels.attend(query, kv_cache, metadata, spec, library=self._library)
