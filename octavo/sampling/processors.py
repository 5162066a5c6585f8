"""What changes logits before a token is drawn, as functions that write in place.

Every function takes logits as float32 [rows, vocab_size] and touches only the rows it is told to.
A token that may not be drawn has the logit -inf. Definitions are those of vLLM, OpenAI and
transformers, to the letter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.sampling.batch import BannedTokens, Bitmask, LogitBias, Penalties, SamplingBatch

NEG_INF = float("-inf")


def apply_bitmask(logits: torch.Tensor, mask: Bitmask) -> None:
    """Tokens whose bit is 0, or that lie behind the last word, may not be drawn."""
    vocab_size = logits.shape[1]
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    words = mask.words.to(logits.device)
    for entry, row in enumerate(mask.rows.tolist()):
        bits = ((words[entry, :, None] >> shifts) & 1).reshape(-1)[:vocab_size]
        logits[row, : len(bits)].masked_fill_(bits == 0, NEG_INF)
        logits[row, len(bits) :] = NEG_INF


def apply_bans(logits: torch.Tensor, banned: BannedTokens) -> None:
    """Single tokens may not be drawn."""
    logits[banned.rows.to(logits.device), banned.ids.to(logits.device)] = NEG_INF


def apply_logit_bias(logits: torch.Tensor, bias: LogitBias) -> None:
    """Add numbers to single logits. A banned token stays banned."""
    rows, ids = bias.rows.to(logits.device), bias.ids.to(logits.device)
    logits[rows, ids] += bias.values.to(logits.device)


def apply_penalties(logits: torch.Tensor, penalties: Penalties) -> None:
    """Repetition, frequency and presence penalties, in this order.

    Repetition (CTRL, arXiv 1909.05858) concerns every token of prompt and output: a positive logit
    is divided by it, another one multiplied. Frequency (times the token's count) and presence
    (once) are subtracted, and concern the output alone. Tokens of the table that this vocabulary
    lacks are passed over.
    """
    for i, row in enumerate(penalties.rows):
        history = penalties.tokens[penalties.slots[i], : penalties.lengths[i]].to(torch.int64)
        row_logits = logits[row]
        if penalties.repetition[i] != 1.0:
            seen = _known(history, row_logits)
            values = row_logits[seen]
            factor = penalties.repetition[i]
            # a token that occurs twice is written twice with the same value
            row_logits[seen] = torch.where(values > 0, values / factor, values * factor)
        if penalties.frequency[i] != 0.0 or penalties.presence[i] != 0.0:
            output = _known(history[penalties.prompt_lengths[i] :], row_logits)
            ids, counts = torch.unique(output, return_counts=True)
            values = row_logits[ids] - penalties.frequency[i] * counts
            row_logits[ids] = values - penalties.presence[i]


def _known(ids: torch.Tensor, row_logits: torch.Tensor) -> torch.Tensor:
    return ids[(ids >= 0) & (ids < len(row_logits))]


def apply_processors(
    logits: torch.Tensor,
    batch: SamplingBatch,
    mask: Callable[[torch.Tensor, Bitmask], None] = apply_bitmask,
    penalize: Callable[[torch.Tensor, Penalties], None] = apply_penalties,
) -> None:
    """Masks, bias and penalties, in the sampler's order.

    `mask` and `penalize` are where a backend puts its own: row by row they are the slow ones.
    """
    if batch.allowed is not None:
        mask(logits, batch.allowed)
    if batch.grammar is not None:
        mask(logits, batch.grammar)
    if batch.banned is not None:
        apply_bans(logits, batch.banned)
    if batch.logit_bias is not None:
        apply_logit_bias(logits, batch.logit_bias)
    if batch.penalties is not None:
        penalize(logits, batch.penalties)
