"""Attention of long chunks of prompts, fed by the copy engine of Hopper GPUs.

A chunk of many rows is bound by arithmetic, and what keeps the matrix unit busy is loading whole tiles of
keys and values by one instruction. That needs them in one piece, and pages are not. The chunk's own keys and
values are: they lie in the step's qkv, where rope_store leaves them rotated. What the cache holds of the
request before the chunk is gathered once a layer. A program computes one head of BLOCK_Q rows: all of what
came before, then its own chunk up to the diagonal; only the last keys of either need a mask.

How a prompt is cut into chunks shows in the last bits, so deterministic engines do not come here.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.triton.launch import begin, pdl_options, uses_pdl
from octavo.kernels.triton.quick import kernel

LEAST_ROWS = 256  # of a chunk; shorter ones are not worth gathering for
MOST_GATHERED = 65_536  # tokens of earlier keys and values in one step
BLOCK_Q, BLOCK_KV, STAGES = 64, 64, 3
LOG2_E = 1.4426950408889634


@kernel(do_not_specialize=["pieces_ptr", "table_stride"])
def gather_kernel(
    cache_ptr,  # [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
    table_ptr,  # [table rows, table_stride] int32
    pieces_ptr,  # [pieces, 3] int32: table row, first position, tokens
    out_ptr,  # [pieces * BLOCK, 2 * KV_HEADS, D]
    table_stride,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    piece, column = tl.program_id(0), tl.program_id(1)
    table_row = tl.load(pieces_ptr + piece * 3).to(tl.int64)
    i, d = tl.arange(0, BLOCK), tl.arange(0, D)
    position = tl.load(pieces_ptr + piece * 3 + 1) + i
    there = i < tl.load(pieces_ptr + piece * 3 + 2)
    block = tl.load(table_ptr + table_row * table_stride + position // BLOCK_SIZE, mask=there, other=0)
    source = ((block.to(tl.int64) * 2 * KV_HEADS + column) * BLOCK_SIZE + position % BLOCK_SIZE) * D
    # what is not there becomes zeros: a weight of 0 times anything finite is 0
    x = tl.load(cache_ptr + source[:, None] + d[None, :], mask=there[:, None], other=0.0)
    target = ((piece * BLOCK + i).to(tl.int64) * 2 * KV_HEADS + column) * D
    tl.store(out_ptr + target[:, None] + d[None, :], x)


@triton.jit
def _weigh(scores, most, weight, scale):
    """The running softmax with these scores added; the weights of their keys, and what shrinks the sums."""
    higher = tl.maximum(most, tl.max(scores, axis=1) * scale)
    p = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(most - higher)
    return higher, weight * shrink + tl.sum(p, axis=1), p, shrink[:, None]


@kernel()
def prompt_kernel(
    q_desc,  # [num_tokens, HEADS, D]
    own_desc,  # [num_tokens, HEADS + 2 * KV_HEADS, D], keys rotated
    before_desc,  # [gathered, 2 * KV_HEADS, D]
    out_ptr,  # [num_tokens, HEADS, D]
    tiles_ptr,  # [tiles, 5] int32: first row, rows, the chunk's first row, first gathered row, how many
    positions_ptr,  # [num_tokens] int64
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BEFORE: tl.constexpr,  # some chunk of the step continues its request
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    head, tile = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles_ptr + tile * 5)
    count = tl.load(tiles_ptr + tile * 5 + 1)
    own = tl.load(tiles_ptr + tile * 5 + 2)
    before = tl.load(tiles_ptr + tile * 5 + 3)
    length = tl.load(tiles_ptr + tile * 5 + 4)
    kv_head = head // (HEADS // KV_HEADS)
    q = q_desc.load([first, head, 0]).reshape(BLOCK_Q, D)
    most = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_Q, D), dtype=tl.float32)
    i, j = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)

    if HAS_BEFORE:
        full = length // BLOCK_KV * BLOCK_KV
        for n in tl.range(0, full, BLOCK_KV, num_stages=STAGES):
            k = before_desc.load([before + n, kv_head, 0]).reshape(BLOCK_KV, D)
            v = before_desc.load([before + n, KV_HEADS + kv_head, 0]).reshape(BLOCK_KV, D)
            scores = tl.dot(q, k.T, input_precision=PRECISION)
            most, weight, p, shrink = _weigh(scores, most, weight, scale)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink, input_precision=PRECISION)
        if full < length:
            k = before_desc.load([before + full, kv_head, 0]).reshape(BLOCK_KV, D)
            v = before_desc.load([before + full, KV_HEADS + kv_head, 0]).reshape(BLOCK_KV, D)
            scores = tl.dot(q, k.T, input_precision=PRECISION)
            scores = tl.where((full + j < length)[None, :], scores, float("-inf"))
            most, weight, p, shrink = _weigh(scores, most, weight, scale)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink, input_precision=PRECISION)

    tl.static_assert(BLOCK_Q == BLOCK_KV, "a tile meets the diagonal in one tile of keys")
    row = first - own  # of the tile's first row within its chunk
    # The scores of the next keys are on their way while the softmax of these ones runs.
    k = own_desc.load([own, HEADS + kv_head, 0]).reshape(BLOCK_KV, D)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    full = (row + 1) // BLOCK_KV * BLOCK_KV
    for n in tl.range(0, full, BLOCK_KV, num_stages=STAGES):
        k = own_desc.load([own + n + BLOCK_KV, HEADS + kv_head, 0]).reshape(BLOCK_KV, D)
        v = own_desc.load([own + n, HEADS + KV_HEADS + kv_head, 0]).reshape(BLOCK_KV, D)
        following = tl.dot(q, k.T, input_precision=PRECISION)
        most, weight, p, shrink = _weigh(scores, most, weight, scale)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink, input_precision=PRECISION)
        scores = following
    v = own_desc.load([own + full, HEADS + KV_HEADS + kv_head, 0]).reshape(BLOCK_KV, D)
    # rows behind the chunk are others', or padding: whatever they hold, a weight of 0 must make it 0
    v = tl.where((full + j < row + count)[:, None], v, 0.0)
    scores = tl.where((full + j)[None, :] <= (row + i)[:, None], scores, float("-inf"))
    most, weight, p, shrink = _weigh(scores, most, weight, scale)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink, input_precision=PRECISION)

    # a request that ended meanwhile has padding in place of its rows: zeros
    valid = i < count
    computed = tl.load(positions_ptr + first + i, mask=valid, other=-1) >= 0
    out = tl.where(computed[:, None], acc / weight[:, None], 0.0)
    d = tl.arange(0, D)
    place = ((first + i).to(tl.int64) * HEADS + head) * D
    tl.store(out_ptr + place[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=valid[:, None])


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Where the long chunks of a step lie; the same for all layers."""

    tiles: torch.Tensor  # [tiles, 5] int32, see prompt_kernel
    pieces: torch.Tensor  # [pieces, 3] int32, see gather_kernel


def serves(spec: AttentionSpec, weights: torch.Tensor) -> bool:
    """True if long chunks of this layer's attention can be computed here, on this tensor's device."""
    plain = spec.sliding_window is None and spec.soft_cap is None
    return plain and weights.element_size() == 2 and spec.head_dim in (64, 128) and uses_pdl(weights)


def plan(metadata: AttentionMetadata) -> ChunkPlan:
    """Cut the step's long chunks into tiles. One copy to the device; the host does not wait."""
    tiles: list[tuple[int, int, int, int, int]] = []
    pieces: list[tuple[int, int, int]] = []
    for table_row, first, rows, start in metadata.long_chunks:
        before = len(pieces) * BLOCK_KV
        pieces += [
            (table_row, position, min(BLOCK_KV, start - position)) for position in range(0, start, BLOCK_KV)
        ]
        tiles += [
            (first + row, min(BLOCK_Q, rows - row), first, before, start) for row in range(0, rows, BLOCK_Q)
        ]
    # those that see most begin first
    tiles.sort(key=lambda tile: tile[0] - tile[2] + tile[4], reverse=True)
    numbers = np.array([*(n for tile in tiles for n in tile), *(n for piece in pieces for n in piece)])
    sent = torch.from_numpy(numbers.astype(np.int32))
    device = metadata.positions.device
    if device.type == "cuda":
        sent = sent.pin_memory()
    sent = sent.to(device, non_blocking=True)
    count = 5 * len(tiles)
    return ChunkPlan(sent[:count].view(-1, 5), sent[count:].view(-1, 3))


def attend(
    q: torch.Tensor,  # [num_tokens, heads, head_dim]
    qkv: torch.Tensor,  # [num_tokens, (heads + 2 * kv_heads) * head_dim], keys rotated
    kv_cache: torch.Tensor,  # [blocks, 2, kv_heads, block_size, head_dim]
    out: torch.Tensor,  # [num_tokens, heads, head_dim], written where the plan has rows
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    plan: ChunkPlan,
) -> None:
    """Attention of the step's long chunks."""
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    num_tokens, width = metadata.num_tokens, heads + 2 * kv_heads
    if q.shape != (num_tokens, heads, dim) or qkv.shape != (num_tokens, width * dim):
        raise ValueError(f"queries {tuple(q.shape)} and qkv {tuple(qkv.shape)} do not fit {spec}")
    if out.shape != q.shape or not (q.is_contiguous() and qkv.is_contiguous() and out.is_contiguous()):
        raise ValueError("queries, qkv and the output must be contiguous and of one size")
    if kv_cache.shape[1:3] != (2, kv_heads) or kv_cache.shape[4] != dim:
        raise ValueError(f"the KV cache {tuple(kv_cache.shape)} is not that of {spec}")
    pdl = uses_pdl(q)
    before = q.view(-1, dim)[: 2 * kv_heads].view(1, 2 * kv_heads, dim)  # nothing is read of it
    if len(plan.pieces):
        before = torch.empty(len(plan.pieces) * BLOCK_KV, 2 * kv_heads, dim, dtype=q.dtype, device=q.device)
        gather_kernel[(len(plan.pieces), 2 * kv_heads)](
            kv_cache, metadata.block_table, plan.pieces, before, metadata.block_table.stride(0),
            KV_HEADS=kv_heads, D=dim, BLOCK_SIZE=kv_cache.shape[3], BLOCK=BLOCK_KV, PDL=pdl, num_warps=4,
            **pdl_options(pdl),
        )  # fmt: skip
    prompt_kernel[(heads, len(plan.tiles))](
        _rows_of(q, BLOCK_Q), _rows_of(qkv.view(num_tokens, width, dim), BLOCK_KV),
        _rows_of(before, BLOCK_KV), out, plan.tiles, metadata.positions, spec.scale * LOG2_E, HEADS=heads,
        KV_HEADS=kv_heads, D=dim,
        BLOCK_Q=BLOCK_Q, BLOCK_KV=BLOCK_KV, STAGES=STAGES, HAS_BEFORE=len(plan.pieces) > 0, PRECISION="tf32",
        PDL=pdl, num_warps=4, **pdl_options(pdl),
    )  # fmt: skip


def _rows_of(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tiles of so many rows of one head."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, x.shape[2]])


def warm_up(spec: AttentionSpec, block_size: int, weights: torch.Tensor) -> None:
    """Have the kernels compiled for what this tensor's type and device are."""
    if not serves(spec, weights):
        return
    like: dict[str, Any] = {"dtype": weights.dtype, "device": weights.device}
    rows, zeros = BLOCK_Q, torch.zeros(BLOCK_Q, dtype=torch.int64, device=weights.device)
    width = spec.num_heads + 2 * spec.num_kv_heads
    metadata = AttentionMetadata(
        query_start_loc=zeros[:2].int(), seq_lens=zeros[:1].int(), block_table=zeros.int()[None],
        slot_mapping=zeros, positions=zeros, num_reqs=1, num_tokens=rows, max_query_len=rows,
        max_seq_len=rows, long_chunks=((0, 0, rows, 1),),
    )  # fmt: skip
    q = torch.zeros(rows, spec.num_heads, spec.head_dim, **like)
    cache = torch.zeros(1, 2, spec.num_kv_heads, block_size, spec.head_dim, **like)
    qkv = torch.zeros(rows, width * spec.head_dim, **like)
    attend(q, qkv, cache, torch.empty_like(q), metadata, spec, plan(metadata))
