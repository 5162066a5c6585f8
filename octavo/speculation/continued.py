"""Follows the host's continuations on the device, beside another drafter.

A continuation says: from this position on, the text may go on like this. It was proposed when the
host knew fewer tokens than the device does now. It holds if all tokens that have come since are the
ones it named; then its next ones are the drafts. Otherwise the other drafter's stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo.core.messages import Continuation, NewSlot
from octavo.speculation.proposer import DraftTables, Proposer
from octavo.speculation.suffix import MAX_CONTINUATION


class ContinuedProposer:
    """See Proposer. `own` drafts first; torch operations alone, none of which waits for the device."""

    def __init__(self, own: Proposer, tables: DraftTables) -> None:
        self.name = "suffix"
        self._own = own
        self._tables = tables
        device, num_slots = tables.tokens.device, len(tables.num_tokens)
        self._continuations = torch.zeros(num_slots, MAX_CONTINUATION, dtype=torch.int32, device=device)
        self._starts = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._columns = torch.arange(MAX_CONTINUATION, device=device)
        self._given: set[int] = set()  # slots with a continuation

    def enter(self, new: NewSlot) -> None:
        """See Proposer."""
        self._given.discard(new.slot)
        self._own.enter(new)

    def leave(self, slot: int) -> None:
        """See Proposer."""
        self._given.discard(slot)
        self._own.leave(slot)

    def continue_with(self, continuations: Sequence[Continuation]) -> None:
        """Continuations from the host; a slot's new one replaces the one before."""
        table = np.zeros((len(continuations), 3 + MAX_CONTINUATION), dtype=np.int64)
        for row, (slot, start, token_ids) in zip(table, continuations, strict=True):
            row[:3] = slot, start, len(token_ids)
            row[3 : 3 + len(token_ids)] = token_ids
            self._given.add(slot)
        sent = self._send(table)
        slots = sent[:, 0]
        self._starts[slots], self._lengths[slots] = sent[:, 1], sent[:, 2]
        self._continuations[slots] = sent[:, 3:].to(torch.int32)

    def propose(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """See Proposer."""
        self._own.propose(slots, counts)
        mine = [pair for pair in zip(slots, counts, strict=True) if pair[0] in self._given and pair[1]]
        if not mine:
            return
        tables, columns = self._tables, self._columns
        slot, wanted = self._send(np.array(mine, dtype=np.int64)).unbind(1)
        known, start, length = tables.num_tokens[slot], self._starts[slot], self._lengths[slot]
        age = known - start  # tokens that have come since
        rows, last = slot[:, None], tables.tokens.shape[1] - 1
        came = tables.tokens[rows, (start[:, None] + columns).clamp(max=last)]
        agrees = ((came == self._continuations[slot]) | (columns >= age[:, None])).all(1)
        left = torch.minimum(length - age, tables.limit[slot] - known)
        number = torch.minimum(wanted, left).masked_fill(tables.finished[slot] | ~agrees | (age < 0), 0)
        holds = number > 0
        most = max(count for _, count in mine)
        columns = columns[:most]
        following = (age.clamp(min=0)[:, None] + columns).clamp(max=MAX_CONTINUATION - 1)
        target = known[:, None] + columns
        drafts = torch.where(
            columns < number[:, None], self._continuations[rows, following], tables.tokens[rows, target]
        )
        tables.tokens[rows, target] = drafts
        tables.num_drafts[slot] = torch.where(holds, number, tables.num_drafts[slot])

    def _send(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._tables.tokens.device, non_blocking=True)
