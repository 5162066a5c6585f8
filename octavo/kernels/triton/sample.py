"""Drawing tokens: thresholds of top-k, top-p and min-p without a sort, then noise and argmax.

`draw` is one pass over the logits by many programs a row; each keeps its best score, and the last
to arrive picks the row's. Noise is octavo.sampling.noise's, word for word, in float32. Rows that ask
for top-k or top-p get a threshold first: the order of logits is that of their bits as integers, so
the threshold is found by halving the interval of integers, counting (or weighing) what lies above.
Equal logits at the threshold go to the lowest ids. Nothing waits for the host.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from octavo.kernels.triton.launch import next_power_of_2

NO_TOKEN = -1
GREEDY_BELOW = 1e-5
CHUNK = 4096  # tokens of a program
_NO_LIMIT = 2**31 - 1


@triton.jit
def _legal(logits):
    """NaN as -inf, and +inf as the greatest number."""
    logits = tl.where(logits == logits, logits, float("-inf"))
    return tl.minimum(logits, 3.4028234663852886e38)


@triton.jit
def _order(logits):
    """int32 that compare as the floats do; -0 and 0 are equal."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(logits == 0.0, 0, bits)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _gumbel(word):
    """-log of the standard exponential that a 32-bit word stands for; small exponentials stay precise."""
    signed = word.to(tl.int32, bitcast=True)
    high = signed < 0
    near = tl.where(high, ~signed, signed)  # below 2^31
    u = near.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    rest = 1.0 - u
    # high half: E = -log(u), u being 1 - word / 2^32; low half: -log1p(-u)
    log1p = tl.where(rest == 1.0, -u, tl.log(rest) * (u / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -tl.log(-tl.where(high, tl.log(u), log1p))


@triton.jit
def _measure(row_ptr, vocab, low, limit, best, temperature, WEIGHS: tl.constexpr, BLOCK: tl.constexpr):
    """Number, or weight, of the tokens whose order is above `low` (or equals it, with an id below limit)."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = _legal(tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")))
        order = _order(logits)
        counted = (logits > float("-inf")) & ((order > low) | ((order == low) & (ids < limit)))
        one = tl.exp((logits - best) / temperature) if WEIGHS else 1.0
        total += tl.where(counted, one, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def threshold_kernel(
    logits_ptr,  # [rows, vocab] float32
    temperature_ptr,  # [rows] float32
    top_k_ptr,  # [rows] int32
    top_p_ptr,  # [rows] float32
    order_ptr,  # [rows] int32, written: least order kept
    limit_ptr,  # [rows] int32, written: tokens of that order are kept if their id is below
    best_ptr,  # [rows] float32, written: greatest logit
    vocab,
    stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    greatest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        greatest = tl.maximum(greatest, _legal(tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))))
    best = tl.max(greatest, axis=0)
    top = _order(best)
    kept = tl.full((), -2147483648, dtype=tl.int32)
    limit = tl.full((), 2147483647, dtype=tl.int32)
    filters = (temperature >= 1e-5) & (best > float("-inf"))
    if filters & (top_k > 0):
        # the greatest order with at least top_k tokens at or above it
        low, high = kept.to(tl.int64), top.to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            count = _measure(row_ptr, vocab, middle.to(tl.int32), vocab, best, 1.0, False, BLOCK)
            if count >= top_k:
                low = middle
                if count == top_k:
                    high = middle + 1
            else:
                high = middle
        kept = low.to(tl.int32)
        few, many = tl.full((), 0, dtype=tl.int32), vocab.to(tl.int32)
        if _measure(row_ptr, vocab, kept, vocab, best, 1.0, False, BLOCK) > top_k:
            while many - few > 1:  # the least limit that keeps top_k
                half = (few + many) >> 1
                if _measure(row_ptr, vocab, kept, half, best, 1.0, False, BLOCK) >= top_k:
                    many = half
                else:
                    few = half
            limit = many
    if filters & (top_p < 1.0):
        wanted = top_p * _measure(row_ptr, vocab, kept, limit, best, temperature, True, BLOCK)
        # the greatest order at which the tokens at or above it weigh enough
        low, high = kept.to(tl.int64), top.to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            if _measure(row_ptr, vocab, middle.to(tl.int32), vocab, best, temperature, True, BLOCK) >= wanted:
                low = middle
            else:
                high = middle
        if low > kept:
            limit = tl.full((), 2147483647, dtype=tl.int32)
        kept = low.to(tl.int32)
        few, many = tl.full((), 0, dtype=tl.int32), tl.minimum(limit, vocab).to(tl.int32)
        while many - few > 1:
            half = (few + many) >> 1
            if _measure(row_ptr, vocab, kept, half, best, temperature, True, BLOCK) >= wanted:
                many = half
            else:
                few = half
        limit = many
    tl.store(order_ptr + row, kept)
    tl.store(limit_ptr + row, limit)
    tl.store(best_ptr + row, best)


@triton.jit
def draw_kernel(
    logits_ptr,  # [rows, vocab] float32
    temperature_ptr,  # [rows] float32
    min_p_ptr,
    seed_ptr,  # [rows] int64
    position_ptr,  # [rows] int64
    order_ptr,  # [rows] int32
    limit_ptr,
    best_ptr,
    scores_ptr,  # [rows, chunks] float32
    ids_ptr,  # [rows, chunks] int32
    counter_ptr,  # [rows] int32, zero between launches
    out_ptr,  # [rows] int64
    vocab,
    stride,
    chunks,
    stream,
    GREEDY: tl.constexpr,  # all rows are
    FILTERED: tl.constexpr,
    GROUPS: tl.constexpr,  # of four tokens
    CHUNKS: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    groups = chunk * GROUPS + tl.arange(0, GROUPS)
    temperature = 0.0
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
    noisy = temperature >= 1e-5
    score = tl.full((GROUPS,), float("-inf"), dtype=tl.float32)
    winner = tl.full((GROUPS,), 2147483647, dtype=tl.int32)
    if not GREEDY:
        zero = tl.zeros((GROUPS,), dtype=tl.int32)
        seed = tl.load(seed_ptr + row)
        key = (zero + seed.to(tl.int32)).to(tl.uint32, bitcast=True)
        high_key = (zero + (seed >> 32).to(tl.int32)).to(tl.uint32, bitcast=True)
        counter = (zero + tl.load(position_ptr + row).to(tl.int32)).to(tl.uint32, bitcast=True)
        w0, w1, w2, w3 = philox_impl(
            groups.to(tl.uint32, bitcast=True), counter, (zero + stream).to(tl.uint32, bitcast=True),
            zero.to(tl.uint32, bitcast=True), key, high_key,
        )  # fmt: skip
    else:
        w0 = groups.to(tl.uint32)
        w1, w2, w3 = w0, w0, w0
    for j in tl.static_range(4):
        ids = groups * 4 + j
        logits = _legal(tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")))
        value = logits
        if not GREEDY:
            word = w0 if j == 0 else w1 if j == 1 else w2 if j == 2 else w3
            scaled = logits / tl.where(noisy, temperature, 1.0)
            value = tl.where(noisy, scaled + _gumbel(word), logits)
            if FILTERED:
                order = _order(logits)
                least, limit = tl.load(order_ptr + row), tl.load(limit_ptr + row)
                keeps = (order > least) | ((order == least) & (ids < limit))
                min_p = tl.load(min_p_ptr + row)
                best = tl.load(best_ptr + row)
                best = tl.where(best == float("-inf"), 0.0, best)  # nothing is legal: any number will do
                floor = tl.where(min_p > 0.0, tl.log(tl.maximum(min_p, 1e-38)), float("-inf"))
                above = (logits - best) / tl.where(noisy, temperature, 1.0) >= floor
                value = tl.where(noisy, tl.where(keeps & above, value, float("-inf")), value)
            value = tl.where(logits == float("-inf"), float("-inf"), value)
        better = value > score
        winner = tl.where(better, ids, winner)
        score = tl.where(better, value, score)
    best_score = tl.max(score, axis=0)
    best_id = tl.min(tl.where(score == best_score, winner, 2147483647), axis=0)
    tl.store(scores_ptr + row * chunks + chunk, best_score)
    tl.store(ids_ptr + row * chunks + chunk, best_id)
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") == chunks - 1:
        tl.store(counter_ptr + row, 0)
        c = tl.arange(0, CHUNKS)
        found = tl.load(
            scores_ptr + row * chunks + c, mask=c < chunks, other=float("-inf"), cache_modifier=".cg"
        )
        tokens = tl.load(ids_ptr + row * chunks + c, mask=c < chunks, other=2147483647, cache_modifier=".cg")
        greatest = tl.max(found, axis=0)
        token = tl.min(tl.where(found == greatest, tokens, 2147483647), axis=0)
        token = tl.where(greatest == float("-inf"), -1, token)
        tl.store(out_ptr + row, token.to(tl.int64))


def thresholds(
    logits: torch.Tensor,  # [rows, vocab] float32
    temperature: torch.Tensor,  # [rows] float32
    top_k: torch.Tensor,  # [rows] int32, 0 is off
    top_p: torch.Tensor,  # [rows] float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(least order kept [rows], id limit at that order [rows], greatest logit [rows])"""
    rows, vocab = logits.shape
    order, limit = (torch.empty(rows, dtype=torch.int32, device=logits.device) for _ in range(2))
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(8192, next_power_of_2(vocab))
    threshold_kernel[(rows,)](
        logits, temperature, top_k, top_p, order, limit, best, vocab, logits.stride(0), BLOCK=block,
        num_warps=32 if block == 8192 else 4,
    )  # fmt: skip
    return order, limit, best


def draw(
    logits: torch.Tensor,  # [rows, vocab] float32
    temperature: torch.Tensor | None,  # [rows] float32; None: all rows are greedy
    top_k: torch.Tensor | None = None,  # with top_p and min_p; None: no row filters
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,  # [rows] int64
    position: torch.Tensor | None = None,  # [rows] int64
    stream: int = 0,
) -> torch.Tensor:
    """Tokens [rows] int64; NO_TOKEN where none is legal."""
    rows, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError("logits must be float32 rows")
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    chunks = -(-vocab // CHUNK)
    scores = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    counters = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    greedy, filtered = temperature is None, top_k is not None
    order = limit = best = logits
    if filtered:
        assert temperature is not None
        assert top_p is not None
        assert top_k is not None
        order, limit, best = thresholds(logits, temperature, top_k, top_p)
    draw_kernel[(rows, chunks)](
        logits, temperature, min_p, seed, position, order, limit, best, scores, ids, counters, out, vocab,
        logits.stride(0), chunks, stream, GREEDY=greedy, FILTERED=filtered, GROUPS=CHUNK // 4,
        CHUNKS=next_power_of_2(chunks), num_warps=4,
    )  # fmt: skip
    return out
