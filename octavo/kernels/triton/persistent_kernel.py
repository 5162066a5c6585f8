"""All layers of a decoder in one kernel, for one row: see persistent.py."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.persistent_attention import attend_item, context_parts, keys_and_values, places_of
from octavo.kernels.triton.persistent_phases import gate_up_units, qkv_units, residual_units
from octavo.kernels.triton.persistent_products import row_tiles, weight_tiles
from octavo.kernels.triton.persistent_sync import arrive, leave, wait
from octavo.kernels.triton.quick import kernel

PHASES = 5  # of a layer
COLUMNS = 16  # of a layer's row in the table of offsets
_PHASES, _COLUMNS = tl.constexpr(PHASES), tl.constexpr(COLUMNS)


@triton.jit
def _place(layers_ptr, layer, column: tl.constexpr):
    """How far a layer's tensor lies behind the first layer's."""
    return tl.multiple_of(tl.load(layers_ptr + layer * _COLUMNS + column), 16)


@triton.jit
def _qkv(
    weights, norms, qkv, stream_ptr, bias_ptr, raw_ptr, eps, UNITS: tl.constexpr, HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, CHUNK: tl.constexpr, BATCH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The phase's units: those whose weights are here, and the others."""
    pid = tl.program_id(0)
    qkv_units(
        weights, norms, pid, stream_ptr, bias_ptr, raw_ptr, eps, UNITS, HIDDEN, HAS_BIAS, CHUNK, BATCH,
        PROGRAMS,
    )  # fmt: skip
    if UNITS > PROGRAMS * BATCH:
        for first in range(pid + PROGRAMS * BATCH, UNITS, PROGRAMS * BATCH):
            weights = weight_tiles(qkv, first, 0, UNITS, HIDDEN, CHUNK, BATCH, PROGRAMS)
            qkv_units(
                weights, norms, first, stream_ptr, bias_ptr, raw_ptr, eps, UNITS, HIDDEN, HAS_BIAS, CHUNK,
                BATCH, PROGRAMS,
            )  # fmt: skip


@triton.jit
def _residual(
    weights, weight_ptr, x_ptr, bias_ptr, stream_ptr, UNITS: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, CHUNK: tl.constexpr, BATCH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """As _qkv."""
    pid = tl.program_id(0)
    residual_units(weights, pid, x_ptr, bias_ptr, stream_ptr, UNITS, K, HAS_BIAS, CHUNK, BATCH, PROGRAMS)
    if UNITS > PROGRAMS * BATCH:
        for first in range(pid + PROGRAMS * BATCH, UNITS, PROGRAMS * BATCH):
            weights = weight_tiles(weight_ptr, first, 0, UNITS, K, CHUNK, BATCH, PROGRAMS)
            residual_units(
                weights, first, x_ptr, bias_ptr, stream_ptr, UNITS, K, HAS_BIAS, CHUNK, BATCH, PROGRAMS
            )


@triton.jit
def _gate_up(
    gates, ups, norms, weight_ptr, stream_ptr, bias_ptr, out_ptr, eps, UNITS: tl.constexpr,
    HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
    BATCH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """As _qkv."""
    pid = tl.program_id(0)
    gate_up_units(
        gates, ups, norms, pid, stream_ptr, bias_ptr, out_ptr, eps, UNITS, HIDDEN, HAS_BIAS, CHUNK, BATCH,
        PROGRAMS,
    )  # fmt: skip
    if UNITS > PROGRAMS * BATCH:
        for first in range(pid + PROGRAMS * BATCH, UNITS, PROGRAMS * BATCH):
            gates = weight_tiles(weight_ptr, first, 0, UNITS, HIDDEN, CHUNK, BATCH, PROGRAMS)
            ups = weight_tiles(weight_ptr, first, UNITS * UNIT, UNITS, HIDDEN, CHUNK, BATCH, PROGRAMS)
            gate_up_units(
                gates, ups, norms, first, stream_ptr, bias_ptr, out_ptr, eps, UNITS, HIDDEN, HAS_BIAS, CHUNK,
                BATCH, PROGRAMS,
            )  # fmt: skip


@kernel(do_not_specialize=["num_layers", "window"])
def decoder_kernel(
    layers_ptr,  # [num_layers, COLUMNS] int64, elements behind the first layer's tensor
    input_norm_ptr,  # the first layer's tensors
    qkv_ptr,
    qkv_bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    o_ptr,
    o_bias_ptr,
    post_norm_ptr,
    gate_up_ptr,
    gate_up_bias_ptr,
    down_ptr,
    down_bias_ptr,
    cache_ptr,  # [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
    cos_ptr,  # [positions, HALF_ROTARY] float32
    sin_ptr,
    position_ptr,  # [1] int64, -1: padding
    slot_ptr,  # [1] int64
    table_ptr,  # [table rows, table_stride] int32
    table_row_ptr,  # [1] int32, the request's row of the block table; None: the first
    stream_ptr,  # [HIDDEN], changed in place
    raw_ptr,  # [(HEADS + 2 * KV_HEADS) * D] float32
    attended_ptr,  # [HEADS * D]
    activated_ptr,  # [WIDTH]
    sums_ptr,  # [HEADS, PARTS, D] float32
    stats_ptr,  # [HEADS, PARTS, 2] float32
    counter_ptr,  # [KV_HEADS] int32, zero between launches
    done_ptr,  # [num_layers * PHASES + 1] int32, zero between launches; the last counts those that left
    num_layers,
    table_stride,
    window,
    scale,
    soft_cap,
    eps,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF_ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    QKV_BIAS: tl.constexpr,
    O_BIAS: tl.constexpr,
    GATE_UP_BIAS: tl.constexpr,
    DOWN_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    QKV_BATCH: tl.constexpr,  # units whose weights a program holds at a time
    O_BATCH: tl.constexpr,
    GATE_UP_BATCH: tl.constexpr,
    DOWN_BATCH: tl.constexpr,
    TOKENS: tl.constexpr,  # of a tile of keys
    PARTS: tl.constexpr,  # programs that share a KV head, at most; a power of two
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr,
    COUNTERS: tl.constexpr,  # a power of two, at least those in done_ptr
    SPINS: tl.constexpr,
):
    pid = tl.program_id(0)
    QKV_UNITS: tl.constexpr = (HEADS + 2 * KV_HEADS) * D // UNIT
    O_UNITS: tl.constexpr = HIDDEN // UNIT
    GATE_UP_UNITS: tl.constexpr = WIDTH // UNIT
    Q: tl.constexpr = HEADS * D
    position, slot = tl.load(position_ptr).to(tl.int32), tl.load(slot_ptr)
    table_row = table_ptr
    if table_row_ptr is not None:
        table_row += tl.load(table_row_ptr).to(tl.int64) * table_stride
    begin, span, parts = context_parts(position, window, PARTS, HAS_WINDOW)
    items = KV_HEADS * parts
    # where the keys of the program's first item lie: the same in every layer
    start = begin + pid // KV_HEADS * span
    end = tl.where(pid < items, tl.minimum(start + span, position), 0)
    places, there = places_of(table_row, pid % KV_HEADS, start, end, KV_HEADS, D, BLOCK_SIZE, TOKENS)

    weights = weight_tiles(qkv_ptr, pid, 0, QKV_UNITS, HIDDEN, CHUNK, QKV_BATCH, PROGRAMS)
    norms = row_tiles(input_norm_ptr, HIDDEN, CHUNK)
    _qkv(
        weights, norms, qkv_ptr, stream_ptr, qkv_bias_ptr, raw_ptr, eps, QKV_UNITS, HIDDEN, QKV_BIAS, CHUNK,
        QKV_BATCH, PROGRAMS,
    )  # fmt: skip
    if pid < QKV_UNITS:
        arrive(done_ptr)
    for layer in range(num_layers):
        done = done_ptr + layer * _PHASES
        cache = cache_ptr + _place(layers_ptr, layer, 12)
        o = o_ptr + _place(layers_ptr, layer, 4)
        gate_up = gate_up_ptr + _place(layers_ptr, layer, 7)
        down = down_ptr + _place(layers_ptr, layer, 9)
        # Zero, but the compiler cannot know: it would compute all addresses before the loop, in registers.
        nothing = _place(layers_ptr, layer, 15)
        behind = tl.minimum(layer + 1, num_layers - 1)
        next_qkv = qkv_ptr + _place(layers_ptr, behind, 0)

        # attention
        k, v = keys_and_values(cache, places, there, KV_HEADS, D, BLOCK_SIZE)
        if pid < items:
            for item in range(pid, items, PROGRAMS):
                if item >= PROGRAMS:
                    start = begin + item // KV_HEADS * span
                    end = tl.minimum(start + span, position)
                    places_i, there_i = places_of(
                        table_row, item % KV_HEADS, start, end, KV_HEADS, D, BLOCK_SIZE, TOKENS
                    )
                    k, v = keys_and_values(cache, places_i, there_i, KV_HEADS, D, BLOCK_SIZE)
                else:
                    there_i = there
                attend_item(
                    item, k, v, there_i, done, min(QKV_UNITS, PROGRAMS), position, slot, begin, span, parts,
                    table_row, raw_ptr + nothing, q_norm_ptr + _place(layers_ptr, layer, 2),
                    k_norm_ptr + _place(layers_ptr, layer, 3), cos_ptr, sin_ptr, cache, attended_ptr,
                    sums_ptr, stats_ptr, counter_ptr, scale, soft_cap, eps, HEADS, KV_HEADS, D, HALF_ROTARY,
                    NORM, BLOCK_SIZE, TOKENS, PARTS, HAS_CAP, PRECISION, PROGRAMS, SPINS,
                )  # fmt: skip
            arrive(done + 1)

        # the product behind attention
        o_weights = weight_tiles(o, pid, 0, O_UNITS, Q, CHUNK, O_BATCH, PROGRAMS)
        wait(done + 1, tl.minimum(items, PROGRAMS), SPINS)
        _residual(
            o_weights, o, attended_ptr + nothing, o_bias_ptr + _place(layers_ptr, layer, 5),
            stream_ptr + nothing, O_UNITS, Q, O_BIAS, CHUNK, O_BATCH, PROGRAMS,
        )  # fmt: skip
        if pid < O_UNITS:
            arrive(done + 2)

        # gate and up
        gates = weight_tiles(gate_up, pid, 0, GATE_UP_UNITS, HIDDEN, CHUNK, GATE_UP_BATCH, PROGRAMS)
        ups = weight_tiles(gate_up, pid, WIDTH, GATE_UP_UNITS, HIDDEN, CHUNK, GATE_UP_BATCH, PROGRAMS)
        norms = row_tiles(post_norm_ptr + _place(layers_ptr, layer, 6), HIDDEN, CHUNK)
        wait(done + 2, min(O_UNITS, PROGRAMS), SPINS)
        _gate_up(
            gates, ups, norms, gate_up, stream_ptr + nothing,
            gate_up_bias_ptr + _place(layers_ptr, layer, 8), activated_ptr + nothing, eps, GATE_UP_UNITS,
            HIDDEN, GATE_UP_BIAS, UNIT, CHUNK, GATE_UP_BATCH, PROGRAMS,
        )  # fmt: skip
        if pid < GATE_UP_UNITS:
            arrive(done + 3)

        # down
        down_weights = weight_tiles(down, pid, 0, O_UNITS, WIDTH, CHUNK, DOWN_BATCH, PROGRAMS)
        wait(done + 3, min(GATE_UP_UNITS, PROGRAMS), SPINS)
        _residual(
            down_weights, down, activated_ptr + nothing, down_bias_ptr + _place(layers_ptr, layer, 10),
            stream_ptr + nothing, O_UNITS, WIDTH, DOWN_BIAS, CHUNK, DOWN_BATCH, PROGRAMS,
        )  # fmt: skip
        if pid < O_UNITS:
            arrive(done + 4)

        # queries, keys and values of the next layer
        if layer + 1 < num_layers:
            weights = weight_tiles(next_qkv, pid, 0, QKV_UNITS, HIDDEN, CHUNK, QKV_BATCH, PROGRAMS)
            norms = row_tiles(input_norm_ptr + _place(layers_ptr, layer + 1, 11), HIDDEN, CHUNK)
            wait(done + 4, min(O_UNITS, PROGRAMS), SPINS)
            _qkv(
                weights, norms, next_qkv, stream_ptr + nothing,
                qkv_bias_ptr + _place(layers_ptr, layer + 1, 1), raw_ptr + nothing, eps, QKV_UNITS, HIDDEN,
                QKV_BIAS, CHUNK, QKV_BATCH, PROGRAMS,
            )  # fmt: skip
            if pid < QKV_UNITS:
                arrive(done + 5)
    leave(done_ptr + num_layers * _PHASES, done_ptr, num_layers * _PHASES, PROGRAMS, COUNTERS)
