"""The greatest logits of a row without a sort: thresholds of top-k and top-p, and the top n themselves.

A row is read by many programs at once, in four passes. The first finds the greatest logit. The
second counts, or weighs, the tokens within RUNGS distances from it, each twice the one before, so it
is known roughly where the threshold lies. The third sorts the tokens about there, or from there up,
into BINS bins; they grow with the distance, so that they hold few tokens each whatever the scale of
the logits. The fourth writes the tokens of the bin that the threshold lies in (of all bins above it
too, where they are few) into a list, in which it is searched, exactly: by logit, then by id. Where both
top-k and top-p ask, what top-k left has to be known before top-p can be weighed, so the last pass may
be needed once more. Between the passes one program a row decides what the next does.

Weights are integers, exp((logit - greatest) / temperature) times 2^40: their sums are the same in
any order, so a row's tokens are a function of the row alone. A bin of more than LIST tokens (equal
logits, say) is gone through in the logits themselves: slower, and as exact.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.launch import next_power_of_2, one_form

BINS = 4096  # of a distance: 5 bits of its exponent, 7 of its mantissa
LIST = 4096  # tokens that are searched without the logits
FEW = 512  # tokens that are searched fast
STATE = 40  # numbers of a row beside its bins
_ROWS = 256  # rows at a time, so that bins and lists stay small

_BEST = tl.constexpr(0)  # order of the greatest logit, plus 2^31
_LISTED = tl.constexpr(1)  # tokens in the list, or that did not fit there
_PENDING = tl.constexpr(2)  # what the next pass is to find: 0 nothing, 1 by count, 2 by weight
_FROM = tl.constexpr(3)  # bins whose tokens it lists
_TO = tl.constexpr(4)
_LEFT = tl.constexpr(5)  # how many of them, or how much of their weight, is kept
_LADDER = tl.constexpr(8)  # RUNGS numbers: how many tokens, or how much weight, within each distance
_RUNGS = tl.constexpr(16)  # within 1/64, 1/32 … 256, and all
_TOTAL = tl.constexpr(24)  # for log-probabilities: weight of all tokens
_GREATER = tl.constexpr(25)  # and how many are greater than a row's own


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
def _logit_of(order):
    """The float of an order."""
    order = order.to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _bin_of(logits, best):
    """Bins ascend with the distance from the greatest logit; equal logits share one."""
    bits = (best - logits).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> 16) - (115 << 7), 0), 4095)


@triton.jit
def _weight_of(logits, best, temperature):
    """int64: exp((logit - best) / temperature) * 2^40."""
    x = tl.maximum((logits - best) / temperature, -100.0)
    y = x * 1.4426950408889634
    rest = tl.fma(x, 1.4426950216293335, -y) + x * 1.925963033500011e-08
    return (tl.exp2(y) * (1.0 + rest * 0.6931471805599453) * 1099511627776.0 + 0.5).to(tl.int64)


@triton.jit
def _key_of(logits, ids, ID_BITS: tl.constexpr):
    """int64, unlike for any two tokens: greater logits are greater, and of equal ones lower ids."""
    return (order_of(logits).to(tl.int64) << ID_BITS) | ((1 << ID_BITS) - 1 - ids.to(tl.int64))


@one_form("logits_ptr", "vocab", "stride")
def best_kernel(logits_ptr, state_ptr, vocab, stride, ROW: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
    best = order_of(tl.max(logits, axis=0)).to(tl.int64) + 2147483648
    tl.atomic_max(state_ptr + row * ROW + _BEST, best, sem="relaxed")


@triton.jit
def _best_of(state):
    return _logit_of(tl.load(state + _BEST) - 2147483648)


@triton.jit
def _some_best_of(state):
    """As above, and any number where nothing is legal."""
    best = _best_of(state)
    return tl.where(best == float("-inf"), 0.0, best)


@triton.jit
def _wanted(top_p, total):
    """The least integer weight that is top_p of the total; at least 1, so that one token stays."""
    exact = top_p.to(tl.float64) * total.to(tl.float64)
    wanted = exact.to(tl.int64)
    wanted += (wanted.to(tl.float64) < exact).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 1), total)


@triton.jit
def _rung_of(state, wanted):
    """Where the ladder reaches `wanted`: (within this distance, beyond that one, what lies up to that)."""
    r = tl.arange(0, _RUNGS)
    reached = tl.load(state + _LADDER + r)
    rung = tl.min(tl.where(reached >= wanted, r, _RUNGS - 1), axis=0)
    within = ((rung + 121) << 23).to(tl.float32, bitcast=True)  # 2 ** (rung - 6)
    beyond = ((rung + 120) << 23).to(tl.float32, bitcast=True)
    base = tl.sum(tl.where(r == rung - 1, reached, 0), axis=0)
    return tl.where(rung == _RUNGS - 1, float("inf"), within), tl.where(rung == 0, -1.0, beyond), base


@triton.jit
def _all_on_ladder(state):
    return tl.load(state + _LADDER + _RUNGS - 1)


@triton.jit
def _seek_weight(state, weights, wanted, BINS: tl.constexpr):
    """Set the next pass on the bin in which the weights of the greatest tokens reach `wanted`."""
    b = tl.arange(0, BINS)
    above = tl.cumsum(weights, axis=0)
    place = tl.min(tl.where(above >= wanted, b, BINS - 1), axis=0)
    tl.store(state + _PENDING, 2)
    tl.store(state + _FROM, place.to(tl.int64))
    tl.store(state + _TO, place.to(tl.int64))
    tl.store(state + _LEFT, wanted - tl.sum(tl.where(b < place, weights, 0), axis=0))


@triton.jit
def _seek_count(state, counts, base, wanted, LIST: tl.constexpr, BINS: tl.constexpr):
    """Set the next pass on the bin in which the greatest `wanted` tokens end, and those above if few.

    `base` tokens are greater than those that were counted.
    """
    b = tl.arange(0, BINS)
    above = base + tl.cumsum(counts, axis=0)
    place = tl.min(tl.where(above >= wanted, b, BINS - 1), axis=0)
    upto = base + tl.sum(tl.where(b <= place, counts, 0), axis=0)
    before = base + tl.sum(tl.where(b < place, counts, 0), axis=0)
    tl.store(state + _PENDING, 1)
    tl.store(state + _FROM, tl.where(upto <= LIST, 0, place).to(tl.int64))
    tl.store(state + _TO, place.to(tl.int64))
    tl.store(state + _LEFT, wanted - tl.where(upto <= LIST, 0, before))


@triton.jit
def _climb(distance, there, values):
    """[32] int64: what a chunk's tokens add to the ladder. In one piece, because an atomic takes its time."""
    r = tl.arange(0, 32)
    reached = tl.where(r == _RUNGS - 1, tl.sum(tl.where(there, values, 0), axis=0).to(tl.int64), 0)
    for rung in tl.static_range(_RUNGS - 1):
        within = there & (distance <= 2.0 ** (rung - 6))
        reached += tl.where(r == rung, tl.sum(tl.where(within, values, 0), axis=0).to(tl.int64), 0)
    return reached


@one_form("logits_ptr", "vocab", "stride")
def filter_ladder_kernel(
    logits_ptr,  # [rows, vocab] float32
    temperature_ptr,  # [rows] float32
    top_k_ptr,  # [rows] int32
    top_p_ptr,  # [rows] float32
    state_ptr,  # [rows, ROW] int64: state, counts, weights; zero but for _BEST
    vocab,
    stride,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * ROW
    best, temperature = _best_of(state), tl.load(temperature_ptr + row)
    filters = (temperature >= 1e-5) & (best > float("-inf"))
    counts_them = filters & (tl.load(top_k_ptr + row) > 0)
    weighs_them = filters & (tl.load(top_p_ptr + row) < 1.0)
    if counts_them | weighs_them:
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
        there = logits > float("-inf")
        if counts_them:
            reached = _climb(best - logits, there, tl.full((CHUNK,), 1, dtype=tl.int32))
        else:
            reached = _climb(best - logits, there, _weight_of(logits, best, temperature))
        r = tl.arange(0, 32)
        tl.atomic_add(state + _LADDER + r, reached, mask=r < _RUNGS, sem="relaxed")


@one_form("logits_ptr", "vocab", "stride")
def filter_bins_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    state_ptr,
    vocab,
    stride,
    ROW: tl.constexpr,
    STATE: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * ROW
    best, temperature = _best_of(state), tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    filters = (temperature >= 1e-5) & (best > float("-inf"))
    counts_them, weighs_them = filters & (top_k > 0), filters & (top_p < 1.0)
    if counts_them | weighs_them:
        whole = _all_on_ladder(state)
        wanted = top_k.to(tl.int64)
        if not counts_them:
            wanted = _wanted(top_p, whole)
        within, beyond, _ = _rung_of(state, wanted)
        if counts_them & weighs_them:
            beyond = -1.0  # what top-k leaves has to be weighed
            within = tl.where(whole > wanted, within, float("inf"))
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
        distance = best - logits
        there = (logits > float("-inf")) & (distance <= within) & (distance > beyond)
        if tl.max(there.to(tl.int32), axis=0) > 0:
            place = state + STATE + _bin_of(logits, best)
            if counts_them:
                tl.atomic_add(place, tl.full((CHUNK,), 1, dtype=tl.int64), mask=there, sem="relaxed")
            if weighs_them:
                weight = _weight_of(logits, best, temperature)
                tl.atomic_add(place + BINS, weight, mask=there & (weight > 0), sem="relaxed")


@one_form()
def filter_seek_kernel(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    state_ptr,
    order_ptr,  # [rows] int32, written: least order kept, for now the least there is
    limit_ptr,  # [rows] int32, written: tokens of that order are kept if their id is below
    best_ptr,  # [rows] float32, written
    ROW: tl.constexpr,
    STATE: tl.constexpr,
    BINS: tl.constexpr,
    LIST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * ROW
    best, top_k, top_p = _best_of(state), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    tl.store(order_ptr + row, -2147483648)
    tl.store(limit_ptr + row, 2147483647)
    tl.store(best_ptr + row, best)
    filters = (tl.load(temperature_ptr + row) >= 1e-5) & (best > float("-inf"))
    if filters & ((top_k > 0) | (top_p < 1.0)):
        b = tl.arange(0, BINS)
        whole = _all_on_ladder(state)
        wanted = top_k.to(tl.int64)
        if (top_k > 0) & (whole > wanted):
            _, _, base = _rung_of(state, wanted)
            counts = tl.load(state + STATE + b)
            _seek_count(state, counts, tl.where(top_p < 1.0, 0, base), wanted, LIST, BINS)
        elif top_p < 1.0:
            weights = tl.load(state + STATE + BINS + b)
            base = tl.zeros_like(whole)
            if top_k > 0:  # it cuts nothing, and the ladder has counted
                wanted = _wanted(top_p, tl.sum(weights, axis=0))
            else:
                wanted = _wanted(top_p, whole)
                _, _, base = _rung_of(state, wanted)
            _seek_weight(state, weights, wanted - base, BINS)


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
    if tl.load(state + _PENDING) != 0:
        best = _some_best_of(state)
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
        place = _bin_of(logits, best)
        mine = (ids < vocab) & (place >= tl.load(state + _FROM)) & (place <= tl.load(state + _TO))
        if not ALL:
            mine = mine & (logits > float("-inf"))
        number = tl.sum(mine.to(tl.int32), axis=0)
        if number > 0:
            at = tl.atomic_add(state + _LISTED, number.to(tl.int64), sem="relaxed")
            at += tl.cumsum(mine.to(tl.int32), axis=0) - 1
            keys = _key_of(logits, ids, ID_BITS)
            tl.store(list_ptr + row * LIST + at, keys, mask=mine & (at < LIST))


@triton.jit
def _measure(
    keys,  # [SIZE] int64: the list
    values,  # [SIZE] int64: what each counts
    overflows,  # the list is not all of it
    first,  # three keys
    second,
    third,
    row_ptr,
    vocab,
    low_bin,
    high_bin,
    best,
    temperature,
    MAY_OVERFLOW: tl.constexpr,
    WEIGHS: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Number, or weight, of the listed tokens from each of three keys on."""
    from_first = tl.sum(tl.where(keys >= first, values, 0), axis=0)
    from_second = tl.sum(tl.where(keys >= second, values, 0), axis=0)
    from_third = tl.sum(tl.where(keys >= third, values, 0), axis=0)
    if MAY_OVERFLOW:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
        if overflows:
            from_first = tl.zeros_like(from_first)
            from_second, from_third = from_first, from_first
            for start in range(0, vocab, CHUNK):
                ids = start + tl.arange(0, CHUNK)
                logits = legal(tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")))
                place = _bin_of(logits, best)
                inside = (place >= low_bin) & (place <= high_bin) & (logits > float("-inf"))
                key = _key_of(logits, ids, ID_BITS)
                value = tl.full((CHUNK,), 1, dtype=tl.int64)
                if WEIGHS:
                    value = _weight_of(logits, best, temperature)
                value = tl.where(inside, value, 0)
                from_first += tl.sum(tl.where(key >= first, value, 0), axis=0)
                from_second += tl.sum(tl.where(key >= second, value, 0), axis=0)
                from_third += tl.sum(tl.where(key >= third, value, 0), axis=0)
    return from_first, from_second, from_third


@triton.jit
def _search(
    low,  # a key from which on there is enough
    high,  # and one from which on there is not
    enough,
    keys,
    values,
    overflows,
    row_ptr,
    vocab,
    low_bin,
    high_bin,
    best,
    temperature,
    MAY_OVERFLOW: tl.constexpr,
    WEIGHS: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The greatest key from which on the listed tokens are, or weigh, enough."""
    while high - low > 1:
        step = tl.maximum((high - low) >> 2, 1)
        first, second, third = low + step, low + 2 * step, low + 3 * step
        from_first, from_second, from_third = _measure(
            keys, values, overflows, first, second, third, row_ptr, vocab, low_bin, high_bin, best,
            temperature, MAY_OVERFLOW, WEIGHS, ID_BITS, CHUNK,
        )  # fmt: skip
        if from_third >= enough:
            low = third
        elif from_second >= enough:
            low, high = second, tl.minimum(high, third)
        elif from_first >= enough:
            low, high = first, tl.minimum(high, second)
        else:
            high = tl.minimum(high, first)
    return low


@triton.jit
def _find(
    pending,
    listed,
    list_row,
    state,
    row_ptr,
    vocab,
    temperature,
    top_p,
    SIZE: tl.constexpr,  # tokens of the list that are looked at
    MAY_OVERFLOW: tl.constexpr,
    STATE: tl.constexpr,
    BINS: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The least key that is kept; what top-k keeps where top-p has to look elsewhere and stays pending."""
    best, left = _best_of(state), tl.load(state + _LEFT)
    low_bin, high_bin = tl.load(state + _FROM), tl.load(state + _TO)
    overflows = listed > SIZE
    i = tl.arange(0, SIZE)
    none = tl.full((SIZE,), -9223372036854775808, dtype=tl.int64)
    keys = tl.load(list_row + i, mask=i < listed, other=-9223372036854775808)
    values = tl.where(keys == none, best, _logit_of(keys >> ID_BITS))
    weights = tl.where(keys == none, 0, _weight_of(values, best, temperature))
    ones = tl.full((SIZE,), 1, dtype=tl.int64)
    high = _key_of(best, tl.zeros((), dtype=tl.int64), ID_BITS) + 1
    low = tl.min(tl.where(keys == none, high, keys), axis=0)
    if MAY_OVERFLOW:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
        if overflows:
            low = tl.full((), -2147483648, dtype=tl.int64) << ID_BITS
    tl.debug_barrier()  # every warp has read the state
    tl.store(state + _LISTED, 0)
    tl.store(state + _PENDING, 0)
    found = low
    if pending == 1:
        found = _search(
            low, high, left, keys, ones, overflows, row_ptr, vocab, low_bin, high_bin, best, temperature,
            MAY_OVERFLOW, False, ID_BITS, CHUNK,
        )  # fmt: skip
        if top_p < 1.0:
            # what top-k left, weighed
            b = tl.arange(0, BINS)
            of_bin = tl.where(b < low_bin, tl.load(state + STATE + BINS + b), 0)
            before = tl.sum(of_bin, axis=0)
            kept, _, _ = _measure(
                keys, weights, overflows, found, found, found, row_ptr, vocab, low_bin, high_bin, best,
                temperature, MAY_OVERFLOW, True, ID_BITS, CHUNK,
            )  # fmt: skip
            wanted = _wanted(top_p, before + kept)
            if wanted <= before:
                _seek_weight(state, of_bin, wanted, BINS)
            else:
                left = wanted - before
                low = found
                pending = tl.full((), 2, dtype=tl.int64)
    if pending == 2:
        found = _search(
            low, high, left, keys, weights, overflows, row_ptr, vocab, low_bin, high_bin, best, temperature,
            MAY_OVERFLOW, True, ID_BITS, CHUNK,
        )  # fmt: skip
    return found


@one_form("logits_ptr", "vocab", "stride")
def filter_search_kernel(
    logits_ptr,
    temperature_ptr,
    top_p_ptr,
    state_ptr,
    list_ptr,
    order_ptr,
    limit_ptr,
    vocab,
    stride,
    ROW: tl.constexpr,
    STATE: tl.constexpr,
    BINS: tl.constexpr,
    LIST: tl.constexpr,
    FEW: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state, row_ptr = state_ptr + row * ROW, logits_ptr + row * stride
    pending, listed = tl.load(state + _PENDING), tl.load(state + _LISTED)
    if pending != 0:
        temperature, top_p = tl.load(temperature_ptr + row), tl.load(top_p_ptr + row)
        list_row = list_ptr + row * LIST
        if listed <= FEW:
            found = _find(
                pending, listed, list_row, state, row_ptr, vocab, temperature, top_p, FEW, False, STATE, BINS,
                ID_BITS, CHUNK,
            )  # fmt: skip
        else:
            found = _find(
                pending, listed, list_row, state, row_ptr, vocab, temperature, top_p, LIST, True, STATE, BINS,
                ID_BITS, CHUNK,
            )  # fmt: skip
        tl.store(order_ptr + row, (found >> ID_BITS).to(tl.int32))
        last = (1 << ID_BITS) - 1 - (found & ((1 << ID_BITS) - 1))
        tl.store(limit_ptr + row, (last + 1).to(tl.int32))


@triton.jit
def _logprob_of(logits, state):
    """Log-probabilities, of a row whose total weight is known; NaN where no logit is above -inf."""
    total = tl.load(state + _TOTAL)
    nothing = total == 0
    share = (tl.where(nothing, 1, total).to(tl.float64) / 1099511627776.0).to(tl.float32)
    return tl.where(nothing, float("nan"), logits - _some_best_of(state) - tl.log(share))


@one_form("logits_ptr", "vocab", "stride")
def top_ladder_kernel(
    logits_ptr,
    tokens_ptr,  # [rows] int64
    state_ptr,
    num_top,
    vocab,
    stride,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state, row_ptr = state_ptr + row * ROW, logits_ptr + row * stride
    best = _some_best_of(state)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    there = ids < vocab
    logits = legal(tl.load(row_ptr + ids, mask=there, other=float("-inf")))
    own = legal(tl.load(row_ptr + tl.maximum(tl.load(tokens_ptr + row), 0)))
    r = tl.arange(0, 32)
    reached = tl.zeros((32,), dtype=tl.int64)
    if num_top > 0:
        reached = _climb(best - logits, there, tl.full((CHUNK,), 1, dtype=tl.int32))
    weight = tl.where(there, _weight_of(logits, best, 1.0), 0)
    reached += tl.where(r == _TOTAL - _LADDER, tl.sum(weight, axis=0), 0)
    greater = tl.sum((there & (logits > own)).to(tl.int32), axis=0).to(tl.int64)
    reached += tl.where(r == _GREATER - _LADDER, greater, 0)
    tl.atomic_add(state + _LADDER + r, reached, sem="relaxed")


@one_form("logits_ptr", "vocab", "stride")
def top_bins_kernel(
    logits_ptr,
    state_ptr,
    num_top,
    vocab,
    stride,
    ROW: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * ROW
    best = _some_best_of(state)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
    within, _, _ = _rung_of(state, num_top.to(tl.int64))
    there = (ids < vocab) & (best - logits <= within)
    if tl.max(there.to(tl.int32), axis=0) > 0:
        ones = tl.full((CHUNK,), 1, dtype=tl.int64)
        tl.atomic_add(state + STATE + _bin_of(logits, best), ones, mask=there, sem="relaxed")


@one_form()
def top_seek_kernel(
    logits_ptr,
    tokens_ptr,
    state_ptr,
    logprob_ptr,  # [rows] float32, written
    rank_ptr,  # [rows] int64, written
    num_top,
    stride,
    ROW: tl.constexpr,
    STATE: tl.constexpr,
    BINS: tl.constexpr,
    LIST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * ROW
    token = tl.load(tokens_ptr + row)
    own = legal(tl.load(logits_ptr + row * stride + tl.maximum(token, 0)))
    tl.store(logprob_ptr + row, tl.where(token < 0, float("-inf"), _logprob_of(own, state)))
    tl.store(rank_ptr + row, tl.where(token < 0, 0, tl.load(state + _GREATER) + 1))
    if num_top > 0:
        counts = tl.load(state + STATE + tl.arange(0, BINS))
        _seek_count(state, counts, tl.zeros((), dtype=tl.int64), num_top.to(tl.int64), LIST, BINS)
        tl.debug_barrier()
        tl.store(state + _FROM, 0)  # those above are wanted as well


@one_form("logits_ptr", "vocab", "stride")
def top_pick_kernel(
    logits_ptr,
    state_ptr,
    list_ptr,
    ids_ptr,  # [rows, num_top] int64, written
    values_ptr,  # [rows, num_top] float32, written
    num_top,
    vocab,
    stride,
    ROW: tl.constexpr,
    LIST: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state, row_ptr = state_ptr + row * ROW, logits_ptr + row * stride
    listed = tl.load(state + _LISTED)
    i = tl.arange(0, LIST)
    none = tl.full((), -9223372036854775808, dtype=tl.int64)
    keys = tl.load(list_ptr + row * LIST + i, mask=i < listed, other=-9223372036854775808)
    last = tl.full((), 9223372036854775807, dtype=tl.int64)
    for place in range(num_top):
        found = tl.max(tl.where(keys < last, keys, none), axis=0)
        if listed > LIST:
            found = none
            for start in range(0, vocab, CHUNK):
                ids = start + tl.arange(0, CHUNK)
                logits = legal(tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")))
                key = _key_of(logits, ids, ID_BITS)
                below = (key < last) & (ids < vocab)
                found = tl.maximum(found, tl.max(tl.where(below, key, none), axis=0))
        last = found
        tl.store(ids_ptr + row * num_top + place, (1 << ID_BITS) - 1 - (found & ((1 << ID_BITS) - 1)))
        tl.store(values_ptr + row * num_top + place, _logprob_of(_logit_of(found >> ID_BITS), state))


def chunk_of(rows: int, vocab: int) -> int:
    """Tokens of a program: fewer where there are few rows, so that all of the GPU reads."""
    return min(1024 if rows <= 8 else 2048, next_power_of_2(vocab))


def _check(logits: torch.Tensor) -> None:
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError("logits must be float32 rows")


def thresholds(
    logits: torch.Tensor,  # [rows, vocab] float32
    temperature: torch.Tensor,  # [rows] float32
    top_k: torch.Tensor,  # [rows] int32, 0 is off
    top_p: torch.Tensor,  # [rows] float32, 1 is off
    *,
    any_cut: bool = True,  # False: no row asks for top-k or top-p, only the greatest logit is wanted
    any_both: bool = True,  # False: no row asks for both
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(least order kept [rows], id limit at that order [rows], greatest logit [rows])"""
    _check(logits)
    rows, vocab = logits.shape
    order, limit = (torch.empty(rows, dtype=torch.int32, device=logits.device) for _ in range(2))
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    row, id_bits = STATE + 2 * BINS, max(1, (vocab - 1).bit_length())
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        mine, count = logits[part], part.stop - start
        chunk = chunk_of(count, vocab)
        chunks = -(-vocab // chunk)
        state = torch.zeros(count, row, dtype=torch.int64, device=logits.device)
        columns = temperature[part], top_k[part], top_p[part]
        best_kernel[(count, chunks)](mine, state, vocab, logits.stride(0), ROW=row, CHUNK=chunk, num_warps=4)
        if any_cut:
            filter_ladder_kernel[(count, chunks)](
                mine, *columns, state, vocab, logits.stride(0), ROW=row, CHUNK=chunk, num_warps=4
            )
            filter_bins_kernel[(count, chunks)](
                mine, *columns, state, vocab, logits.stride(0), ROW=row, STATE=STATE, BINS=BINS, CHUNK=chunk,
                num_warps=4,
            )  # fmt: skip
        filter_seek_kernel[(count,)](
            *columns, state, order[part], limit[part], best[part], ROW=row, STATE=STATE, BINS=BINS, LIST=LIST,
            num_warps=8,
        )  # fmt: skip
        if not any_cut:
            continue
        listed = torch.empty(count, LIST, dtype=torch.int64, device=logits.device)
        for _ in range(2 if any_both else 1):
            list_kernel[(count, chunks)](
                mine, state, listed, vocab, logits.stride(0), ALL=False, ROW=row, LIST=LIST,
                ID_BITS=id_bits, CHUNK=chunk, num_warps=4,
            )  # fmt: skip
            filter_search_kernel[(count,)](
                mine, columns[0], columns[2], state, listed, order[part], limit[part], vocab,
                logits.stride(0), ROW=row, STATE=STATE, BINS=BINS, LIST=LIST, FEW=min(FEW, LIST),
                ID_BITS=id_bits, CHUNK=chunk, num_warps=8,
            )  # fmt: skip
    return order, limit, best


def top(
    logits: torch.Tensor,  # [rows, vocab] float32
    tokens: torch.Tensor,  # [rows] int64, negative: none
    num_top: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of a token and of the greatest ones.

    (of tokens [rows] float32, 1 + how many are greater [rows] int64, greatest ids [rows, num_top]
    int64, theirs [rows, num_top] float32)
    """
    _check(logits)
    rows, vocab = logits.shape
    num_top = min(num_top, vocab)
    device = logits.device
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    ranks = torch.empty(rows, dtype=torch.int64, device=device)
    ids = torch.empty(rows, num_top, dtype=torch.int64, device=device)
    values = torch.empty(rows, num_top, dtype=torch.float32, device=device)
    row, id_bits = STATE + 2 * BINS, max(1, (vocab - 1).bit_length())
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        mine, count = logits[part], part.stop - start
        chunk = chunk_of(count, vocab)
        chunks = -(-vocab // chunk)
        state = torch.zeros(count, row, dtype=torch.int64, device=device)
        best_kernel[(count, chunks)](mine, state, vocab, logits.stride(0), ROW=row, CHUNK=chunk, num_warps=4)
        top_ladder_kernel[(count, chunks)](
            mine, tokens[part], state, num_top, vocab, logits.stride(0), ROW=row, CHUNK=chunk,
            num_warps=4,
        )  # fmt: skip
        if num_top:
            top_bins_kernel[(count, chunks)](
                mine, state, num_top, vocab, logits.stride(0), ROW=row, STATE=STATE, CHUNK=chunk, num_warps=4
            )
        top_seek_kernel[(count,)](
            mine, tokens[part], state, logprobs[part], ranks[part], num_top, logits.stride(0),
            ROW=row, STATE=STATE, BINS=BINS, LIST=LIST, num_warps=8,
        )  # fmt: skip
        if not num_top:
            continue
        listed = torch.empty(count, LIST, dtype=torch.int64, device=device)
        list_kernel[(count, chunks)](
            mine, state, listed, vocab, logits.stride(0), ALL=True, ROW=row, LIST=LIST, ID_BITS=id_bits,
            CHUNK=chunk, num_warps=4,
        )  # fmt: skip
        top_pick_kernel[(count,)](
            mine, state, listed, ids[part], values[part], num_top, vocab, logits.stride(0), ROW=row,
            LIST=LIST, ID_BITS=id_bits, CHUNK=min(LIST, chunk), num_warps=8,
        )  # fmt: skip
    return logprobs, ranks, ids, values
