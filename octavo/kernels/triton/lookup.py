"""Drafts from the text itself, or from a predicted output, without asking the host.

What these compute is defined by octavo/speculation/lookup.py. A prompt lookup reads a request's whole
text once, by several programs where it is long; following a prediction looks at the tokens that came
since the last step, one after the other, and searches only where they differ from it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.launch import next_power_of_2, one_form
from octavo.kernels.triton.step import SlotTables

PART = 8192  # places of a text that one program looks at
BLOCK = 1024
_MOST_DRAFTS = 16  # of one request


@triton.jit
def _write_drafts(
    source,  # pointer to the first draft
    place,  # [DRAFTS] where each lies behind it
    count,
    known,
    slot,
    text,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,
    DRAFTS: tl.constexpr,
):
    """Up to `count` drafts behind the known tokens, not beyond the limit, none for a finished slot."""
    room = tl.maximum(tl.load(limit_ptr + slot) - known, 0)
    number = tl.minimum(count.to(tl.int64), room)
    number = tl.where(tl.load(finished_ptr + slot) != 0, 0, number)
    d = tl.arange(0, DRAFTS)
    draft = tl.load(source + place, mask=d < number, other=0)
    tl.store(text + known + d, draft, mask=d < number)
    tl.store(num_drafts_ptr + slot, number)


@one_form()
def prompt_lookup_kernel(
    asked_ptr,  # [requests, 2] int32: slot, number of drafts
    tokens_ptr,  # [slots, tokens_stride] int32
    num_tokens_ptr,  # [slots] int64
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,  # [slots] uint8
    best_ptr,  # [requests] int64, zero between launches: match << 32 | place of the best so far
    arrived_ptr,  # [requests] int32, zero between launches
    tokens_stride,
    parts,
    MIN_MATCH: tl.constexpr,
    MAX_MATCH: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    DRAFTS: tl.constexpr,
):
    request, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(asked_ptr + request * 2).to(tl.int64)
    count = tl.load(asked_ptr + request * 2 + 1)
    known = tl.load(num_tokens_ptr + slot)
    text = tokens_ptr + slot * tokens_stride
    last = known - 1
    end = tl.where(count > 0, tl.minimum((part + 1) * PART, last), 0).to(tl.int32)
    best = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(part * PART, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        same = place < end
        match = tl.zeros((BLOCK,), dtype=tl.int64)
        for back in tl.static_range(MAX_MATCH):
            wanted = tl.load(text + last - back, mask=last >= back, other=-1)
            there = same & (place >= back)
            same = there & (tl.load(text + place - back, mask=there, other=-2) == wanted)
            match += same.to(tl.int64)
        best = tl.maximum(best, tl.where(match >= MIN_MATCH, (match << 32) + place, 0))
    found = tl.max(best, axis=0)
    tl.atomic_max(best_ptr + request, found, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + request, 1, sem="acq_rel") == parts - 1:
        found = tl.load(best_ptr + request, cache_modifier=".cg")
        tl.debug_barrier()  # every warp has read it
        tl.store(best_ptr + request, 0)
        tl.store(arrived_ptr + request, 0)
        begin = (found & 0xFFFFFFFF) + 1
        period = tl.where(found > 0, known - begin, 1)
        count = tl.where(found > 0, count, 0)
        place = tl.arange(0, DRAFTS) % period  # what followed may run into the text's end: then it repeats
        _write_drafts(
            text + begin, place, count, known, slot, text, num_drafts_ptr, limit_ptr, finished_ptr, DRAFTS
        )


@one_form()
def predicted_lookup_kernel(
    asked_ptr,  # [requests, 2] int32: slot, number of drafts
    tokens_ptr,
    num_tokens_ptr,
    num_drafts_ptr,
    limit_ptr,
    finished_ptr,
    predicted_ptr,  # [slots, width] int32
    follows_ptr,  # [slots, 4] int32: predicted tokens, prompt tokens, output tokens followed, cursor
    tokens_stride,
    width,
    MIN_MATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    DRAFTS: tl.constexpr,
):
    request = tl.program_id(0)
    slot = tl.load(asked_ptr + request * 2).to(tl.int64)
    count = tl.load(asked_ptr + request * 2 + 1)
    known = tl.load(num_tokens_ptr + slot)
    text, predicted = tokens_ptr + slot * tokens_stride, predicted_ptr + slot * width
    length = tl.load(follows_ptr + slot * 4)
    prompt = tl.load(follows_ptr + slot * 4 + 1)
    cursor = tl.load(follows_ptr + slot * 4 + 3)
    place = prompt + tl.load(follows_ptr + slot * 4 + 2)
    while place < known:
        token = tl.load(text + place)
        if tl.load(predicted + cursor, mask=cursor < length, other=-1) == token:
            cursor += 1
        else:
            # behind the last tokens, at the nearest place from the cursor on, then before it
            ahead = tl.full((), 2147483647, dtype=tl.int32)
            behind = tl.full((), -1, dtype=tl.int32)
            end = tl.where(place - prompt >= MIN_MATCH - 1, length, 0)
            for start in range(0, end, BLOCK):
                i = start + tl.arange(0, BLOCK)
                same = (i < end) & (i >= MIN_MATCH - 1)
                for back in tl.static_range(MIN_MATCH):
                    wanted = tl.load(text + place - back, mask=place >= back, other=-1)
                    same = same & (tl.load(predicted + i - back, mask=same, other=-2) == wanted)
                ahead = tl.minimum(ahead, tl.min(tl.where(same & (i >= cursor), i, 2147483647), axis=0))
                behind = tl.maximum(behind, tl.max(tl.where(same & (i < cursor), i, -1), axis=0))
            # not found: take it that this one token was replaced by another
            found = tl.where(behind >= 0, behind + 1, tl.minimum(cursor + 1, length))
            cursor = tl.where(ahead < 2147483647, ahead + 1, found)
        place += 1
    tl.debug_barrier()  # every warp has read where this began
    tl.store(follows_ptr + slot * 4 + 2, place - prompt)
    tl.store(follows_ptr + slot * 4 + 3, cursor)
    _write_drafts(
        predicted + cursor, tl.arange(0, DRAFTS), tl.minimum(count, length - cursor), known, slot, text,
        num_drafts_ptr, limit_ptr, finished_ptr, DRAFTS,
    )  # fmt: skip


def _check(asked: torch.Tensor) -> None:
    if asked.dim() != 2 or asked.shape[1] != 2 or asked.dtype != torch.int32 or not asked.is_contiguous():
        raise ValueError(f"asked is int32 [n, 2], not {asked.dtype} {tuple(asked.shape)}")


def prompt_lookup(
    tables: SlotTables,
    asked: torch.Tensor,  # [n, 2] int32: slot, most drafts (at most 16)
    best: torch.Tensor,  # [n or more] int64, zero between launches
    arrived: torch.Tensor,  # [n or more] int32, zero between launches
    longest: int,  # at least the tokens of any of these requests
    min_match: int,
    max_match: int,
) -> None:
    """Drafts of these slots from their own text, and how many."""
    _check(asked)
    parts = max(1, -(-longest // PART))
    num_tokens, _, num_drafts, limit, finished = tables.counters
    prompt_lookup_kernel[(len(asked), parts)](
        asked, tables.tokens, num_tokens, num_drafts, limit, finished, best, arrived,
        tables.tokens.stride(0), parts, MIN_MATCH=min_match, MAX_MATCH=max_match, PART=PART, BLOCK=BLOCK,
        DRAFTS=next_power_of_2(_MOST_DRAFTS), num_warps=4,
    )  # fmt: skip


def predicted_lookup(
    tables: SlotTables,
    asked: torch.Tensor,  # [n, 2] int32: slot, most drafts (at most 16)
    predicted: torch.Tensor,  # [slots, width] int32
    follows: torch.Tensor,  # [slots, 4] int32: predicted tokens, prompt tokens, tokens followed, cursor
    min_match: int,
) -> None:
    """Drafts of these slots from what was predicted for them, and how many."""
    _check(asked)
    num_tokens, _, num_drafts, limit, finished = tables.counters
    predicted_lookup_kernel[(len(asked),)](
        asked, tables.tokens, num_tokens, num_drafts, limit, finished, predicted, follows,
        tables.tokens.stride(0), predicted.stride(0), MIN_MATCH=min_match, BLOCK=BLOCK,
        DRAFTS=next_power_of_2(_MOST_DRAFTS), num_warps=4,
    )  # fmt: skip
