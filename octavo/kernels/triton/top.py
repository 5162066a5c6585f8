"""The greatest tokens of a row and their log-probabilities; see select for how a row is gone through."""
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
    GREATER,
    LADDER,
    LISTED,
    STATE,
    TOTAL,
    bin_of,
    count_rungs,
    key_of,
    legal,
    logit_of,
    rung_of,
    seek_count,
    some_best_of,
    weight_of,
)


@triton.jit
def _logprob_of(logits, state):
    """Log-probabilities, of a row whose total weight is known; NaN where no logit is above -inf."""
    total = tl.load(state + TOTAL)
    nothing = total == 0
    share = (tl.where(nothing, 1, total).to(tl.float64) / 1099511627776.0).to(tl.float32)
    return tl.where(nothing, float("nan"), logits - some_best_of(state) - tl.log(share))


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
    best = some_best_of(state)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    there = ids < vocab
    logits = legal(tl.load(row_ptr + ids, mask=there, other=float("-inf")))
    own = legal(tl.load(row_ptr + tl.maximum(tl.load(tokens_ptr + row), 0)))
    r = tl.arange(0, 32)
    reached = tl.zeros((32,), dtype=tl.int64)
    if num_top > 0:
        reached = count_rungs(best - logits, there)
    weight = tl.where(there, weight_of(logits, best, 1.0), 0)
    reached += tl.where(r == TOTAL - LADDER, tl.sum(weight, axis=0), 0)
    greater = tl.sum((there & (logits > own)).to(tl.int32), axis=0).to(tl.int64)
    reached += tl.where(r == GREATER - LADDER, greater, 0)
    tl.atomic_add(state + LADDER + r, reached, sem="relaxed")


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
    best = some_best_of(state)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    logits = legal(tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=float("-inf")))
    within, _, _ = rung_of(state, num_top.to(tl.int64))
    there = (ids < vocab) & (best - logits <= within)
    if tl.max(there.to(tl.int32), axis=0) > 0:
        ones = tl.full((CHUNK,), 1, dtype=tl.int64)
        tl.atomic_add(state + STATE + bin_of(logits, best), ones, mask=there, sem="relaxed")


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
    tl.store(rank_ptr + row, tl.where(token < 0, 0, tl.load(state + GREATER) + 1))
    if num_top > 0:
        counts = tl.load(state + STATE + tl.arange(0, BINS))
        seek_count(state, counts, tl.zeros((), dtype=tl.int64), num_top.to(tl.int64), LIST, BINS)
        tl.debug_barrier()
        tl.store(state + FROM, 0)  # those above are wanted as well


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
    listed = tl.load(state + LISTED)
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
                key = key_of(logits, ids, ID_BITS)
                below = (key < last) & (ids < vocab)
                found = tl.maximum(found, tl.max(tl.where(below, key, none), axis=0))
        last = found
        tl.store(ids_ptr + row * num_top + place, (1 << ID_BITS) - 1 - (found & ((1 << ID_BITS) - 1)))
        tl.store(values_ptr + row * num_top + place, _logprob_of(logit_of(found >> ID_BITS), state))


def top(
    logits: torch.Tensor,  # [rows, vocab] float32
    tokens: torch.Tensor,  # [rows] int64, negative: none
    num_top: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of a token and of the greatest ones.

    (of tokens [rows] float32, 1 + how many are greater [rows] int64, greatest ids [rows, num_top]
    int64, theirs [rows, num_top] float32)
    """
    select.check(logits)
    rows, vocab = logits.shape
    num_top = min(num_top, vocab)
    device = logits.device
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    ranks = torch.empty(rows, dtype=torch.int64, device=device)
    ids = torch.empty(rows, num_top, dtype=torch.int64, device=device)
    values = torch.empty(rows, num_top, dtype=torch.float32, device=device)
    row, id_bits = STATE + 2 * BINS, max(1, (vocab - 1).bit_length())
    for start in range(0, rows, select.ROWS_AT_A_TIME):
        part = slice(start, min(start + select.ROWS_AT_A_TIME, rows))
        mine, count = logits[part], part.stop - start
        chunk = select.chunk_of(count, vocab)
        chunks, warps = -(-vocab // chunk), select.warps_of(chunk)
        state = torch.zeros(count, row, dtype=torch.int64, device=device)
        select.best_kernel[(count, chunks)](
            mine, state, vocab, logits.stride(0), ROW=row, CHUNK=chunk, num_warps=warps
        )
        top_ladder_kernel[(count, chunks)](
            mine, tokens[part], state, num_top, vocab, logits.stride(0), ROW=row, CHUNK=chunk,
            num_warps=warps,
        )  # fmt: skip
        if num_top:
            top_bins_kernel[(count, chunks)](
                mine,
                state,
                num_top,
                vocab,
                logits.stride(0),
                ROW=row,
                STATE=STATE,
                CHUNK=chunk,
                num_warps=warps,
            )
        top_seek_kernel[(count,)](
            mine, tokens[part], state, logprobs[part], ranks[part], num_top, logits.stride(0),
            ROW=row, STATE=STATE, BINS=BINS, LIST=select.LIST, num_warps=8,
        )  # fmt: skip
        if not num_top:
            continue
        listed = torch.empty(count, select.LIST, dtype=torch.int64, device=device)
        select.list_kernel[(count, chunks)](
            mine, state, listed, vocab, logits.stride(0), ALL=True, ROW=row, LIST=select.LIST,
            ID_BITS=id_bits, CHUNK=chunk, num_warps=warps,
        )  # fmt: skip
        top_pick_kernel[(count,)](
            mine, state, listed, ids[part], values[part], num_top, vocab, logits.stride(0), ROW=row,
            LIST=select.LIST, ID_BITS=id_bits, CHUNK=min(select.LIST, chunk), num_warps=8,
        )  # fmt: skip
    return logprobs, ranks, ids, values
