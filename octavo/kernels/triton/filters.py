"""Thresholds of top-k and top-p; see select for how a row is gone through.

Where both ask, what top-k left has to be known before top-p can be weighed, so the last pass may be
needed once more. A bin of more than LIST tokens (equal logits, say) is gone through in the logits
themselves: slower, and as exact.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.triton import select
from octavo.kernels.triton.launch import one_form
from octavo.kernels.triton.select import (
    BINS,
    FROM,
    LADDER,
    LEFT,
    LISTED,
    PENDING,
    RUNGS,
    STATE,
    TO,
    all_on_ladder,
    best_of,
    bin_of,
    count_rungs,
    key_of,
    legal,
    logit_of,
    rung_of,
    seek_count,
    seek_weight,
    weight_of,
    weight_wanted,
)

FEW = 512  # listed tokens that are searched fast


@triton.jit
def weigh_rungs(distance, there, weights):
    """[32] int64: how much a chunk's tokens within each rung's distance weigh."""
    r = tl.arange(0, 32)
    reached = tl.where(r == RUNGS - 1, tl.sum(tl.where(there, weights, 0), axis=0), 0)
    for rung in tl.static_range(RUNGS - 1):
        within = there & (distance <= 2.0 ** (rung - 6))
        reached += tl.where(r == rung, tl.sum(tl.where(within, weights, 0), axis=0), 0)
    return reached


@one_form("logits_ptr", "vocab", "stride")
def filter_ladder_kernel(
    logits_ptr,  # [rows, vocab] float32
    temperature_ptr,  # [rows] float32
    top_k_ptr,  # [rows] int32
    top_p_ptr,  # [rows] float32
    state_ptr,  # [rows, ROW] int64: state, counts, weights; zero but for BEST
    vocab,
    stride,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * ROW
    best, temperature = best_of(state), tl.load(temperature_ptr + row)
    filters = (temperature >= 1e-5) & (best > float("-inf"))
    counts_them = filters & (tl.load(top_k_ptr + row) > 0)
    weighs_them = filters & (tl.load(top_p_ptr + row) < 1.0)
    if counts_them | weighs_them:
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
        there = logits > float("-inf")
        if counts_them:
            reached = count_rungs(best - logits, there)
        else:
            reached = weigh_rungs(best - logits, there, weight_of(logits, best, temperature))
        r = tl.arange(0, 32)
        tl.atomic_add(state + LADDER + r, reached, mask=r < RUNGS, sem="relaxed")


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
    best, temperature = best_of(state), tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    filters = (temperature >= 1e-5) & (best > float("-inf"))
    counts_them, weighs_them = filters & (top_k > 0), filters & (top_p < 1.0)
    if counts_them | weighs_them:
        whole = all_on_ladder(state)
        wanted = top_k.to(tl.int64)
        if not counts_them:
            wanted = weight_wanted(top_p, whole)
        within, beyond, _ = rung_of(state, wanted)
        if counts_them & weighs_them:
            beyond = -1.0  # what top-k leaves has to be weighed
            within = tl.where(whole > wanted, within, float("inf"))
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
        distance = best - logits
        there = (logits > float("-inf")) & (distance <= within) & (distance > beyond)
        if tl.max(there.to(tl.int32), axis=0) > 0:
            place = state + STATE + bin_of(logits, best)
            if counts_them:
                tl.atomic_add(place, tl.full((CHUNK,), 1, dtype=tl.int64), mask=there, sem="relaxed")
            if weighs_them:
                weight = weight_of(logits, best, temperature)
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
    best, top_k, top_p = best_of(state), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    tl.store(order_ptr + row, -2147483648)
    tl.store(limit_ptr + row, 2147483647)
    tl.store(best_ptr + row, best)
    filters = (tl.load(temperature_ptr + row) >= 1e-5) & (best > float("-inf"))
    if filters & ((top_k > 0) | (top_p < 1.0)):
        b = tl.arange(0, BINS)
        whole = all_on_ladder(state)
        wanted = top_k.to(tl.int64)
        if (top_k > 0) & (whole > wanted):
            _, _, base = rung_of(state, wanted)
            counts = tl.load(state + STATE + b)
            seek_count(state, counts, tl.where(top_p < 1.0, 0, base), wanted, LIST, BINS)
        elif top_p < 1.0:
            weights = tl.load(state + STATE + BINS + b)
            base = tl.zeros_like(whole)
            if top_k > 0:  # it cuts nothing, and the ladder has counted
                wanted = weight_wanted(top_p, tl.sum(weights, axis=0))
            else:
                wanted = weight_wanted(top_p, whole)
                _, _, base = rung_of(state, wanted)
            seek_weight(state, weights, wanted - base, BINS)


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
                place = bin_of(logits, best)
                inside = (place >= low_bin) & (place <= high_bin) & (logits > float("-inf"))
                key = key_of(logits, ids, ID_BITS)
                value = tl.full((CHUNK,), 1, dtype=tl.int64)
                if WEIGHS:
                    value = weight_of(logits, best, temperature)
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
    best, left = best_of(state), tl.load(state + LEFT)
    low_bin, high_bin = tl.load(state + FROM), tl.load(state + TO)
    overflows = listed > SIZE
    i = tl.arange(0, SIZE)
    none = tl.full((SIZE,), -9223372036854775808, dtype=tl.int64)
    keys = tl.load(list_row + i, mask=i < listed, other=-9223372036854775808)
    values = tl.where(keys == none, best, logit_of(keys >> ID_BITS))
    weights = tl.where(keys == none, 0, weight_of(values, best, temperature))
    ones = tl.full((SIZE,), 1, dtype=tl.int64)
    high = key_of(best, tl.zeros((), dtype=tl.int64), ID_BITS) + 1
    low = tl.min(tl.where(keys == none, high, keys), axis=0)
    if MAY_OVERFLOW:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
        if overflows:
            low = tl.full((), -2147483648, dtype=tl.int64) << ID_BITS
    tl.debug_barrier()  # every warp has read the state
    tl.store(state + LISTED, 0)
    tl.store(state + PENDING, 0)
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
            wanted = weight_wanted(top_p, before + kept)
            if wanted <= before:
                seek_weight(state, of_bin, wanted, BINS)
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
    pending, listed = tl.load(state + PENDING), tl.load(state + LISTED)
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
    select.check(logits)
    rows, vocab = logits.shape
    order, limit = (torch.empty(rows, dtype=torch.int32, device=logits.device) for _ in range(2))
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    row, id_bits = STATE + 2 * BINS, max(1, (vocab - 1).bit_length())
    for start in range(0, rows, select.ROWS_AT_A_TIME):
        part = slice(start, min(start + select.ROWS_AT_A_TIME, rows))
        mine, count = logits[part], part.stop - start
        chunk = select.chunk_of(count, vocab)
        chunks, warps = -(-vocab // chunk), select.warps_of(chunk)
        state = torch.zeros(count, row, dtype=torch.int64, device=logits.device)
        columns = temperature[part], top_k[part], top_p[part]
        select.best_kernel[(count, chunks)](
            mine, state, vocab, logits.stride(0), ROW=row, CHUNK=chunk, num_warps=warps
        )
        if any_cut:
            filter_ladder_kernel[(count, chunks)](
                mine, *columns, state, vocab, logits.stride(0), ROW=row, CHUNK=chunk, num_warps=4
            )
            filter_bins_kernel[(count, chunks)](
                mine, *columns, state, vocab, logits.stride(0), ROW=row, STATE=STATE, BINS=BINS, CHUNK=chunk,
                num_warps=4,
            )  # fmt: skip
        filter_seek_kernel[(count,)](
            *columns, state, order[part], limit[part], best[part], ROW=row, STATE=STATE, BINS=BINS,
            LIST=select.LIST, num_warps=8,
        )  # fmt: skip
        if not any_cut:
            continue
        listed = torch.empty(count, select.LIST, dtype=torch.int64, device=logits.device)
        for _ in range(2 if any_both else 1):
            select.list_kernel[(count, chunks)](
                mine, state, listed, vocab, logits.stride(0), ALL=False, ROW=row, LIST=select.LIST,
                ID_BITS=id_bits, CHUNK=chunk, num_warps=warps,
            )  # fmt: skip
            filter_search_kernel[(count,)](
                mine, columns[0], columns[2], state, listed, order[part], limit[part], vocab,
                logits.stride(0), ROW=row, STATE=STATE, BINS=BINS, LIST=select.LIST,
                FEW=min(FEW, select.LIST), ID_BITS=id_bits, CHUNK=chunk, num_warps=8,
            )  # fmt: skip
    return order, limit, best
