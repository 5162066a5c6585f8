"""From a step's logits to its tokens. The order of operations, for each row:

    1  logits in float32; raw log-probabilities, where asked for, are those of this moment
    2  masks: allowed_token_ids, grammar, banned ids (min_tokens, bad_words)
    3  logit bias
    4  penalties: repetition, frequency, presence
    5  temperature
    6  top-k
    7  top-p, over what top-k left
    8  min-p
    9  noise, argmax

Penalties see logits that temperature has not yet scaled, as in transformers, vLLM and OpenAI's
description, so that a penalty means the same at every temperature.

The kept set of 6-8 is a threshold on the float32 logits, and equal logits go to the lowest token
id: top-k keeps exactly k tokens (fewer only if fewer are legal), top-p the fewest tokens whose
probabilities reach p and at least one, min-p those at least min_p times as probable as the best.
Greedy rows (temperature below 1e-5) take the greatest logit, the lowest id among equals, and never
any noise; 6-8 could not change that, so they are not looked at.

A row without any legal token (everything masked, or a model that computed only NaN or -inf) gets
the token `NO_TOKEN`: nothing is drawn, and the caller ends that one request with an error. NaN is
never drawn while another token is legal.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from octavo.core.messages import TokenLogprobs
from octavo.sampling.batch import SamplingBatch
from octavo.sampling.noise import NOISE_SPAN, Stream, exponentials, noise_words
from octavo.sampling.processors import NEG_INF, apply_processors
from octavo.sampling.rejection import reject
from octavo.sampling_params import GREEDY_BELOW

NO_TOKEN = -1


class LogprobTensors(NamedTuple):
    """Log-probabilities of some rows."""

    logprobs: torch.Tensor  # [rows] float32, of the token itself
    ranks: torch.Tensor  # [rows] int64, of the token itself: 1 + the number of more probable tokens
    top_ids: torch.Tensor  # [rows, num_top] int64, most probable first, lowest id among equals
    top_logprobs: torch.Tensor  # [rows, num_top] float32


class DrawKernels(Protocol):
    """The three heavy operations over float32 [rows, vocab_size], one implementation a backend.

    None of them writes to the logits.
    """

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Greatest logit's id, int64 [rows]; the lowest id among equals; NO_TOKEN where none is legal."""
        ...

    def draw(self, logits: torch.Tensor, batch: SamplingBatch, stream: Stream = Stream.DRAW) -> torch.Tensor:
        """Steps 5 to 9, int64 [rows]; greedy rows as in `argmax`. Rows with position -1: any value."""
        ...

    def logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> LogprobTensors:
        """Of tokens [rows] int64 under a float32 log-softmax of each row; NO_TOKEN gives -inf, rank 0."""
        ...


@runtime_checkable
class ProcessKernels(Protocol):
    """What a backend may have as well: its own way through step 2 to 4. Without it, torch does them."""

    def process(self, logits: torch.Tensor, batch: SamplingBatch) -> None:
        """Write what `apply_processors` would, to the bit."""
        ...


class AskedLogprobs(NamedTuple):
    """Log-probabilities of the rows that asked for them, still where they were computed."""

    tensors: LogprobTensors  # one row for each entry of `rows`
    rows: list[int]  # rows of logits
    num_top: list[int]  # how many of the most probable tokens each wants
    num_rows: int  # rows of logits in all

    def read(self) -> list[TokenLogprobs | None]:
        """A row's, None where not asked for. Waits for the device if the tensors are on one."""
        found: list[TokenLogprobs | None] = [None] * self.num_rows
        for row, entry in zip(self.rows, token_logprobs(self.tensors, self.num_top), strict=True):
            found[row] = entry
        return found


class Drawn(NamedTuple):
    """What a step drew, still where it was computed."""

    tokens: torch.Tensor  # [rows] int64; NO_TOKEN where the row had no legal token
    logprobs: AskedLogprobs | None  # None: no row asked


class SamplerOutput(NamedTuple):
    """What a step drew."""

    tokens: torch.Tensor  # [rows] int64; NO_TOKEN where the row had no legal token
    logprobs: list[TokenLogprobs | None] | None  # a row's, None where not asked for; None: no row asked


class Sampler:
    """Runs the steps above with the kernels it is given."""

    def __init__(self, kernels: DrawKernels) -> None:
        self._kernels = kernels
        self._process = kernels.process if isinstance(kernels, ProcessKernels) else apply_processors

    def __call__(self, logits: torch.Tensor, batch: SamplingBatch) -> SamplerOutput:
        """As `draw`, and read back."""
        drawn = self.draw(logits, batch)
        return SamplerOutput(drawn.tokens, None if drawn.logprobs is None else drawn.logprobs.read())

    def draw(self, logits: torch.Tensor, batch: SamplingBatch) -> Drawn:
        """Draw one token a row. `logits` is float32 [rows, vocab_size] and is written to."""
        asking: list[int] = []
        if batch.num_logprobs is not None:
            asking = [row for row, num_top in enumerate(batch.num_logprobs) if num_top >= 0]
        raw = logits
        if asking and (batch.changes_logits or len(asking) < len(logits)):
            raw = _rows_of(logits, asking)  # a copy

        if batch.changes_logits:
            self._process(logits, batch)
        tokens = self._kernels.argmax(logits) if batch.all_greedy else self._kernels.draw(logits, batch)
        if batch.judged is not None:
            tokens = reject(logits, batch, tokens, batch.judged, self._kernels)
        if batch.num_logprobs is None or not asking:
            return Drawn(tokens, None)
        num_top = [batch.num_logprobs[row] for row in asking]
        chosen = tokens if len(asking) == len(logits) else _rows_of(tokens, asking)
        tensors = self._kernels.logprobs(raw, chosen, max(num_top))
        return Drawn(tokens, AskedLogprobs(tensors, asking, num_top, len(logits)))

    def logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> LogprobTensors:
        """Log-probabilities of given tokens under given raw logits, as prompt_logprobs wants them too.

        logits: [rows, vocab_size] float32, left alone. tokens: [rows] int64 (NO_TOKEN gives a
        logprob of -inf and rank 0). num_top: how many of the most probable tokens there are with each.
        """
        return self._kernels.logprobs(logits, tokens, num_top)


def _rows_of(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows, copied, without waiting for the device; a list as an index waits."""
    if tensor.device.type == "cpu":
        return tensor[rows]
    return tensor[torch.tensor(rows).pin_memory().to(tensor.device, non_blocking=True)]


def token_logprobs(tensors: LogprobTensors, num_top: list[int]) -> list[TokenLogprobs]:
    """Plain data of some rows, each with as many of the most probable tokens as it wants."""
    rows = zip(
        tensors.logprobs.tolist(),
        tensors.ranks.tolist(),
        tensors.top_ids.tolist(),
        tensors.top_logprobs.tolist(),
        num_top,
        strict=True,
    )
    return [
        TokenLogprobs(logprob, rank, top_ids[:count], top_logprobs[:count])
        for logprob, rank, top_ids, top_logprobs, count in rows
    ]


class TorchDraw:
    """The kernels in plain torch: the oracle of the others, and the way without any compiled one.

    Each row is worked on alone, so that its token cannot depend on the rows beside it.
    """

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See DrawKernels."""
        best, tokens = logits.max(dim=-1)
        if not bool(torch.isfinite(best).all()):  # -inf: nothing legal; NaN spreads to the maximum
            best, tokens = _without_nan(logits).max(dim=-1)
            tokens = torch.where(best == NEG_INF, NO_TOKEN, tokens)
        return tokens

    def draw(self, logits: torch.Tensor, batch: SamplingBatch, stream: Stream = Stream.DRAW) -> torch.Tensor:
        """See DrawKernels."""
        columns = zip(
            batch.temperature.tolist(),
            batch.top_k.tolist(),
            batch.top_p.tolist(),
            batch.min_p.tolist(),
            batch.seed.tolist(),
            batch.position.tolist(),
            strict=True,
        )
        tokens = [NO_TOKEN] * len(logits)
        for row, (temperature, top_k, top_p, min_p, seed, position) in enumerate(columns):
            if position < 0:
                continue
            if temperature < GREEDY_BELOW:
                tokens[row] = int(self.argmax(logits[row : row + 1]))
                continue
            row_logits = logits[row]
            kept = kept_tokens(row_logits, temperature, top_k, top_p, min_p)
            if len(kept) == 0:
                continue
            scaled = row_logits[kept].double() / temperature
            possible = scaled >= scaled.max() - NOISE_SPAN
            kept, scaled = kept[possible], scaled[possible]
            noise = exponentials(noise_words(seed, position, kept, stream)).log()
            tokens[row] = int(kept[(scaled - noise).argmax()])
        return torch.tensor(tokens, dtype=torch.int64, device=logits.device)

    def logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> LogprobTensors:
        """See DrawKernels."""
        logits = _without_nan(logits)
        logprobs = torch.log_softmax(logits, dim=-1)
        missing = tokens < 0
        column = tokens.clamp(min=0)[:, None]
        own_logits = logits.gather(1, column)
        greater = (logits > own_logits).sum(dim=-1)
        top_ids = _top_ids(logits, num_top)
        return LogprobTensors(
            logprobs.gather(1, column)[:, 0].masked_fill(missing, NEG_INF),
            (greater + 1).masked_fill(missing, 0),
            top_ids,
            logprobs.gather(1, top_ids),
        )


def kept_tokens(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """Ids that top-k, top-p and min-p leave of one row, ascending, int64. Empty if nothing is legal.

    logits: [vocab_size] float32. Probabilities are formed in float64.
    """
    logits = _without_nan(logits)
    best = float(logits.max())
    if best == NEG_INF:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    ids = torch.nonzero(logits > NEG_INF)[:, 0]

    if 0 < top_k < len(ids):
        threshold = logits.topk(top_k).values[-1]
        above = logits > threshold
        ties = torch.nonzero(logits == threshold)[: top_k - int(above.sum()), 0]
        ids = torch.cat((torch.nonzero(above)[:, 0], ties)).sort().values

    if top_p < 1.0:
        weights = ((logits[ids].double() - best) / temperature).exp()
        wanted = top_p * float(weights.sum())
        # Tokens this light, all together, cannot carry the last (1 - top_p): no need to sort them.
        light = 0.5 * (1.0 - top_p) * float(weights.sum()) / len(ids)
        heavy = weights >= light
        ids, weights = ids[heavy], weights[heavy]
        order = logits[ids].sort(descending=True, stable=True).indices
        mass_before = weights[order].cumsum(0) - weights[order]
        ids = ids[order[(mass_before < wanted) | (mass_before <= 0.0)]].sort().values

    if min_p > 0.0:
        scaled = (logits[ids].double() - best) / temperature
        ids = ids[scaled >= math.log(min_p)]
    return ids


def _without_nan(logits: torch.Tensor) -> torch.Tensor:
    """A row's NaN as -inf, and +inf as the greatest number: the same tensor where all is well."""
    if bool((logits < float("inf")).all()):  # False for NaN and +inf
        return logits
    return torch.nan_to_num(logits, nan=NEG_INF, posinf=torch.finfo(logits.dtype).max, neginf=NEG_INF)


def _top_ids(logits: torch.Tensor, num_top: int) -> torch.Tensor:
    """Ids of the greatest logits [rows, num_top], greatest first, the lowest id among equals."""
    num_top = min(num_top, logits.shape[1])
    if num_top == 0:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    values, ids = logits.topk(num_top, dim=-1)
    # topk takes any of several equal logits: only rows whose last place is contested need a full sort
    contested = (logits == values[:, -1:]).sum(dim=-1) > (values == values[:, -1:]).sum(dim=-1)
    if bool(contested.any()):
        full = logits[contested].sort(dim=-1, descending=True, stable=True).indices
        ids[contested] = full[:, :num_top]
    ids = ids.sort(dim=-1).values
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)
