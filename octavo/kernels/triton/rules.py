"""What changes a row's logits by its request's own rules: masks, bans, bias and penalties, on the device.

Rules lie in a table, one record a slot (octavo/sampling/device_rules.py writes them when a request
enters). A row says which slot it belongs to and at which position it draws; both position and text are
read where they are, so the host need not know what the step before brought, and every row sees the true
text before it: confirmed tokens, then the drafts in front of it.

Nothing is remembered from step to step. For a penalty the tokens before a row are counted anew, by
atomic additions to a row of counters as long as the vocabulary; a second launch takes each counter out
(and so leaves zero) and changes the logit of whoever gets it first. That costs a few microseconds for
thousands of tokens, and there is nothing to repair when drafts are refused or a slot is rebuilt.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton.language as tl

from octavo.kernels.triton.launch import one_form

# Words of a record, int32. Floats as their bits.
NUM_PROMPT, MIN_TOKENS, REPETITION, PRESENCE, FREQUENCY, HAS_PENALTIES = range(6)
NUM_STOPS, STOPS = 6, 7  # how many, and the word where they begin
NUM_BIAS, BIAS = 8, 9  # ids, then as many values
NUM_WORDS, LONGEST, WORDS = 10, 11, 12  # bad words: see `edit_kernel`
HEADER = 16  # words before the lists

COUNTED_ROWS = 64  # rows with penalties at a time: each takes a row of counters
_PARTS = 8  # programs that share a row's text
_BLOCK = 512
_SEEN = tl.constexpr(1 << 30)  # of a counter: the token is in the prompt; below are its places in the output
_HEADER = tl.constexpr(HEADER)


@one_form()
def mask_kernel(
    logits_ptr,  # [rows, vocab] float32
    entries_ptr,  # [entries, 2] int32: row of logits, row of masks
    masks_ptr,  # [masks, num_words] int32
    vocab,
    stride,
    num_words,
    BLOCK: tl.constexpr,
):
    """Tokens whose bit is 0, or that lie behind the last word, may not be drawn."""
    row = tl.load(entries_ptr + tl.program_id(0) * 2).to(tl.int64)
    mask = tl.load(entries_ptr + tl.program_id(0) * 2 + 1).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(masks_ptr + mask * num_words + ids // 32, mask=ids // 32 < num_words, other=0)
    banned = ((word >> (ids % 32)) & 1) == 0
    nothing = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    tl.store(logits_ptr + row * stride + ids, nothing, mask=banned & (ids < vocab))


@one_form()
def edit_kernel(
    logits_ptr,  # [rows, vocab] float32
    entries_ptr,  # [entries, 2] int32: row of logits, slot
    positions_ptr,  # [rows] int64, where each row draws, -1 for padding
    rules_ptr,  # [slots, rules_stride] int32
    tokens_ptr,  # [slots, tokens_stride] int32
    counters_ptr,  # [entries, vocab] int32, zero; read only where a slot has penalties
    vocab,
    stride,
    rules_stride,
    tokens_stride,
    parts,
    BLOCK: tl.constexpr,
):
    """Bias and bans of an entry, and its text counted for the penalties."""
    entry, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(entries_ptr + entry * 2).to(tl.int64)
    slot = tl.load(entries_ptr + entry * 2 + 1).to(tl.int64)
    position = tl.load(positions_ptr + row).to(tl.int32)
    if position < 0:
        return
    rules = rules_ptr + slot * rules_stride
    text = tokens_ptr + slot * tokens_stride
    i = tl.arange(0, BLOCK)
    num_prompt = tl.load(rules)
    if tl.load(rules + 5) != 0:
        counters = counters_ptr + entry * vocab
        for start in range(part * BLOCK, position, parts * BLOCK):
            token = tl.load(text + start + i, mask=start + i < position, other=-1)
            known = (token >= 0) & (token < vocab)
            in_prompt = start + i < num_prompt
            seen, one = tl.full((BLOCK,), _SEEN, dtype=tl.int32), tl.full((BLOCK,), 1, dtype=tl.int32)
            tl.atomic_or(counters + token, seen, mask=known & in_prompt, sem="relaxed")
            tl.atomic_add(counters + token, one, mask=known & (start + i >= num_prompt), sem="relaxed")
    if part != 0:
        return
    logits = logits_ptr + row * stride
    num_bias, bias = tl.load(rules + 8), rules + tl.load(rules + 9)
    for start in range(0, num_bias, BLOCK):
        there = start + i < num_bias
        token = tl.load(bias + start + i, mask=there, other=0)
        value = tl.load(bias + num_bias + start + i, mask=there, other=0).to(tl.float32, bitcast=True)
        there = there & (token < vocab)
        tl.store(logits + token, tl.load(logits + token, mask=there, other=0.0) + value, mask=there)
    tl.debug_barrier()  # a banned token stays banned, whatever is added to it
    nothing = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    if position - num_prompt < tl.load(rules + 1):
        num_stops, stops = tl.load(rules + 6), rules + tl.load(rules + 7)
        for start in range(0, num_stops, BLOCK):
            token = tl.load(stops + start + i, mask=start + i < num_stops, other=vocab)
            tl.store(logits + token, nothing, mask=token < vocab)
    # Bad words stand from their ends: first the last tokens of all words, then the ones before these, and
    # so on; -1 where a word has begun. A word's last token is banned where the others stand before it.
    num_words, longest, words = tl.load(rules + 10), tl.load(rules + 11), rules + tl.load(rules + 12)
    for start in range(0, num_words, BLOCK):
        there = start + i < num_words
        last = tl.load(words + start + i, mask=there, other=vocab)
        found = there
        for back in range(1, longest):
            wanted = tl.load(words + back * num_words + start + i, mask=there, other=-1)
            before = tl.load(text + position - back, mask=position >= back, other=-2)
            found = found & ((wanted < 0) | (wanted == before))
        tl.store(logits + last, nothing, mask=found & (last < vocab))


@one_form()
def penalize_kernel(
    logits_ptr,  # [rows, vocab] float32
    entries_ptr,  # [entries, 2] int32: row of logits, slot
    positions_ptr,
    rules_ptr,
    tokens_ptr,
    counters_ptr,  # [entries, vocab] int32, zero afterwards
    vocab,
    stride,
    rules_stride,
    tokens_stride,
    parts,
    BLOCK: tl.constexpr,
):
    """Repetition, frequency and presence penalties, in this order."""
    entry, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(entries_ptr + entry * 2).to(tl.int64)
    slot = tl.load(entries_ptr + entry * 2 + 1).to(tl.int64)
    position = tl.load(positions_ptr + row).to(tl.int32)
    rules = rules_ptr + slot * rules_stride
    text = tokens_ptr + slot * tokens_stride
    logits, counters = logits_ptr + row * stride, counters_ptr + entry * vocab
    repetition = tl.load(rules + 2).to(tl.float32, bitcast=True)
    presence = tl.load(rules + 3).to(tl.float32, bitcast=True)
    frequency = tl.load(rules + 4).to(tl.float32, bitcast=True)
    i = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(part * BLOCK, position, parts * BLOCK):  # none for padding
        token = tl.load(text + start + i, mask=start + i < position, other=-1)
        known = (token >= 0) & (token < vocab)
        count = tl.atomic_xchg(counters + token, zero, mask=known, sem="relaxed")
        mine = known & (count != 0)  # of a token's places one finds its counter, the others nothing
        value = tl.load(logits + token, mask=mine, other=0.0)
        value = tl.where(value > 0, tl.div_rn(value, zero.to(tl.float32) + repetition), value * repetition)
        times = count & (_SEEN - 1)
        less = value - frequency * times.to(tl.float32)
        value = tl.where(times > 0, less - presence, value)
        tl.store(logits + token, value, mask=mine)


def mask_rows(logits: torch.Tensor, entries: torch.Tensor, masks: torch.Tensor) -> None:
    """Leave only the tokens that masks [n, words] int32 allow; entries [m, 2] int32: row, row of masks."""
    if not len(entries):
        return
    if masks.dtype != torch.int32 or not masks.is_contiguous() or logits.dtype != torch.float32:
        raise ValueError("masks are contiguous int32 rows, and logits float32")
    block = 1024
    mask_kernel[(len(entries), -(-logits.shape[1] // block))](
        logits, entries, masks, logits.shape[1], logits.stride(0), masks.shape[1], BLOCK=block, num_warps=4
    )


def apply(
    logits: torch.Tensor,  # [rows, vocab] float32, written
    entries: torch.Tensor,  # [n, 2] int32: row of logits, slot; those with penalties first
    num_penalized: int,
    positions: torch.Tensor,  # [rows] int64
    rules: torch.Tensor,  # [slots, width] int32
    tokens: torch.Tensor,  # [slots, max_len] int32
    counters: torch.Tensor,  # [COUNTED_ROWS, vocab] int32, zero before and after
) -> None:
    """Bias, bans and penalties."""
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or counters.shape[1] != logits.shape[1]:
        raise ValueError(f"logits {tuple(logits.shape)} do not go with counters {tuple(counters.shape)}")
    if entries.dtype != torch.int32 or not entries.is_contiguous() or positions.dtype != torch.int64:
        raise ValueError("entries are int32 and positions int64")
    first = 0
    while first < len(entries):
        penalized = first < num_penalized
        last = min(first + len(counters), num_penalized) if penalized else len(entries)
        arguments = (
            logits, entries[first:last], positions, rules, tokens, counters, logits.shape[1],
            logits.stride(0), rules.stride(0), tokens.stride(0),
        )  # fmt: skip
        parts = _PARTS if penalized else 1
        edit_kernel[(last - first, parts)](*arguments, parts, BLOCK=_BLOCK, num_warps=4)
        if penalized:
            # as on the host: a product is rounded before it is subtracted
            penalize_kernel[(last - first, parts)](
                *arguments, parts, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False
            )
        first = last
