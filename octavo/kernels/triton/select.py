"""The greatest logits of a row without a sort: what thresholds and log-probabilities share.

A row is read by many programs at once, in four passes. The first finds the greatest logit. The
second counts, or weighs, the tokens within RUNGS distances from it, each twice the one before, so it
is known roughly where the threshold lies. The third sorts the tokens about there, or from there up,
into BINS bins; they grow with the distance, so that they hold few tokens each whatever the scale of
the logits. The fourth writes the tokens of the bin that the threshold lies in (of all bins above it
too, where they are few) into a list, in which it is searched, exactly: by logit, then by id. Between
the passes one program a row decides what the next does. What is known of a row lies in its state.

Weights are integers, exp((logit - greatest) / temperature) times 2^40: their sums are the same in
any order, so a row's tokens are a function of the row alone.

    filters    thresholds of top-k and top-p
    top        the greatest tokens and their log-probabilities
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.launch import next_power_of_2, one_form

BINS = 4096  # of a distance: 5 bits of its exponent, 7 of its mantissa
LIST = 4096  # tokens that are searched without the logits
STATE = 40  # numbers of a row beside its bins
ROWS_AT_A_TIME = 256  # rows at a time, so that bins and lists stay small

BEST = tl.constexpr(0)  # order of the greatest logit, plus 2^31
LISTED = tl.constexpr(1)  # tokens in the list, or that did not fit there
PENDING = tl.constexpr(2)  # what the next pass is to find: 0 nothing, 1 by count, 2 by weight
FROM = tl.constexpr(3)  # bins whose tokens it lists
TO = tl.constexpr(4)
LEFT = tl.constexpr(5)  # how many of them, or how much of their weight, is kept
LADDER = tl.constexpr(8)  # RUNGS numbers: how many tokens, or how much weight, within each distance
RUNGS = tl.constexpr(16)  # within 1/64, 1/32 … 256, and all
TOTAL = tl.constexpr(24)  # for log-probabilities: weight of all tokens
GREATER = tl.constexpr(25)  # and how many are greater than a row's own


@triton.jit
def legal(logits):
    """NaN as -inf, and +inf as the greatest number."""
    logits = tl.where(logits == logits, logits, float("-inf"))
    return tl.minimum(logits, 3.4028234663852886e38)


@triton.jit
def order_of(logits):
    """int32 that compare as the floats do; -0 and 0 are equal."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(logits == 0.0, 0, bits)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def logit_of(order):
    """The float of an order."""
    order = order.to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def bin_of(logits, best):
    """Bins ascend with the distance from the greatest logit; equal logits share one."""
    bits = (best - logits).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> 16) - (115 << 7), 0), 4095)


@triton.jit
def weight_of(logits, best, temperature):
    """int64: exp((logit - best) / temperature) * 2^40."""
    x = tl.maximum((logits - best) / temperature, -100.0)
    y = x * 1.4426950408889634
    rest = tl.fma(x, 1.4426950216293335, -y) + x * 1.925963033500011e-08
    return (tl.exp2(y) * (1.0 + rest * 0.6931471805599453) * 1099511627776.0 + 0.5).to(tl.int64)


@triton.jit
def key_of(logits, ids, ID_BITS: tl.constexpr):
    """int64, unlike for any two tokens: greater logits are greater, and of equal ones lower ids."""
    return (order_of(logits).to(tl.int64) << ID_BITS) | ((1 << ID_BITS) - 1 - ids.to(tl.int64))


@one_form("logits_ptr", "vocab", "stride")
def best_kernel(logits_ptr, state_ptr, vocab, stride, ROW: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
    best = order_of(tl.max(logits, axis=0)).to(tl.int64) + 2147483648
    tl.atomic_max(state_ptr + row * ROW + BEST, best, sem="relaxed")


@triton.jit
def best_of(state):
    return logit_of(tl.load(state + BEST) - 2147483648)


@triton.jit
def some_best_of(state):
    """As above, and any number where nothing is legal."""
    best = best_of(state)
    return tl.where(best == float("-inf"), 0.0, best)


@triton.jit
def weight_wanted(top_p, total):
    """The least integer weight that is top_p of the total; at least 1, so that one token stays."""
    exact = top_p.to(tl.float64) * total.to(tl.float64)
    wanted = exact.to(tl.int64)
    wanted += (wanted.to(tl.float64) < exact).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 1), total)


@triton.jit
def rung_of(state, wanted):
    """Where the ladder reaches `wanted`: (within this distance, beyond that one, what lies up to that)."""
    r = tl.arange(0, RUNGS)
    reached = tl.load(state + LADDER + r)
    rung = tl.min(tl.where(reached >= wanted, r, RUNGS - 1), axis=0)
    within = ((rung + 121) << 23).to(tl.float32, bitcast=True)  # 2 ** (rung - 6)
    beyond = ((rung + 120) << 23).to(tl.float32, bitcast=True)
    base = tl.sum(tl.where(r == rung - 1, reached, 0), axis=0)
    return tl.where(rung == RUNGS - 1, float("inf"), within), tl.where(rung == 0, -1.0, beyond), base


@triton.jit
def all_on_ladder(state):
    return tl.load(state + LADDER + RUNGS - 1)


@triton.jit
def seek_weight(state, weights, wanted, BINS: tl.constexpr):
    """Set the next pass on the bin in which the weights of the greatest tokens reach `wanted`."""
    b = tl.arange(0, BINS)
    above = tl.cumsum(weights, axis=0)
    place = tl.min(tl.where(above >= wanted, b, BINS - 1), axis=0)
    tl.store(state + PENDING, 2)
    tl.store(state + FROM, place.to(tl.int64))
    tl.store(state + TO, place.to(tl.int64))
    tl.store(state + LEFT, wanted - tl.sum(tl.where(b < place, weights, 0), axis=0))


@triton.jit
def seek_count(state, counts, base, wanted, LIST: tl.constexpr, BINS: tl.constexpr):
    """Set the next pass on the bin in which the greatest `wanted` tokens end, and those above if few.

    `base` tokens are greater than those that were counted.
    """
    b = tl.arange(0, BINS)
    above = base + tl.cumsum(counts, axis=0)
    place = tl.min(tl.where(above >= wanted, b, BINS - 1), axis=0)
    upto = base + tl.sum(tl.where(b <= place, counts, 0), axis=0)
    before = base + tl.sum(tl.where(b < place, counts, 0), axis=0)
    tl.store(state + PENDING, 1)
    tl.store(state + FROM, tl.where(upto <= LIST, 0, place).to(tl.int64))
    tl.store(state + TO, place.to(tl.int64))
    tl.store(state + LEFT, wanted - tl.where(upto <= LIST, 0, before))


@triton.jit
def count_rungs(distance, there):
    """[32] int64: how many of a chunk's tokens lie within each rung's distance."""
    bits = distance.to(tl.int32, bitcast=True)
    above = (bits >> 23) - 121 + ((bits & 0x7FFFFF) != 0).to(tl.int32)  # 6 + log2 of the distance, rounded up
    rung = tl.minimum(tl.maximum(above, 0), RUNGS - 1)
    reached = tl.cumsum(tl.histogram(rung, 32, mask=there), axis=0).to(tl.int64)
    return tl.where(tl.arange(0, 32) < RUNGS, reached, 0)


@one_form("logits_ptr", "vocab", "stride")
def list_kernel(
    logits_ptr,
    state_ptr,
    list_ptr,  # [rows, LIST] int64
    vocab,
    stride,
    ALL: tl.constexpr,  # tokens of -inf count as well
    ROW: tl.constexpr,
    LIST: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Put the tokens of the wanted bins into each row's list, in any order."""
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * ROW
    if tl.load(state + PENDING) != 0:
        best = some_best_of(state)
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
        place = bin_of(logits, best)
        mine = (ids < vocab) & (place >= tl.load(state + FROM)) & (place <= tl.load(state + TO))
        if not ALL:
            mine = mine & (logits > float("-inf"))
        number = tl.sum(mine.to(tl.int32), axis=0)
        if number > 0:
            at = tl.atomic_add(state + LISTED, number.to(tl.int64), sem="relaxed")
            at += tl.cumsum(mine.to(tl.int32), axis=0) - 1
            keys = key_of(logits, ids, ID_BITS)
            tl.store(list_ptr + row * LIST + at, keys, mask=mine & (at < LIST))


def chunk_of(rows: int, vocab: int) -> int:
    """Tokens of a program: fewer where there are few rows, so that all of the GPU reads."""
    return min(1024 if rows <= 8 else 2048, next_power_of_2(vocab))


def warps_of(chunk: int) -> int:
    """Eight tokens a thread: fewer registers for each, more programs at a time."""
    return max(1, min(8, chunk // 256))


def check(logits: torch.Tensor) -> None:
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError("logits must be float32 rows")
