"""Kernels that work a row at a time: embedding, norms, SiLU·mul, and keys and values into the cache.

The steps of few rows have most of these inside their products (see products); these serve the
larger ones, and the two ends of every forward.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton.language as tl

from octavo.kernels.triton.launch import begin, next_power_of_2, pdl_options, uses_pdl
from octavo.kernels.triton.product_sums import row_scales
from octavo.kernels.triton.products import SQUARES_WIDTH
from octavo.kernels.triton.qkv_kernel import kv_offsets
from octavo.kernels.triton.quick import kernel


@kernel()
def embed_kernel(
    ids_ptr,  # [num_tokens] int64
    table_ptr,  # [vocab, WIDTH]
    out_ptr,  # [num_tokens, WIDTH]
    norm_ptr,  # [WIDTH]
    scaled_ptr,  # [num_tokens, WIDTH]
    squares_ptr,  # [num_tokens, WIDTH / SQUARES] float32
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    SQUARES: tl.constexpr,  # columns of one sum of squares; 0: only the rows are wanted
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row)
    t, c = tl.arange(0, TILES), tl.arange(0, SQUARES)
    column = t[:, None] * SQUARES + c[None, :]
    mask = column < WIDTH
    x = tl.load(table_ptr + token * WIDTH + column, mask=mask, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, x, mask=mask)
    if norm_ptr is not None:
        wide = x.to(tl.float32)
        norm = tl.load(norm_ptr + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + row * WIDTH + column, (wide * norm).to(x.dtype), mask=mask)
        squares = tl.sum(wide * wide, axis=1)
        tl.store(squares_ptr + row * (WIDTH // SQUARES) + t, squares, mask=t < WIDTH // SQUARES)


@kernel()
def scale_kernel(
    scaled_ptr,  # [num_tokens, WIDTH]
    squares_ptr,  # [num_tokens, TILES]
    out_ptr,  # [num_tokens, WIDTH]
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    rows = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, PADDED)
    scale = row_scales(squares_ptr, rows, rows >= 0, eps, WIDTH, TILES, TILES_PADDED)
    where = rows[:, None].to(tl.int64) * WIDTH + column[None, :]
    mask = column[None, :] < WIDTH
    x = tl.load(scaled_ptr + where, mask=mask, other=0.0)
    tl.store(out_ptr + where, (x.to(tl.float32) * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@kernel()
def norm_kernel(
    x_ptr,  # [num_rows, WIDTH], row stride x_stride
    residual_ptr,  # [num_rows, WIDTH], changed in place if ADDS
    weight_ptr,
    out_ptr,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    mask = column < WIDTH
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)
    if ADDS:
        before = tl.load(residual_ptr + row * WIDTH + column, mask=mask, other=0.0)
        x = (x.to(tl.float32) + before.to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * WIDTH + column, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    # rounded before the weight, as the models were trained
    normed = (wide * scale).to(out_ptr.dtype.element_ty).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, normed.to(out_ptr.dtype.element_ty), mask=mask)


@kernel()
def silu_mul_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(x_ptr + row * 2 * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * WIDTH + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@kernel()
def store_kernel(
    key_ptr,  # [num_tokens, KV_HEADS, D], strides of token and head given
    value_ptr,
    slots_ptr,
    cache_ptr,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        d = tl.arange(0, D_PADDED)
        key = tl.load(key_ptr + token * key_stride + head * key_head_stride + d, mask=d < D)
        value = tl.load(value_ptr + token * value_stride + head * value_head_stride + d, mask=d < D)
        dtype = cache_ptr.dtype.element_ty
        tl.store(
            cache_ptr + kv_offsets(slot, head, 0, BLOCK_SIZE, KV_HEADS, D) + d, key.to(dtype), mask=d < D
        )
        tl.store(
            cache_ptr + kv_offsets(slot, head, 1, BLOCK_SIZE, KV_HEADS, D) + d, value.to(dtype), mask=d < D
        )


def embed(
    input_ids: torch.Tensor,  # [num_tokens] int64
    table: torch.Tensor,  # [vocab, width]
    out: torch.Tensor,  # [num_tokens, width], written
    next_norm: torch.Tensor | None = None,  # [width]
    scaled: torch.Tensor | None = None,  # [num_tokens, width], written: out * next_norm
    squares: torch.Tensor | None = None,  # [num_tokens, width / 64] float32, written
) -> None:
    """Rows of the table, and what the next norm needs of them if it is given."""
    width = table.shape[1]
    if out.shape != (len(input_ids), width) or not table.is_contiguous():
        raise ValueError(f"rows of a {tuple(table.shape)} table into {tuple(out.shape)}")
    if next_norm is not None and width % SQUARES_WIDTH:
        raise ValueError(f"a residual stream of {width} is not a multiple of {SQUARES_WIDTH}")
    if len(input_ids) == 0:
        return
    pdl = uses_pdl(out)
    tiles = next_power_of_2(-(-width // SQUARES_WIDTH))
    embed_kernel[(len(input_ids),)](
        input_ids, table, out, next_norm, scaled, squares, WIDTH=width, TILES=tiles, SQUARES=SQUARES_WIDTH,
        PDL=pdl, num_warps=4, **pdl_options(pdl),
    )  # fmt: skip


def apply_scale(
    scaled: torch.Tensor,  # [num_tokens, width]: rows times a norm's weight
    squares: torch.Tensor,  # [num_tokens, width / 64]
    out: torch.Tensor,  # [num_tokens, width], written
    eps: float,
) -> None:
    """The rest of a norm: each row over its root mean square."""
    width, tiles = scaled.shape[1], squares.shape[1]
    pdl = uses_pdl(out)
    scale_kernel[(len(out),)](
        scaled, squares, out, eps, WIDTH=width, PADDED=next_power_of_2(width), TILES=tiles,
        TILES_PADDED=next_power_of_2(tiles), PDL=pdl, num_warps=4, **pdl_options(pdl),
    )  # fmt: skip


def norm(
    x: torch.Tensor,  # [num_rows, width], rows may be strided
    weight: torch.Tensor,  # [width]
    eps: float,
    residual: torch.Tensor | None = None,  # [num_rows, width]: x is added to it first
    out: torch.Tensor | None = None,  # [num_rows, width], written and returned
) -> torch.Tensor:
    """rms norm of x, or of residual + x: [num_rows, width] in x's dtype."""
    num_rows, width = x.shape
    if x.stride(1) != 1 or (residual is not None and not residual.is_contiguous()):
        raise ValueError("the numbers of a row must lie side by side")
    if out is None:
        out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    elif out.shape != x.shape or not out.is_contiguous():
        raise ValueError(f"{tuple(x.shape)} rows into {tuple(out.shape)}, which must be contiguous")
    if num_rows == 0:
        return out
    pdl = uses_pdl(x)
    padded = next_power_of_2(width)
    norm_kernel[(num_rows,)](
        x, x if residual is None else residual, weight, out, x.stride(0), eps, WIDTH=width, PADDED=padded,
        ADDS=residual is not None, PDL=pdl, num_warps=4 if padded <= 4096 else 8, **pdl_options(pdl),
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[num_tokens, 2 * width] -> [num_tokens, width]"""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if not gate_up.is_contiguous():
        raise ValueError("gate_up must be contiguous")
    out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    pdl = uses_pdl(gate_up)
    block = min(2048, next_power_of_2(width))
    silu_mul_kernel[(num_rows, -(-width // block))](
        gate_up, out, WIDTH=width, BLOCK=block, PDL=pdl, num_warps=8, **pdl_options(pdl)
    )
    return out


def store(
    key: torch.Tensor,  # [num_tokens, kv_heads, head_dim]
    value: torch.Tensor,
    slots: torch.Tensor,  # [num_tokens] int64
    kv_cache: torch.Tensor,
) -> None:
    """Keys and values of the rows that have a slot into the cache."""
    _, _, kv_heads, block_size, head_dim = kv_cache.shape
    if key.shape[1:] != (kv_heads, head_dim) or key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError(f"keys {tuple(key.shape)} do not fit the cache {tuple(kv_cache.shape)}")
    if len(key) == 0:
        return
    pdl = uses_pdl(key)
    store_kernel[(len(key), kv_heads)](
        key, value, slots, kv_cache, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        KV_HEADS=kv_heads, D=head_dim, D_PADDED=next_power_of_2(head_dim), BLOCK_SIZE=block_size, PDL=pdl,
        num_warps=1, **pdl_options(pdl),
    )  # fmt: skip
