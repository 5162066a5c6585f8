"""qk-norm, rotary, and keys and values into the cache, for the rows of larger steps.

Where heads turn as a whole and are a power of two wide, a program takes a few heads of one kind for some
tokens, so that their angles are read once. Other models take a program a head.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton.language as tl

from octavo.kernels.triton.launch import begin, next_power_of_2, pdl_options, uses_pdl
from octavo.kernels.triton.qkv_kernel import kv_offsets, rotate_head, turn
from octavo.kernels.triton.quick import kernel

_BLOCK_T = 16  # tokens of a program
_FEW_TOKENS = 512  # up to so many, a program takes one head: there are too few to fill the card otherwise


@kernel(do_not_specialize=["num_tokens"])
def rope_store_kernel(
    qkv_ptr,  # [num_tokens, HEADS + 2 * KV_HEADS, D]; KEEPS: the keys are changed in place as well
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_ptr,  # [num_tokens, HEADS, D]
    cache_ptr,
    num_tokens,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    valid = tokens < num_tokens
    d = tl.arange(0, D_PADDED)
    base = qkv_ptr + (tokens.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head)[:, None] * D
    mask = valid[:, None] & (d[None, :] < D)
    x = tl.load(base + d[None, :], mask=mask, other=0.0).to(tl.float32)
    slots = tl.load(slots_ptr + tokens, mask=valid, other=-1)
    if head < HEADS + KV_HEADS:
        partner = tl.where(d < HALF_ROTARY, d + HALF_ROTARY, d - HALF_ROTARY)
        partner = tl.where(d < 2 * HALF_ROTARY, partner, d)
        other = tl.load(base + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        position = tl.maximum(tl.load(positions_ptr + tokens, mask=valid, other=0), 0)
        norm_ptr = q_norm_ptr
        if head >= HEADS:
            norm_ptr = k_norm_ptr
        x = rotate_head(
            x, other, norm_ptr, cos_ptr, sin_ptr, position, valid, eps, D, HALF_ROTARY, NORM, D_PADDED
        )
    if head < HEADS:
        out = q_ptr + (tokens.to(tl.int64) * HEADS + head)[:, None] * D + d[None, :]
        tl.store(out, x.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        is_value = head >= HEADS + KV_HEADS
        kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
        where = kv_offsets(slots, kv_head, tl.where(is_value, 1, 0), BLOCK_SIZE, KV_HEADS, D)
        out = cache_ptr + where[:, None] + d[None, :]
        tl.store(out, x.to(cache_ptr.dtype.element_ty), mask=mask & (slots >= 0)[:, None])
        if KEEPS:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
            if not is_value:
                tl.debug_barrier()  # a number is read by whoever computes its partner
                tl.store(base + d[None, :], x.to(qkv_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["num_tokens"])
def whole_heads_kernel(
    qkv_ptr,  # [num_tokens, HEADS + 2 * KV_HEADS, D]; KEEPS: the keys are changed in place as well
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,  # [positions, HALF] float32
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_ptr,  # [num_tokens, HEADS, D]
    cache_ptr,
    num_tokens,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,  # heads of a program; they are all queries, all keys or all values
    KEEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    first = tl.program_id(0) * GROUP
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = tokens < num_tokens
    mask = valid[:, None]
    j = tl.arange(0, HALF)
    rows = qkv_ptr + (tokens.to(tl.int64) * (HEADS + 2 * KV_HEADS) * D)[:, None] + j[None, :]
    dtype = cache_ptr.dtype.element_ty
    slots = tl.load(slots_ptr + tokens, mask=valid & (first >= HEADS), other=-1)
    there = (slots >= 0)[:, None]
    if first >= HEADS + KV_HEADS:
        for h in tl.static_range(GROUP):
            value = rows + (first + h) * D
            one = tl.load(value, mask=mask, other=0.0)
            two = tl.load(value + HALF, mask=mask, other=0.0)
            kv_head = first + h - HEADS - KV_HEADS
            place = kv_offsets(slots, kv_head, 1, BLOCK_SIZE, KV_HEADS, D)[:, None] + j[None, :]
            tl.store(cache_ptr + place, one.to(dtype), mask=there)
            tl.store(cache_ptr + place + HALF, two.to(dtype), mask=there)
    else:
        position = tl.maximum(tl.load(positions_ptr + tokens, mask=valid, other=0), 0)
        angle = (position * HALF)[:, None] + j[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        norm_ptr = q_norm_ptr
        if first >= HEADS:
            norm_ptr = k_norm_ptr
        if NORM:
            low_norm = tl.load(norm_ptr + j).to(tl.float32)[None, :]
            high_norm = tl.load(norm_ptr + HALF + j).to(tl.float32)[None, :]
        for h in tl.static_range(GROUP):
            source = rows + (first + h) * D
            low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
            if NORM:
                scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / D + eps)[:, None]
                low = low * scale * low_norm
                high = high * scale * high_norm
            turned_low, turned_high = turn(low, high, cos, sin)
            if first < HEADS:
                out = q_ptr + (tokens.to(tl.int64) * HEADS + first + h)[:, None] * D + j[None, :]
                tl.store(out, turned_low.to(dtype), mask=mask)
                tl.store(out + HALF, turned_high.to(dtype), mask=mask)
            else:
                kv_head = first + h - HEADS
                where = kv_offsets(slots, kv_head, 0, BLOCK_SIZE, KV_HEADS, D)[:, None] + j[None, :]
                tl.store(cache_ptr + where, turned_low.to(dtype), mask=there)
                tl.store(cache_ptr + where + HALF, turned_high.to(dtype), mask=there)
                if KEEPS:
                    tl.store(source, turned_low.to(dtype), mask=mask)
                    tl.store(source + HALF, turned_high.to(dtype), mask=mask)


def _heads_of_a_program(heads: int, kv_heads: int, head_dim: int, rotary_dim: int) -> int:
    """0: they do not turn as a whole, or have no power of two to be cut at."""
    if head_dim != rotary_dim or head_dim != next_power_of_2(head_dim) or head_dim < 16:
        return 0
    return next(group for group in (4, 2, 1) if heads % group == 0 and kv_heads % group == 0)


def rope_store(
    qkv: torch.Tensor,  # [num_tokens, (heads + 2 * kv_heads) * head_dim]
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    cos: torch.Tensor,  # [positions, rotary_dim / 2] float32
    sin: torch.Tensor,
    positions: torch.Tensor,  # [num_tokens] int64
    slots: torch.Tensor,  # [num_tokens] int64
    kv_cache: torch.Tensor,  # [blocks, 2, kv_heads, block_size, head_dim], written
    keeps: bool = False,
) -> torch.Tensor:
    """qk-norm and rotary; keys and values into the cache; returns q [num_tokens, heads, head_dim].

    `keeps`: the keys in qkv are replaced by what the cache gets.
    """
    _, _, kv_heads, block_size, head_dim = kv_cache.shape
    num_tokens = qkv.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if not qkv.is_contiguous():
        raise ValueError("qkv must be contiguous")
    q = torch.empty(num_tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = norms or (qkv, qkv)
    pdl = uses_pdl(qkv)
    blocks = -(-num_tokens // _BLOCK_T)
    group = _heads_of_a_program(heads, kv_heads, head_dim, 2 * cos.shape[1])
    if group:
        group = group if num_tokens > _FEW_TOKENS else 1
        whole_heads_kernel[((heads + 2 * kv_heads) // group, blocks)](
            qkv, q_norm, k_norm, cos, sin, positions, slots, q, kv_cache, num_tokens, eps, HEADS=heads,
            KV_HEADS=kv_heads, D=head_dim, HALF=head_dim // 2, NORM=norms is not None,
            BLOCK_SIZE=block_size, BLOCK_T=_BLOCK_T, GROUP=group, KEEPS=keeps, PDL=pdl, num_warps=4,
            **pdl_options(pdl),
        )  # fmt: skip
        return q
    rope_store_kernel[(blocks, heads + 2 * kv_heads)](
        qkv, q_norm, k_norm, cos, sin, positions, slots, q, kv_cache, num_tokens, eps, HEADS=heads,
        KV_HEADS=kv_heads, D=head_dim, D_PADDED=max(16, next_power_of_2(head_dim)), HALF_ROTARY=cos.shape[1],
        NORM=norms is not None, BLOCK_SIZE=block_size, BLOCK_T=_BLOCK_T, KEEPS=keeps, PDL=pdl,
        num_warps=4, **pdl_options(pdl),
    )  # fmt: skip
    return q
