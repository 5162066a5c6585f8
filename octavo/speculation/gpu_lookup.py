"""`PythonLookup` as Triton kernels: a step's drafts in at most two launches, and the host never waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo.core.messages import NewSlot
from octavo.kernels.triton import lookup as kernels
from octavo.kernels.triton.step import SlotTables
from octavo.speculation.lookup import MAX_MATCH, MIN_MATCH


class GpuLookup:
    """See Proposer. `tables` are the device tables as kernels see them."""

    def __init__(self, tables: SlotTables, *, prompt: bool = True, min_match: int = MIN_MATCH) -> None:
        self.name = "prompt_lookup" if prompt else "predicted"
        self._tables = tables
        self._prompt = prompt
        self._min_match = min_match
        slots, device = len(tables.tokens), tables.tokens.device
        self._best = torch.zeros(slots, dtype=torch.int64, device=device)
        self._arrived = torch.zeros(slots, dtype=torch.int32, device=device)
        self._predicted = torch.zeros(slots, 0, dtype=torch.int32, device=device)
        self._follows = torch.zeros(slots, 4, dtype=torch.int32, device=device)
        self._has_prediction: set[int] = set()

    def enter(self, new: NewSlot) -> None:
        """See Proposer."""
        self.leave(new.slot)
        count = len(new.prediction_ids)
        if not count:
            return
        if count > self._predicted.shape[1]:
            wider = self._predicted.new_zeros(len(self._predicted), count)
            wider[:, : self._predicted.shape[1]] = self._predicted
            self._predicted = wider
        sent = self._send(np.array([count, new.num_prompt_tokens, 0, 0, *new.prediction_ids], dtype=np.int32))
        self._follows[new.slot] = sent[:4]
        self._predicted[new.slot, :count] = sent[4:]
        self._has_prediction.add(new.slot)

    def leave(self, slot: int) -> None:
        """See Proposer."""
        self._has_prediction.discard(slot)

    def propose(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """See Proposer."""
        pairs = np.array((slots, counts), dtype=np.int32).T
        predicted = np.array([slot in self._has_prediction for slot in slots], dtype=np.bool_)
        if predicted.any():
            kernels.predicted_lookup(
                self._tables, self._send(pairs[predicted]), self._predicted, self._follows, self._min_match
            )
        own = pairs[~predicted]
        if len(own):
            longest = self._tables.tokens.shape[1]
            if not self._prompt:
                own[:, 1] = 0
                longest = 0
            kernels.prompt_lookup(
                self._tables, self._send(own), self._best, self._arrived, longest, self._min_match, MAX_MATCH
            )

    def _send(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        device = self._tables.tokens.device
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
