"""What the persistent kernel does in each phase of a layer: see persistent.py."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.persistent_products import UNIT, normed_row, plain_row, times

_UNIT = tl.constexpr(UNIT)


@triton.jit
def qkv_units(
    weights,
    norms,  # tiles of the norm's weight
    first,  # the first unit
    stream_ptr,  # [HIDDEN]
    bias_ptr,
    raw_ptr,  # [UNITS * UNIT] float32, written
    eps,
    UNITS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Queries, keys and values, as they are before qk-norm and rotary."""
    row, scale = normed_row(stream_ptr, norms, eps, HIDDEN, CHUNK)
    for j in tl.static_range(BATCH):
        unit = first + j * PROGRAMS
        n = unit * _UNIT + tl.arange(0, _UNIT)
        total = times(weights, j, row, HIDDEN, CHUNK) * scale
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=unit < UNITS, other=0.0).to(tl.float32)
        tl.store(raw_ptr + n, total, mask=unit < UNITS)


@triton.jit
def residual_units(
    weights,
    first,
    x_ptr,  # [K]
    bias_ptr,
    stream_ptr,  # [UNITS * UNIT], changed in place
    UNITS: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """stream += x W^T + bias"""
    row = plain_row(x_ptr, K, CHUNK)
    for j in tl.static_range(BATCH):
        unit = first + j * PROGRAMS
        n = unit * _UNIT + tl.arange(0, _UNIT)
        before = tl.load(stream_ptr + n, mask=unit < UNITS, other=0.0).to(tl.float32)
        total = times(weights, j, row, K, CHUNK)
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=unit < UNITS, other=0.0).to(tl.float32)
        tl.store(stream_ptr + n, (before + total).to(stream_ptr.dtype.element_ty), mask=unit < UNITS)


@triton.jit
def gate_up_units(
    gates,
    ups,
    norms,
    first,
    stream_ptr,  # [HIDDEN]
    bias_ptr,
    out_ptr,  # [UNITS * UNIT], written
    eps,
    UNITS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """silu(gate) * up"""
    row, scale = normed_row(stream_ptr, norms, eps, HIDDEN, CHUNK)
    for j in tl.static_range(BATCH):
        unit = first + j * PROGRAMS
        n = unit * _UNIT + tl.arange(0, _UNIT)
        gate = times(gates, j, row, HIDDEN, CHUNK) * scale
        up = times(ups, j, row, HIDDEN, CHUNK) * scale
        if HAS_BIAS:
            gate += tl.load(bias_ptr + n, mask=unit < UNITS, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + UNITS * _UNIT + n, mask=unit < UNITS, other=0.0).to(tl.float32)
        out = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=unit < UNITS)
