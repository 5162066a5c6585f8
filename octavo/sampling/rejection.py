"""Classic rejection sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

A draft d that was drawn from a distribution q is accepted with probability min(1, p(d) / q(d)), where
p is the target's own distribution at that position: temperature, penalties, masks, top-k, top-p and
min-p included. If it is refused, the token is drawn from the residual, max(p - q, 0) normalised.
Either way the token is distributed as p, whatever q was. Nothing more than that: the text is another
one than without drafts, and so is the text with other drafts. (Replay, the default, keeps the text.)

Here this is just another way to *draw* the token of a row: d where it is accepted, otherwise a token
of the residual, which is never d. So everything behind the draw is as in replay: a draft is accepted
if and only if it equals the drawn token.

A drafter that is certain of its guess (q is 1 at d: lookups, predicted outputs) needs none of it. The
target's own draw x ~ p *is* rejection sampling then: it is d with probability p(d), and otherwise a
draw from p without d. Such rows, and greedy ones, are left as they were drawn.
"""

from __future__ import annotations

from typing import Protocol

import torch

from octavo.sampling.batch import JudgedRows, SamplingBatch
from octavo.sampling.noise import Stream
from octavo.sampling.processors import NEG_INF
from octavo.sampling_params import GREEDY_BELOW


class ResidualDraw(Protocol):
    """The draw of `DrawKernels`, with noise of a stream of its own."""

    def draw(
        self, logits: torch.Tensor, batch: SamplingBatch, stream: Stream = Stream.DRAW
    ) -> torch.Tensor: ...


def reject(
    logits: torch.Tensor,  # [rows, vocab_size] float32, processed (masks, bias, penalties)
    batch: SamplingBatch,
    drawn: torch.Tensor,  # [rows] int64, what the target drew by itself
    judged: JudgedRows,
    kernels: ResidualDraw,
) -> torch.Tensor:
    """The tokens [rows] int64, with those of the judged rows drawn by rejection sampling."""
    columns = batch.take(judged.rows)
    rows = judged.rows.to(logits.device, non_blocking=True)
    p = probabilities(logits[rows], columns)
    q = _with_width(judged.probs, p.shape[1])
    draft = judged.tokens.clamp(min=0)[:, None]
    p_draft, q_draft = p.gather(1, draft)[:, 0], q.gather(1, draft)[:, 0]
    rest = residual(p, q)
    # p = q leaves no residual; the coin says no then only where rounding made p(d) the smaller one.
    accepted = (judged.coins * q_draft < p_draft) | (rest.amax(1) <= 0.0)
    other = kernels.draw(rest.log(), _unfiltered(columns), Stream.RESIDUAL)
    mine = drawn[rows]
    # Rows without a draft, greedy ones, those without a legal token, and drafts that cannot have come
    # from their q, keep the target's own draw: it is right for any draft.
    sampled = columns.temperature.to(mine.device, non_blocking=True) >= GREEDY_BELOW
    judges = (judged.tokens >= 0) & (q_draft > 0.0) & sampled & (mine >= 0)
    verdict = torch.where(accepted, draft[:, 0], other)
    return drawn.index_copy(0, rows, torch.where(judges, verdict, mine))


def probabilities(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The distribution each row is drawn from, [rows, vocab_size] float32; a greedy row's means nothing.

    logits: processed, left alone. Rows without a legal token are all zero. Where no row filters
    (top-k, top-p, min-p), it is a softmax; the columns of `batch` are on the host, so that is known.
    """
    device = logits.device
    temperature = batch.temperature.clamp(min=GREEDY_BELOW).to(device, non_blocking=True)[:, None]
    logits = torch.nan_to_num(logits, nan=NEG_INF, posinf=torch.finfo(logits.dtype).max, neginf=NEG_INF)
    best = logits.amax(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = ((logits - best) / temperature).exp_()
    filters = (batch.top_k > 0) | (batch.top_p < 1.0) | (batch.min_p > 0.0)
    if bool(filters.any()):
        columns = (batch.top_k, batch.top_p, batch.min_p)
        top_k, top_p, min_p = (column.to(device, non_blocking=True)[:, None] for column in columns)
        order = logits.sort(dim=1, descending=True, stable=True).indices  # equal logits: lowest id first
        ordered = weights.gather(1, order)
        place = torch.arange(logits.shape[1], device=device)
        kept = (place < top_k) | (top_k <= 0)
        mass = torch.where(kept, ordered, 0.0).double().cumsum(1)
        before = mass - ordered
        kept &= (before < top_p.double() * mass[:, -1:]) | (place == 0) | (top_p >= 1.0)
        kept &= ordered >= min_p
        weights = torch.zeros_like(weights).scatter_(1, order, torch.where(kept, ordered, 0.0))
    total = weights.sum(1, keepdim=True)
    return weights.div_(torch.where(total > 0.0, total, 1.0))


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What p has and q has not, [rows, vocab_size], not normalised."""
    return (p - q).clamp(min=0.0)


def _with_width(probs: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """A draft model's vocabulary may be padded to another size; behind its end q is 0."""
    missing = vocab_size - probs.shape[1]
    if missing > 0:
        return torch.nn.functional.pad(probs, (0, missing))
    return probs[:, :vocab_size]


def _unfiltered(columns: SamplingBatch) -> SamplingBatch:
    """The same seeds and positions at temperature 1, without any filter."""
    temperature = torch.ones_like(columns.temperature)
    off = torch.zeros_like
    return SamplingBatch(
        temperature, off(columns.top_k), torch.ones_like(columns.top_p), off(columns.min_p),
        columns.seed, columns.position,
    )  # fmt: skip
