"""`PythonLookup` in C: a step's drafts for all requests in at most two calls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.core.messages import NewSlot
from octavo.kernels.cpu import lookup as kernels
from octavo.kernels.cpu.step import SlotTables
from octavo.speculation.lookup import MAX_MATCH, MIN_MATCH


class CpuLookup:
    """See Proposer. `tables` are the device tables as C sees them."""

    def __init__(self, tables: SlotTables, *, prompt: bool = True, min_match: int = MIN_MATCH) -> None:
        self.name = "prompt_lookup" if prompt else "predicted"
        self._tables = tables
        self._prompt = prompt
        self._min_match = min_match
        self._predicted = kernels.Predictions(tables.num_slots, 0)
        self._has_prediction: set[int] = set()

    def enter(self, new: NewSlot) -> None:
        """See Proposer."""
        self.leave(new.slot)
        if not new.prediction_ids:
            return
        if len(new.prediction_ids) > self._predicted.width:
            self._predicted = self._predicted.widened(len(new.prediction_ids))
        self._predicted.put(new.slot, new.prediction_ids, new.num_prompt_tokens)
        self._has_prediction.add(new.slot)

    def leave(self, slot: int) -> None:
        """See Proposer."""
        self._has_prediction.discard(slot)

    def propose(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """See Proposer."""
        if not self._has_prediction and self._prompt:
            self._lookup(slots, counts)
            return
        pairs = list(zip(slots, counts, strict=True))
        predicted = [pair for pair in pairs if pair[0] in self._has_prediction]
        own = [pair for pair in pairs if pair[0] not in self._has_prediction]
        if predicted:
            columns = np.array(predicted, dtype=np.int64)
            kernels.predicted_lookup(
                self._tables, columns[:, 0].copy(), columns[:, 1].copy(), self._predicted, MIN_MATCH
            )
        if own:
            self._lookup([slot for slot, _ in own], [count if self._prompt else 0 for _, count in own])

    def _lookup(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        kernels.prompt_lookup(
            self._tables,
            np.array(slots, dtype=np.int64),
            np.array(counts, dtype=np.int64),
            self._min_match,
            MAX_MATCH,
        )
