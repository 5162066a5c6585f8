"""Drawing tokens: noise and argmax, over what top-k, top-p and min-p leave.

`draw` is one pass over the logits by many programs a row; each keeps its best score, and the last
to arrive picks the row's. Noise is octavo.sampling.noise's, word for word, in float32, and worked out
only where something is kept. Rows that ask for top-k or top-p get a threshold first (see filters).
Nothing waits for the host.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from octavo.kernels.triton import filters, select
from octavo.kernels.triton.launch import begin, next_power_of_2, one_form, pdl_options, uses_pdl
from octavo.kernels.triton.select import legal, order_of

NO_TOKEN = -1


@triton.jit
def _gumbel(word):
    """-log of the standard exponential that a 32-bit word stands for; small exponentials stay precise."""
    signed = word.to(tl.int32, bitcast=True)
    high = signed < 0
    near = tl.where(high, ~signed, signed)  # below 2^31
    u = near.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    rest = 1.0 - u
    # high half: E = -log(u), u being 1 - word / 2^32; low half: -log1p(-u), log(rest) without its rounding
    repair = tl.where(high | (rest == 1.0), 1.0, u / tl.where(rest == 1.0, 1.0, 1.0 - rest))
    log = tl.log(tl.where(high, u, rest)) * repair
    return -tl.log(tl.where(high | (rest < 1.0), -log, u))


@one_form("logits_ptr", "vocab", "stride")
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
    counter_ptr,  # [rows] int32, zero
    out_ptr,  # [rows] int64
    wanted_ptr,  # [1] int32: 0 if nothing is to be drawn, with GATED
    vocab,
    stride,
    chunks,
    stream,
    GREEDY: tl.constexpr,  # all rows are
    FILTERED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    if GATED:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
        if tl.load(wanted_ptr) == 0:
            return
    row, chunk = tl.program_id(0), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    logits = legal(tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")))
    value, kept = logits, logits > float("-inf")
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        noisy = temperature >= 1e-5
        temperature = tl.where(noisy, temperature, 1.0)
        if FILTERED:  # noqa: SIM102  (one is known when the kernel is compiled, the other is not)
            if noisy:
                order, least = order_of(logits), tl.load(order_ptr + row)
                kept = kept & ((order > least) | ((order == least) & (ids < tl.load(limit_ptr + row))))
                min_p, best = tl.load(min_p_ptr + row), tl.load(best_ptr + row)
                best = tl.where(best == float("-inf"), 0.0, best)  # nothing is legal: any number will do
                floor = tl.where(min_p > 0.0, tl.log(tl.maximum(min_p, 1e-38)), float("-inf"))
                kept = kept & ((logits - best) / temperature >= floor)
        if noisy & (tl.max(kept.to(tl.int32), axis=0) > 0):
            # a word for each token, four of one evaluation
            groups = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
            zero = tl.zeros((CHUNK // 4,), dtype=tl.int32)
            seed = tl.load(seed_ptr + row)
            key = (zero + seed.to(tl.int32)).to(tl.uint32, bitcast=True)
            high_key = (zero + (seed >> 32).to(tl.int32)).to(tl.uint32, bitcast=True)
            counter = (zero + tl.load(position_ptr + row).to(tl.int32)).to(tl.uint32, bitcast=True)
            w0, w1, w2, w3 = philox_impl(
                groups.to(tl.uint32, bitcast=True), counter, (zero + stream).to(tl.uint32, bitcast=True),
                zero.to(tl.uint32, bitcast=True), key, high_key,
            )  # fmt: skip
            words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (CHUNK,))
            value = logits / temperature + _gumbel(words)
    value = tl.where(kept, value, float("-inf"))
    best_score = tl.max(value, axis=0)
    best_id = tl.min(tl.where(value == best_score, ids, 2147483647), axis=0)
    tl.store(scores_ptr + row * chunks + chunk, best_score)
    tl.store(ids_ptr + row * chunks + chunk, best_id)
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") == chunks - 1:
        c = tl.arange(0, CHUNKS)
        place, there = row * chunks + c, c < chunks
        found = tl.load(scores_ptr + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        tokens = tl.load(ids_ptr + place, mask=there, other=2147483647, cache_modifier=".cg")
        greatest = tl.max(found, axis=0)
        token = tl.min(tl.where(found == greatest, tokens, 2147483647), axis=0)
        token = tl.where(greatest == float("-inf"), -1, token)
        tl.store(out_ptr + row, token.to(tl.int64))
        tl.store(counter_ptr + row, 0)


def draw(
    logits: torch.Tensor,  # [rows, vocab] float32
    temperature: torch.Tensor | None,  # [rows] float32; None: all rows are greedy
    top_k: torch.Tensor | None = None,  # with top_p and min_p; None: no row filters
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,  # [rows] int64
    position: torch.Tensor | None = None,  # [rows] int64
    stream: int = 0,
    *,
    any_cut: bool = True,  # as in `thresholds`
    any_both: bool = True,
    out: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    wanted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens [rows] int64; NO_TOKEN where none is legal.

    A captured launch says where its tokens go (`out`) and where rows count their programs (`counters`
    [rows] int32, zero before and after), and draws if `wanted` [1] int32 is not zero when it runs.
    """
    rows, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError("logits must be float32 rows")
    device = logits.device
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return out
    chunk = select.chunk_of(rows, vocab)
    chunks = -(-vocab // chunk)
    scores = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    ids = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    if counters is None:
        counters = torch.zeros(rows, dtype=torch.int32, device=device)
    order = limit = best = logits
    if top_k is not None:
        assert temperature is not None
        assert top_p is not None
        order, limit, best = filters.thresholds(
            logits, temperature, top_k, top_p, any_cut=any_cut, any_both=any_both
        )
    pdl = uses_pdl(logits)
    draw_kernel[(rows, chunks)](
        logits, temperature, min_p, seed, position, order, limit, best, scores, ids, counters, out, wanted,
        vocab, logits.stride(0), chunks, stream, GREEDY=temperature is None, FILTERED=top_k is not None,
        CHUNK=chunk, CHUNKS=next_power_of_2(chunks), GATED=wanted is not None, PDL=pdl,
        num_warps=select.warps_of(chunk), **pdl_options(pdl),
    )  # fmt: skip
    return out
