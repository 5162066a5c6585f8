"""How a draft is accepted, where that is not by replay.

Replay is what `StepMath.finish` does by itself: the target draws its token, and a draft is accepted
if it equals it. The two other ways change what is compared and leave the rest, the cutting at stop
tokens and limits and all counting, as it is:

* *rejection* changes the drawn token (octavo/sampling/rejection.py);
* *synthetic* changes the draft, after the draw, to what a coin says. For benchmarks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from octavo.core.messages import NewSlot
from octavo.sampling.batch import JudgedRows, SamplingBatch
from octavo.sampling.coins import CoinTable
from octavo.speculation.proposer import DraftTables
from octavo.speculation.rejection import DraftDistributions

IntArray = npt.NDArray[np.int64]
_NEVER_DRAWN = -2  # neither a token nor the mark of a row without a legal one


@dataclass(slots=True)
class VerifyRows:
    """The rows of logits of a step, and the draft that each of them checks."""

    slots: IntArray  # [L], on the host
    columns: IntArray  # [L], on the host: place of that draft among the slot's drafts
    positions: torch.Tensor  # [L] int64, where the row draws, -1 for padding
    drafts: torch.Tensor  # [L] int64, -1: the row checks none

    @classmethod
    def of(cls, slots: IntArray, positions: torch.Tensor, input_ids: torch.Tensor) -> VerifyRows:
        """From the slot, position and input token of each row of logits.

        A slot's rows lie together, and each but the last checks the draft that the next one reads.
        """
        count = len(slots)
        first = np.ones(count, dtype=np.bool_)
        first[1:] = slots[1:] != slots[:-1]
        starts = np.flatnonzero(first)
        columns = np.arange(count) - np.repeat(starts, np.diff(starts, append=count))
        follows = torch.from_numpy(~first).to(positions.device, non_blocking=True)
        drafts = torch.full_like(positions, -1)
        drafts[:-1] = torch.where(follows[1:] & (positions[1:] >= 0), input_ids[1:], -1)
        return cls(slots, columns, positions, drafts)


class Acceptance(Protocol):
    """One way to accept drafts; the model runner calls it around the draw."""

    def enter(self, new: NewSlot) -> None:
        """A request enters a slot."""
        ...

    def before_draw(self, rows: VerifyRows, batch: SamplingBatch) -> None:
        """The sampler is about to draw."""
        ...

    def after_draw(self, rows: VerifyRows, drawn: torch.Tensor) -> None:
        """The tokens [L] are drawn; drafts have not been compared with them yet."""
        ...


class RejectionAcceptance:
    """Drafts whose distribution was recorded are accepted by a coin, others by replay."""

    def __init__(self, distributions: DraftDistributions, coins: CoinTable) -> None:
        self._distributions = distributions
        self._coins = coins

    def enter(self, new: NewSlot) -> None:
        """See Acceptance."""
        self._distributions.begin([new.slot])
        self._coins.put(new.slot, new.seed, new.num_prompt_tokens, new.limit)

    def before_draw(self, rows: VerifyRows, batch: SamplingBatch) -> None:
        """See Acceptance."""
        found = None if batch.all_greedy else self._distributions.find(rows.slots, rows.columns)
        if found is None:
            return
        index, probs = found
        device = rows.positions.device
        slots = torch.from_numpy(rows.slots[index]).to(device, non_blocking=True)
        on_host = torch.from_numpy(index)
        at = on_host.to(device, non_blocking=True)
        coins = self._coins.at(slots, rows.positions[at])
        batch.judged = JudgedRows(on_host, rows.drafts[at], probs, coins)

    def after_draw(self, rows: VerifyRows, drawn: torch.Tensor) -> None:
        """See Acceptance."""


class SyntheticAcceptance:
    """Drafts are accepted at given rates, whatever they are. For benchmarks only.

    `rates[i]` is the chance that draft i is accepted if all before it were; drafts beyond the list
    have the last rate. What is emitted is the target's own token at each position. But the KV of an
    accepted draft is that of the draft, which may be another token: what follows is conditioned on a
    text that is not the one emitted. So the text means nothing, and every output says so.
    """

    def __init__(self, tables: DraftTables, rates: Sequence[float], coins: CoinTable) -> None:
        self._tables = tables
        self._rates = np.array(rates, dtype=np.float32)
        self._coins = coins

    def enter(self, new: NewSlot) -> None:
        """See Acceptance."""
        self._coins.put(new.slot, new.seed, new.num_prompt_tokens, new.limit)

    def rates_of(self, count: int) -> torch.Tensor:
        """[count] float32, the rates of the first places, on the host"""
        return torch.from_numpy(self._rates[np.minimum(np.arange(count), len(self._rates) - 1)])

    @property
    def coins(self) -> torch.Tensor:
        """[slots, positions] float32"""
        return self._coins.table

    def before_draw(self, rows: VerifyRows, batch: SamplingBatch) -> None:
        """See Acceptance."""

    def after_draw(self, rows: VerifyRows, drawn: torch.Tensor) -> None:
        """See Acceptance. Drafts in the token table become the drawn token, or one that never is."""
        if not rows.columns.any():
            return  # one row for each request: no drafts
        tokens = self._tables.tokens
        device = tokens.device
        slots = torch.from_numpy(rows.slots).to(device, non_blocking=True)
        rates = torch.from_numpy(self._rates[np.minimum(rows.columns, len(self._rates) - 1)])
        accepted = self._coins.at(slots, rows.positions) < rates.to(device, non_blocking=True)
        at = rows.positions.clamp(min=0)
        drafts = torch.where(accepted, drawn, _NEVER_DRAWN).to(torch.int32)
        tokens[slots, at] = torch.where(rows.drafts >= 0, drafts, tokens[slots, at])
