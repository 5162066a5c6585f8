"""Draws of many rows at once in plain torch: for GPUs that the Triton kernels do not serve.

What `TorchDraw` does row by row, some ten launches and three waits each, is done here for as many rows as
their vocabularies fit into SLICE: one wait, for the tokens that can win at all. Every row is still a function
of itself alone; kept sets and noise are those of the reference.
"""

from __future__ import annotations

import torch

from octavo.sampling.batch import SamplingBatch
from octavo.sampling.noise import NOISE_SPAN, Stream, exponentials, philox4x32
from octavo.sampling.processors import NEG_INF
from octavo.sampling.sampler import NO_TOKEN, TorchDraw
from octavo.sampling_params import GREEDY_BELOW

SLICE = 1 << 21  # logits of the rows that are drawn together
SCRATCH_BYTES = SLICE * 8 * 16  # numbers of 64 bits held at the same time, rounded up
_MASK32 = 0xFFFF_FFFF


class DeviceDraw(TorchDraw):
    """See DrawKernels."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See DrawKernels."""
        best, tokens = _finite(logits).max(dim=-1)
        return torch.where(best == NEG_INF, NO_TOKEN, tokens)

    def draw(self, logits: torch.Tensor, batch: SamplingBatch, stream: Stream = Stream.DRAW) -> torch.Tensor:
        """See DrawKernels."""
        size = max(1, SLICE // logits.shape[1])
        rows = [slice(start, start + size) for start in range(0, len(logits), size)]
        return torch.cat([_draw(logits[some], _part(batch, some), stream) for some in rows])


def _part(batch: SamplingBatch, rows: slice) -> SamplingBatch:
    return SamplingBatch(
        batch.temperature[rows], batch.top_k[rows], batch.top_p[rows], batch.min_p[rows], batch.seed[rows],
        batch.position[rows],
    )  # fmt: skip


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """NaN as -inf, and +inf as the greatest number; a copy."""
    return torch.nan_to_num(logits, nan=NEG_INF, posinf=torch.finfo(logits.dtype).max, neginf=NEG_INF)


def _draw(logits: torch.Tensor, batch: SamplingBatch, stream: Stream) -> torch.Tensor:
    """int64 [rows]"""
    device, (rows, vocab_size) = logits.device, logits.shape

    def column(values: torch.Tensor) -> torch.Tensor:
        return values.to(device, non_blocking=True)[:, None]

    logits = _finite(logits)
    best, greedy = logits.max(dim=-1, keepdim=True)
    temperature = column(batch.temperature).double().clamp(min=GREEDY_BELOW)
    if bool(((batch.top_k > 0) | (batch.top_p < 1.0) | (batch.min_p > 0.0)).any()):  # columns of the host
        values, ids = logits.sort(dim=-1, descending=True, stable=True)  # equal logits: lowest id first
        filters = (column(batch.top_k), column(batch.top_p).double(), column(batch.min_p).double())
        kept = _kept(values, best, temperature, *filters)
    else:
        values, ids = logits, torch.arange(vocab_size, device=device).expand(rows, -1)
        kept = values > NEG_INF
    scaled = values.double() / temperature
    kept &= scaled >= best.double() / temperature - NOISE_SPAN
    row, place = kept.nonzero(as_tuple=True)  # waits for the device
    tokens = ids[row, place]
    words = _words(column(batch.seed)[row, 0], column(batch.position)[row, 0], tokens, stream)
    scores = scaled[row, place] - exponentials(words).log()
    highest = scores.new_full((rows,), NEG_INF).scatter_reduce_(0, row, scores, "amax")
    winners = torch.where(scores == highest[row], tokens, vocab_size)  # the lowest id among equals
    drawn = tokens.new_full((rows,), vocab_size).scatter_reduce_(0, row, winners, "amin")
    drawn = torch.where(column(batch.temperature)[:, 0] < GREEDY_BELOW, greedy[:, 0], drawn)
    return torch.where((best[:, 0] == NEG_INF) | (drawn == vocab_size), NO_TOKEN, drawn)


def _kept(
    values: torch.Tensor,  # [rows, vocab_size] float32, descending
    best: torch.Tensor,  # [rows, 1]
    temperature: torch.Tensor,  # [rows, 1] float64
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """What top-k, top-p and min-p leave, [rows, vocab_size] bool; see `kept_tokens`."""
    place = torch.arange(values.shape[1], device=values.device)
    kept = (values > NEG_INF) & ((place < top_k) | (top_k <= 0))
    scaled = (values.double() - best.double()) / temperature
    mass = torch.where(kept, scaled.exp(), 0.0)
    before = mass.cumsum(1) - mass
    kept &= (before < top_p * mass.sum(1, keepdim=True)) | (before <= 0.0) | (top_p >= 1.0)
    return kept & ((scaled >= min_p.log()) | (min_p <= 0.0))


def _words(
    seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor, stream: Stream
) -> torch.Tensor:
    """`noise_words` with a seed and a position for each token; all int64 [n]."""
    counter = (
        token_ids >> 2,
        positions & _MASK32,
        torch.full_like(token_ids, int(stream)),
        torch.zeros_like(token_ids),
    )
    words = torch.stack(philox4x32(counter, (seeds & _MASK32, (seeds >> 32) & _MASK32)))
    return words.gather(0, (token_ids & 3)[None])[0]
