"""Attention of whole prompts by cuDNN, over keys and values gathered from the cache.

A long prompt that begins in this step attends to nothing but its own rows. That is the one case the
libraries are made for, and cuDNN's kernel is twice as fast there as the paged one. It plans anew for
every length, so lengths are padded: rows behind a prompt's end see zeros, and nothing reads them.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.triton.launch import next_power_of_2

LEAST_ROWS = 1024  # shorter prompts gain nothing: their arithmetic is in the matrices
PADDED_TO = 512


@triton.jit
def gather_kernel(
    cache_ptr,  # [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
    table_ptr,  # [blocks of the request] int32
    out_ptr,  # [2, padded, KV_HEADS, D]
    length,
    padded,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, half = tl.program_id(1), tl.program_id(2)
    i, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D_PADDED)
    block = tl.load(table_ptr + i // BLOCK_SIZE, mask=i < length, other=0).to(tl.int64)
    source = (((block * 2 + half) * KV_HEADS + head) * BLOCK_SIZE + i % BLOCK_SIZE) * D
    inside = d[None, :] < D
    x = tl.load(cache_ptr + source[:, None] + d[None, :], mask=(i < length)[:, None] & inside, other=0.0)
    target = ((half * padded + i).to(tl.int64) * KV_HEADS + head) * D
    tl.store(out_ptr + target[:, None] + d[None, :], x, mask=(i < padded)[:, None] & inside)


def serves(spec: AttentionSpec, dtype: torch.dtype) -> bool:
    """True if cuDNN can compute this layer's attention."""
    plain = spec.sliding_window is None and spec.soft_cap is None
    return plain and dtype != torch.float32 and spec.head_dim % 8 == 0 and spec.head_dim <= 128


def padded_length(length: int) -> int:
    """Rows that a prompt of this length is padded to."""
    return -(-length // PADDED_TO) * PADDED_TO


def attend(
    q: torch.Tensor,  # [num_tokens + PADDED_TO or more, heads, head_dim]; rows behind the step hold anything
    kv_cache: torch.Tensor,  # [blocks, 2, kv_heads, block_size, head_dim]
    out: torch.Tensor,  # [num_tokens, heads, head_dim], written
    metadata: AttentionMetadata,
    spec: AttentionSpec,
) -> None:
    """Attention of the step's whole prompts; their keys and values are in the cache already."""
    for request, first, length in metadata.whole_prompts:
        table = metadata.block_table[request]
        out[first : first + length] = _attend_one(q, kv_cache, table, first, length, spec)


def _attend_one(
    q: torch.Tensor, kv_cache: torch.Tensor, table: torch.Tensor, first: int, length: int, spec: AttentionSpec
) -> torch.Tensor:
    """[length, heads, head_dim]"""
    padded = padded_length(length)
    kv = torch.empty(2, padded, spec.num_kv_heads, spec.head_dim, dtype=q.dtype, device=q.device)
    block = 64
    gather_kernel[(padded // block, spec.num_kv_heads, 2)](
        kv_cache, table, kv, length, padded, KV_HEADS=spec.num_kv_heads, D=spec.head_dim,
        D_PADDED=next_power_of_2(spec.head_dim), BLOCK_SIZE=kv_cache.shape[3], BLOCK=block, num_warps=4,
    )  # fmt: skip
    query, key, value = (x.transpose(0, 1)[None] for x in (q[first : first + padded], kv[0], kv[1]))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        found = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=spec.scale, enable_gqa=True
        )
    return found[0, :, :length].transpose(0, 1)


def warm_up(spec: AttentionSpec, dtype: torch.dtype, device: torch.device, longest: int) -> None:
    """Have cuDNN plan for every length up to `longest`: the first call of each takes a while."""
    if not serves(spec, dtype):
        return
    kv_cache = torch.zeros(1, 2, spec.num_kv_heads, 16, spec.head_dim, dtype=dtype, device=device)
    table = torch.zeros(padded_length(longest) // 16, dtype=torch.int32, device=device)
    q = torch.zeros(padded_length(longest), spec.num_heads, spec.head_dim, dtype=dtype, device=device)
    for length in range(padded_length(LEAST_ROWS), len(q) + 1, PADDED_TO):
        _attend_one(q, kv_cache, table, 0, length, spec)
