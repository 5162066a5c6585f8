"""The products of a decoder layer inside of the persistent kernel.

A unit is UNIT rows of a weight with all of K. A program holds the weights of its units in registers before
it waits for the step's row, multiplies that by them, and adds up along K within a warp: no partial sums
leave the program, so between two phases there is nothing but one wait. That is the way for one row, whose
arithmetic is small beside the time in which weights arrive.

Numbers of 16 bits are loaded two in a word and stay so until they are multiplied: single ones would take
twice the registers.
"""
# ruff: noqa: RUF005, RET505  (Triton knows no starred tuple, and compiles what follows a return)
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"

from __future__ import annotations

import triton
import triton.language as tl

UNIT = 8  # rows of a weight; with CHUNK columns, one load of 16 bytes for every thread
CHUNK = 256  # a warp's share of a row
_UNIT = tl.constexpr(UNIT)


@triton.jit
def _tile(pointer, start, there, K: tl.constexpr, CHUNK: tl.constexpr):
    """[UNIT, CHUNK], or as many in words, from column `start` on of rows that begin at pointer [UNIT, 1]."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        words = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
        column = start // 2 + tl.arange(0, CHUNK // 2)[None, :]
        inside = there if K % CHUNK == 0 else there & (column < K // 2)
        return tl.load(words + column, mask=inside, other=0)
    else:
        column = start + tl.arange(0, CHUNK)[None, :]
        inside = there if K % CHUNK == 0 else there & (column < K)
        return tl.load(pointer + column, mask=inside, other=0.0)


@triton.jit
def _numbers(tile):
    """(the even columns, the odd ones) of a tile of words in float32; twice all columns of another tile"""
    if tile.dtype == tl.int32:
        return (tile << 16).to(tl.float32, bitcast=True), (tile & -65536).to(tl.float32, bitcast=True)
    else:
        return tile, tile


@triton.jit
def weight_tiles(
    w_ptr,  # [any, K]
    first,  # the first unit
    offset,  # rows before the first unit
    UNITS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BATCH: tl.constexpr,  # units at a time
    PROGRAMS: tl.constexpr,
):
    """BATCH * K / CHUNK tiles: of every PROGRAMS-th unit; zeros where there is none."""
    tiles = ()
    for j in tl.static_range(BATCH):
        unit = first + j * PROGRAMS
        row = offset + unit * _UNIT + tl.arange(0, _UNIT)[:, None]
        for start in tl.static_range(0, K, CHUNK):
            tiles = tiles + (_tile(w_ptr + row.to(tl.int64) * K, start, unit < UNITS, K, CHUNK),)
    return tiles


@triton.jit
def row_tiles(x_ptr, K: tl.constexpr, CHUNK: tl.constexpr):
    """K / CHUNK tiles of a row: the same numbers in every line, as the tiles of weights need them."""
    tiles = ()
    rows = x_ptr + tl.zeros((_UNIT, 1), dtype=tl.int32)
    for start in tl.static_range(0, K, CHUNK):
        tiles = tiles + (_tile(rows, start, True, K, CHUNK),)
    return tiles


@triton.jit
def plain_row(x_ptr, K: tl.constexpr, CHUNK: tl.constexpr):
    """A row as `times` takes it: even and odd columns of each chunk."""
    row = ()
    tiles = row_tiles(x_ptr, K, CHUNK)
    for chunk in tl.static_range((K + CHUNK - 1) // CHUNK):
        row = row + _numbers(tiles[chunk])
    return row


@triton.jit
def normed_row(x_ptr, norms, eps, K: tl.constexpr, CHUNK: tl.constexpr):
    """(a row times the norm's weight, as `times` takes it; [UNIT] one over its root mean square)"""
    row = ()
    tiles = row_tiles(x_ptr, K, CHUNK)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    squares = tl.zeros(tiles[0].shape, dtype=tl.float32)
    for chunk in tl.static_range((K + CHUNK - 1) // CHUNK):
        even, odd = _numbers(tiles[chunk])
        norm_even, norm_odd = _numbers(norms[chunk])
        squares += even * even
        if tiles[chunk].dtype == tl.int32:
            squares += odd * odd
        row = row + (
            (even * norm_even).to(dtype).to(tl.float32),
            (odd * norm_odd).to(dtype).to(tl.float32),
        )
    return row, tl.rsqrt(tl.sum(squares, axis=1) / K + eps)


@triton.jit
def times(weights, unit: tl.constexpr, row, K: tl.constexpr, CHUNK: tl.constexpr):
    """[UNIT] float32: a unit's weights times a row."""
    CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    acc = tl.zeros(weights[0].shape, dtype=tl.float32)
    for chunk in tl.static_range(CHUNKS):
        even, odd = _numbers(weights[unit * CHUNKS + chunk])
        acc += even * row[2 * chunk]
        if weights[0].dtype == tl.int32:
            acc += odd * row[2 * chunk + 1]
    return tl.sum(acc, axis=1)
