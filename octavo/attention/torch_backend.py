"""Paged attention in plain torch: slow, simple, and the oracle of the other backends.

One request at a time: gather its keys and values through the block table, mask, softmax in
float32. Works on every device and in every dtype, for any mix of prompt chunks, decode rows,
verify rows and padding.
"""

from __future__ import annotations

import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec


class TorchBackend:
    """KV cache: [num_blocks, 2, block_size, num_kv_heads, head_dim], keys at 0, values at 1."""

    name = "torch"

    def kv_cache_shape(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> tuple[int, ...]:
        """Shape of one layer's KV cache."""
        return (num_blocks, 2, block_size, spec.num_kv_heads, spec.head_dim)

    def store(
        self,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> None:
        """Write the rows that have a slot."""
        rows = (metadata.slot_mapping >= 0).nonzero().squeeze(-1)
        slots = metadata.slot_mapping[rows]
        block_size = kv_cache.shape[2]
        block, offset = slots // block_size, slots % block_size
        kv_cache[block, 0, offset] = key[rows].to(kv_cache.dtype)
        kv_cache[block, 1, offset] = value[rows].to(kv_cache.dtype)

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """[num_tokens, num_heads * head_dim]"""
        block_size = kv_cache.shape[2]
        output = torch.zeros_like(query)
        starts = metadata.query_start_loc.tolist()
        seq_lens = metadata.seq_lens.tolist()
        for request in range(metadata.num_reqs):
            begin, end, seq_len = starts[request], starts[request + 1], seq_lens[request]
            positions = metadata.positions[begin:end]
            rows = begin + (positions >= 0).nonzero().squeeze(-1)
            if rows.numel() == 0:
                continue
            blocks = metadata.block_table[request, : -(-seq_len // block_size)].long()
            keys, values = (kv_cache[blocks, half].flatten(0, 1)[:seq_len] for half in (0, 1))
            output[rows] = _attend_one(query[rows], keys, values, metadata.positions[rows], spec)
        return output.flatten(1)


def _attend_one(
    query: torch.Tensor,  # [rows, num_heads, head_dim]
    keys: torch.Tensor,  # [seq_len, num_kv_heads, head_dim]
    values: torch.Tensor,  # [seq_len, num_kv_heads, head_dim]
    positions: torch.Tensor,  # [rows]
    spec: AttentionSpec,
) -> torch.Tensor:
    """One request: [rows, num_heads, head_dim]"""
    group = spec.num_heads // spec.num_kv_heads
    grouped = query.float().view(-1, spec.num_kv_heads, group, spec.head_dim)
    scores = torch.einsum("rkgd,skd->kgrs", grouped * spec.scale, keys.float())
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    kv_positions = torch.arange(keys.shape[0], device=keys.device)
    visible = kv_positions <= positions[:, None]  # [rows, seq_len]
    if spec.sliding_window is not None:
        visible &= kv_positions > positions[:, None] - spec.sliding_window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    mixed = torch.einsum("kgrs,skd->rkgd", weights, values.float())
    return mixed.flatten(1, 2).to(query.dtype)
