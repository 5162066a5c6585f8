"""What rejection sampling must remember of a draft: the distribution it was drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]


class DraftDistributions:
    """The q of every draft that waits to be verified, by slot and place.

    A drafter that *draws* its drafts calls `begin` before it makes new ones for some slots and
    `record` after each of its passes. A drafter that is certain of its guess records nothing; where
    one slot's drafts may come from either, and only the device knows, it records 1 at the draft.
    """

    def __init__(self) -> None:
        self._of: dict[int, list[torch.Tensor]] = {}  # slot -> one row of probabilities a draft

    def begin(self, slots: Sequence[int]) -> None:
        """New drafts are about to be made for these slots: forget those before."""
        for slot in slots:
            self._of.pop(slot, None)

    def record(self, slots: Sequence[int], column: int, probs: torch.Tensor) -> None:
        """Draft number `column` (0 is the first) of each slot was drawn from a row of `probs`.

        probs: [len(slots), draft vocabulary] float32. A copy is kept: a captured graph writes the
        next pass's where this one's are. A slot's columns come in order.
        """
        for slot, row in zip(slots, probs.clone(), strict=True):
            known = self._of.setdefault(slot, [])
            assert len(known) == column, "drafts are recorded in order, after begin"
            known.append(row)

    def find(self, slots: IntArray, columns: IntArray) -> tuple[IntArray, torch.Tensor] | None:
        """Which of these (slot, column) pairs [n] have one, and theirs [found, draft vocabulary]."""
        if not self._of:
            return None
        rows: list[torch.Tensor] = []
        found: list[int] = []
        for index, (slot, column) in enumerate(zip(slots.tolist(), columns.tolist(), strict=True)):
            known = self._of.get(slot)
            if known is not None and column < len(known):
                rows.append(known[column])
                found.append(index)
        if not rows:
            return None
        return np.array(found, dtype=np.int64), torch.stack(rows)
