"""Products of few rows with a weight, each with what follows it in a decoder layer.

A step of 1 to 128 rows is bound by reading the weights, so a kernel here is a stream of one weight
through the matrix unit. A program owns BLOCK_N rows of the weight and one part of the K dimension;
the rows of the step, padded to BLOCK_M, are the narrow side of its product. Partial sums go to a
workspace in float32, and the last program to arrive at a tile adds the parts in their order and
does the rest of the work:

    plain      + bias                                          qkv and others where nothing is fused; logits
    residual   residual += product; also (residual * weight of the next norm) and its sums of squares
    gate_up    silu(gate) * up
    qkv        bias, qk-norm, rotary; q into its buffer, k and v into the KV cache

The parts of K depend on the weight's shape alone, never on the number of rows, and each element is
summed in one order: a row's result has the same bits alone and among 127 others.

A norm is split between its neighbours. Its scale 1/rms(x) is one number a row, so it can be applied
to the product's result; its weight is applied by whoever writes x. The kernel before writes
x * weight and, for every 64 columns, the sum of squares of x; the kernel after adds those up.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from octavo.kernels.triton.launch import dot_precision, next_power_of_2, pdl_options, uses_pdl
from octavo.kernels.triton.product_kernels import gate_up_kernel, plain_kernel, residual_kernel
from octavo.kernels.triton.qkv_kernel import qkv_kernel

MAX_ROWS = 128  # the most rows these kernels take
SQUARES_WIDTH = 64  # columns behind one sum of squares
# Of the GPU that the cuts are chosen for.
PROCESSORS = 132
SHARED_MEMORY = 226 * 1024  # bytes that the programs of a multiprocessor share


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut. `split` must not depend on the number of rows."""

    block_n: int
    split: int
    block_k: int = 128
    stages: int = 4
    warps: int = 4
    prefetch: int = 0  # lines of 128 bytes a weight row fetched into the cache early, at most
    early: int = 0  # columns of a part loaded before the launch before is complete; a power of two


@dataclass(slots=True)
class Workspace:
    """Partial sums and counters, shared by all products of one stream."""

    partial: torch.Tensor  # float32
    counters: torch.Tensor  # int32, zero between launches

    @classmethod
    def allocate(cls, elements: int, tiles: int, device: torch.device) -> Workspace:
        """Room for so many partial sums and so many tiles."""
        return cls(
            torch.empty(elements, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )

    def check(self, elements: int, tiles: int) -> None:
        """Raise if a product needs more."""
        if elements > self.partial.numel() or tiles > self.counters.numel():
            raise ValueError(f"the workspace holds {self.partial.numel()} sums, {elements} are needed")


def padded_rows(num_rows: int) -> int:
    """Rows of the tile that holds num_rows of them: 16, 32, 64 or 128."""
    if not 0 < num_rows <= MAX_ROWS:
        raise ValueError(f"{num_rows} rows: these kernels take 1 to {MAX_ROWS}")
    return max(16, next_power_of_2(num_rows))


def choose_tiling(kind: str, n: int, k: int, num_rows: int) -> Tiling:
    """A cut that measured well on one H200; `split` is the same whatever the number of rows.

    About a hundred programs fill the card: fewer, larger ones end sooner than many whose parts
    have to be added up.
    """
    rows = padded_rows(num_rows)
    if kind == "head":
        return Tiling(64, 1, stages=3) if rows == 16 else Tiling(128, 1, 64, 4 if rows > 64 else 6)
    if kind != "gate_up" and n * k <= 1 << 23 and k % 512 == 0:
        # a small weight: every program holds its part of it before the wait ends
        split = k // 512
        if kind == "qkv" and rows > 64:
            return Tiling(64, split, 64, 4, warps=8)
        if kind == "residual" and rows > 32 and split > 4:
            return _spread(Tiling(64, split, warps=8), n, rows)
        return Tiling(64, split, 64, 1, warps=8, early=512)
    width = 128 if kind == "qkv" else 64
    tiles = -(-n // width)
    split = 1
    while k % (split * 2 * 64) == 0 and k // split > 256 and (tiles * split < 96 or k // split > 4096):
        if split == 4 and k <= 4096:
            break
        split *= 2
    part = k // split
    block_k = 128 if part % 128 == 0 else 64  # parts end at the same column whatever the number of rows
    early = 256 if kind == "residual" and rows == 16 and k > 2 * n and part > 1024 else 0
    warps = 8 if kind == "qkv" or (kind == "residual" and rows > 32) else 4
    return _spread(Tiling(width, split, block_k, warps=warps, early=early), n, rows)


def _spread(tiling: Tiling, n: int, rows: int) -> Tiling:
    """With so many buffers that no multiprocessor holds more programs than its share of them.

    A dependent launch starts wherever room becomes free first. If two programs fit where there is one for
    each, some multiprocessors get two and others none: that cost 1 to 3 microseconds a product, and 9
    where three fitted instead of two.
    """
    programs = -(-n // tiling.block_n) * tiling.split
    share = min(3, -(-programs // PROCESSORS))
    column = 2 * (tiling.block_n + rows)  # bytes, of the weight and of x
    fit = SHARED_MEMORY // share // column - tiling.early  # columns that a program may have room for
    too_few = SHARED_MEMORY // (share + 1) // column - tiling.early  # with which one more would fit
    block_k = tiling.block_k if fit >= 3 * tiling.block_k else 64
    least = 4 if tiling.block_n > 64 else 3
    stages = min(max(least, too_few // block_k + 1), fit // block_k)
    return replace(tiling, block_k=block_k, stages=stages)


def _grid_options(
    x: torch.Tensor, n: int, k: int, tiling: Tiling, num_rows: int
) -> tuple[int, bool, dict[str, Any]]:
    """(tiles, pdl, arguments that all products share)"""
    if x.element_size() == 4:  # twice as wide: half as deep, or the buffers do not fit
        tiling = replace(tiling, block_k=min(tiling.block_k, 32), stages=min(tiling.stages, 3), early=0)
    tiles = -(-n // tiling.block_n)
    k_part = -(-k // (tiling.split * tiling.block_k)) * tiling.block_k
    even = n % tiling.block_n == 0 and k % (tiling.split * tiling.block_k) == 0
    pdl = uses_pdl(x)
    lines = k_part * x.element_size() // 128
    options: dict[str, Any] = {
        "K": k,
        "K_PART": k_part,
        "SPLIT": tiling.split,
        "BLOCK_N": tiling.block_n,
        "BLOCK_M": padded_rows(num_rows),
        "BLOCK_K": tiling.block_k,
        "STAGES": tiling.stages,
        "EARLY": tiling.early if even else 0,
        "PREFETCH": 0 if lines < 1 else min(tiling.prefetch, 1 << (lines.bit_length() - 1)),
        "EVEN": even,
        "PRECISION": dot_precision(x.dtype),
        "PDL": pdl,
        "num_warps": tiling.warps,
        **pdl_options(pdl),
    }
    return tiles, pdl, options


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(weight.shape)} do not multiply")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"{x.dtype} on {x.device} times {weight.dtype} on {weight.device}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError("x and weight must be contiguous")


def plain(
    x: torch.Tensor,  # [num_rows, K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None,
    out: torch.Tensor,  # [num_rows, N], any dtype
    workspace: Workspace,
    tiling: Tiling | None = None,
) -> None:
    """out = x W^T + bias"""
    _check(x, weight)
    num_rows, (n, k) = x.shape[0], weight.shape
    tiling = tiling or choose_tiling("plain", n, k, num_rows)
    tiles, _, options = _grid_options(x, n, k, tiling, num_rows)
    if tiling.split > 1:
        workspace.check(tiles * tiling.split * num_rows * tiling.block_n, tiles)
    plain_kernel[(tiles, tiling.split)](
        x, weight, x if bias is None else bias, out, workspace.partial, workspace.counters, num_rows,
        N=n, HAS_BIAS=bias is not None, **options,
    )  # fmt: skip


def residual(
    x: torch.Tensor,  # [num_rows, K]
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None,
    stream: torch.Tensor,  # [num_rows, N], changed in place
    next_norm: torch.Tensor,  # [N]
    scaled: torch.Tensor,  # [num_rows, N], written: stream * next_norm
    squares: torch.Tensor,  # [num_rows, N / 64] float32, written
    workspace: Workspace,
    tiling: Tiling | None = None,
) -> None:
    """stream += x W^T + bias, and what the next norm needs."""
    _check(x, weight)
    num_rows, (n, k) = x.shape[0], weight.shape
    if n % SQUARES_WIDTH:
        raise ValueError(f"a residual stream of {n} is not a multiple of {SQUARES_WIDTH}")
    tiling = tiling or choose_tiling("residual", n, k, num_rows)
    if n % tiling.block_n or tiling.block_n % SQUARES_WIDTH:
        raise ValueError(f"tiles of {tiling.block_n} do not cut a residual stream of {n}")
    tiles, _, options = _grid_options(x, n, k, tiling, num_rows)
    workspace.check(tiles * tiling.split * num_rows * tiling.block_n, tiles)
    residual_kernel[(tiles, tiling.split)](
        x, weight, x if bias is None else bias, stream, next_norm, scaled, squares, workspace.partial,
        workspace.counters, num_rows, N=n, HAS_BIAS=bias is not None, SQUARES=SQUARES_WIDTH,
        **options,
    )  # fmt: skip


def gate_up(
    x: torch.Tensor,  # [num_rows, K]
    weight: torch.Tensor,  # [2 * N, K]
    bias: torch.Tensor | None,
    squares: torch.Tensor | None,  # [num_rows, K / 64] float32 of the stream behind x; None: x is normed
    eps: float,
    out: torch.Tensor,  # [num_rows, N]
    workspace: Workspace,
    tiling: Tiling | None = None,
) -> None:
    """out = silu(gate) * up"""
    _check(x, weight)
    num_rows, (n, k) = x.shape[0], weight.shape
    tiling = tiling or choose_tiling("gate_up", n, k, num_rows)
    tiles, _, options = _grid_options(x, n, k, tiling, num_rows)
    workspace.check(tiles * tiling.split * num_rows * tiling.block_n, tiles)
    count = 1 if squares is None else squares.shape[1]
    gate_up_kernel[(tiles, tiling.split)](
        x, weight, x if bias is None else bias, x if squares is None else squares, out, workspace.partial,
        workspace.counters, num_rows, eps, N=n // 2, HAS_BIAS=bias is not None, NORMED=squares is not None,
        SQUARES=count, SQUARES_PADDED=next_power_of_2(count), **options,
    )  # fmt: skip


def qkv(
    x: torch.Tensor,  # [num_rows, K]
    weight: torch.Tensor,  # [(heads + 2 * kv_heads) * head_dim, K]
    bias: torch.Tensor | None,
    squares: torch.Tensor,  # [num_rows, K / 64] float32
    eps: float,
    norms: tuple[torch.Tensor, torch.Tensor] | None,  # of q and k, [head_dim]
    cos: torch.Tensor,  # [positions, rotary_dim / 2] float32
    sin: torch.Tensor,
    positions: torch.Tensor,  # [num_rows] int64
    slots: torch.Tensor,  # [num_rows] int64
    q: torch.Tensor,  # [num_rows, heads, head_dim], written
    kv_cache: torch.Tensor,  # [blocks, 2, kv_heads, block_size, head_dim], written
    workspace: Workspace,
    tiling: Tiling | None = None,
) -> None:
    """Queries into q, keys and values into the cache; head_dim is a power of two from 16 on."""
    _check(x, weight)
    num_rows, (n, k) = x.shape[0], weight.shape
    _, _, kv_heads, block_size, head_dim = kv_cache.shape
    heads = n // head_dim - 2 * kv_heads
    if head_dim != next_power_of_2(head_dim) or head_dim < 16 or q.shape != (num_rows, heads, head_dim):
        raise ValueError(f"q {tuple(q.shape)} does not go with {heads} heads of {head_dim}")
    tiling = replace(tiling or choose_tiling("qkv", n, k, num_rows), block_n=head_dim)
    if head_dim > 128:  # a whole head does not leave room for deep buffers
        tiling = replace(tiling, block_k=64, stages=3, early=0, warps=8)
    tiles, _, options = _grid_options(x, n, k, tiling, num_rows)
    workspace.check(tiles * tiling.split * num_rows * tiling.block_n, tiles)
    q_norm, k_norm = norms or (x, x)
    qkv_kernel[(tiles, tiling.split)](
        x, weight, x if bias is None else bias, squares, q_norm, k_norm, cos, sin, positions, slots, q,
        kv_cache, workspace.partial, workspace.counters, num_rows, eps,
        HAS_BIAS=bias is not None, SQUARES=squares.shape[1], SQUARES_PADDED=next_power_of_2(squares.shape[1]),
        NORM=norms is not None, HALF_ROTARY=cos.shape[1], HEADS=heads, KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size, BLOCK_E=min(8 * tiling.warps, padded_rows(num_rows)), **options,
    )  # fmt: skip
