"""Paged attention on the CPU: launchers for `src/attention.c` and `src/rope_store.c`.

A layer's KV cache is one tensor whose layout only the kernels know (`src/kv_cache.h`): a block of
tokens, keys and values of all KV heads, is one contiguous piece of memory. Two steps use it: keys
and values of this step's rows are stored (`rope_store` also applies the rotary embedding and, for
Qwen3, the norm of each head; `store` takes keys that are ready), then `attend` reads.

A row's result is the same bit for bit whatever other rows, requests, chunk sizes and threads there
are. What the tensors of the metadata *hold* is trusted: block ids, slots and positions outside the
cache and the rotary tables read or write elsewhere in memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.cpu._checks import check, dtype_number
from octavo.kernels.cpu.library import AttnSpec, CpuLibrary, Step, load

TILE = 16  # tokens; a block is a whole number of tiles
MAX_HEAD_DIM = 2048


@dataclass(frozen=True, slots=True)
class _Functions:
    rope_store: Any
    store: Any
    attend: Any


@cache
def _functions(library: CpuLibrary) -> _Functions:
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    batch = [ctypes.POINTER(AttnSpec), ctypes.POINTER(Step)]
    return _Functions(
        rope_store=library.function(
            "oc_rope_store", None, [*batch, pointer, pointer, pointer, flag, pointer, pointer, real, pointer]
        ),
        store=library.function("oc_kv_store", None, [*batch, pointer, size, pointer, size, flag, pointer]),
        attend=library.function("oc_attend", None, [*batch, pointer, size, pointer, pointer, flag]),
    )


def _elements_per_head(head_dim: int) -> int:
    """Cache elements of one KV head and tile: keys padded to pairs, values to whole vectors."""
    return TILE * (-(-head_dim // 2) * 2 + -(-head_dim // 16) * 16)


def check_spec(spec: AttentionSpec) -> None:
    """ValueError unless the kernels can serve this attention."""
    if not 1 <= spec.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"spec.head_dim must be between 1 and {MAX_HEAD_DIM}, not {spec.head_dim}")
    if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
        raise ValueError(
            f"spec.num_heads ({spec.num_heads}) must be a multiple of spec.num_kv_heads ({spec.num_kv_heads})"
        )
    if spec.sliding_window is not None and spec.sliding_window < 1:
        raise ValueError(f"spec.sliding_window must be at least 1, not {spec.sliding_window}")
    if spec.soft_cap is not None and spec.soft_cap <= 0:
        raise ValueError(f"spec.soft_cap must be above 0, not {spec.soft_cap}")


def kv_cache_shape(num_blocks: int, block_size: int, spec: AttentionSpec) -> tuple[int, ...]:
    """Shape of one layer's KV cache, `[num_blocks, tiles, num_kv_heads, elements]`, for either dtype.

    The cache need not be cleared: slots that hold no token are never used.
    """
    check_spec(spec)
    if block_size < TILE or block_size % TILE:
        raise ValueError(f"block_size must be a multiple of {TILE}, not {block_size}")
    return (num_blocks, block_size // TILE, spec.num_kv_heads, _elements_per_head(spec.head_dim))


def _spec_view(spec: AttentionSpec, kv_cache: torch.Tensor) -> AttnSpec:
    check_spec(spec)
    check(kv_cache, "kv_cache", [None, None, spec.num_kv_heads, _elements_per_head(spec.head_dim)])
    return AttnSpec(
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        kv_cache.shape[1] * TILE,
        spec.scale,
        spec.sliding_window or 0,
        spec.soft_cap or 0.0,
        dtype_number(kv_cache.dtype, "kv_cache"),
    )


def step_view(metadata: AttentionMetadata) -> Step:
    """The batch as C sees it; it borrows the tensors."""
    requests, tokens = metadata.num_reqs, metadata.num_tokens
    check(metadata.query_start_loc, "metadata.query_start_loc", [requests + 1], torch.int32)
    check(metadata.seq_lens, "metadata.seq_lens", [requests], torch.int32)
    check(metadata.block_table, "metadata.block_table", [requests, None], torch.int32, rows_only=True)
    check(metadata.slot_mapping, "metadata.slot_mapping", [tokens], torch.int64)
    check(metadata.positions, "metadata.positions", [tokens], torch.int64)
    return Step(
        metadata.query_start_loc.data_ptr(),
        metadata.seq_lens.data_ptr(),
        metadata.block_table.data_ptr(),
        metadata.block_table.stride(0),
        metadata.slot_mapping.data_ptr(),
        metadata.positions.data_ptr(),
        requests,
        tokens,
    )


def _check_heads(tensor: torch.Tensor, name: str, tokens: int, heads: int, head_dim: int) -> None:
    """`[tokens, heads, head_dim]`, each row contiguous; rows may lie further apart."""
    check(tensor, name, [tokens, heads, head_dim], rows_only=True)
    if heads > 1 and tensor.stride(1) != head_dim:
        raise ValueError(f"{name} must have contiguous rows, not strides {list(tensor.stride())}")


def rope_store(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] float32, changed in place
    cos: torch.Tensor,  # [max_positions, rot_dim / 2] float32
    sin: torch.Tensor,  # [max_positions, rot_dim / 2] float32
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    q_norm: torch.Tensor | None = None,  # [head_dim] float32
    k_norm: torch.Tensor | None = None,  # [head_dim] float32
    eps: float = 1e-6,
    library: CpuLibrary | None = None,
) -> None:
    """Norm (if given) and rotary embedding of queries and keys in place, then keys and values are stored.

    Rotary pairs are (i, i + rot_dim / 2); lanes from rot_dim on stay as they are. Padding rows are
    left alone; rows with slot_mapping -1 are rotated and not stored.
    """
    view = _spec_view(spec, kv_cache)
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    check(qkv, "qkv", [metadata.num_tokens, width], torch.float32)
    check(cos, "cos", [None, None], torch.float32)
    check(sin, "sin", list(cos.shape), torch.float32)
    rot_dim = 2 * cos.shape[1]
    if rot_dim > spec.head_dim:
        raise ValueError(f"cos has {cos.shape[1]} columns, more than half of head_dim {spec.head_dim}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check(norm, name, [spec.head_dim], torch.float32)
    _functions(library or load()).rope_store(
        view,
        step_view(metadata),
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        rot_dim,
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        eps,
        kv_cache.data_ptr(),
    )


def store(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], rotary applied
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    library: CpuLibrary | None = None,
) -> None:
    """Write keys and values, float32 or bfloat16, into the cache; rows with slot_mapping -1 are skipped."""
    view = _spec_view(spec, kv_cache)
    _check_heads(key, "key", metadata.num_tokens, spec.num_kv_heads, spec.head_dim)
    _check_heads(value, "value", metadata.num_tokens, spec.num_kv_heads, spec.head_dim)
    if key.dtype != value.dtype:
        raise ValueError(f"value must be {key.dtype} like key, not {value.dtype}")
    _functions(library or load()).store(
        view,
        step_view(metadata),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        dtype_number(key.dtype, "key"),
        kv_cache.data_ptr(),
    )


def attend(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim], rotary applied
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    out_dtype: torch.dtype | None = None,
    library: CpuLibrary | None = None,
) -> torch.Tensor:
    """Attention output `[num_tokens, num_heads * head_dim]`, by default in the query's dtype.

    Padding rows are zero. The query may be a view of wider rows, such as the q part of qkv.
    """
    view = _spec_view(spec, kv_cache)
    _check_heads(query, "query", metadata.num_tokens, spec.num_heads, spec.head_dim)
    out_dtype = out_dtype or query.dtype
    number = dtype_number(out_dtype, "out_dtype")
    out = torch.empty(metadata.num_tokens, spec.num_heads * spec.head_dim, dtype=out_dtype)
    rows = query.float()  # no copy when it is float32 already
    _functions(library or load()).attend(
        view,
        step_view(metadata),
        rows.data_ptr(),
        rows.stride(0),
        kv_cache.data_ptr(),
        out.data_ptr(),
        number,
    )
    return out
