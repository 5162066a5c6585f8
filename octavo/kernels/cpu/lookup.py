"""Launchers of the lookup drafters (src/lookup.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.kernels.cpu.library import shared_function
from octavo.kernels.cpu.step import SlotsView, SlotTables

IntArray = npt.NDArray[np.int64]


@cache
def _functions() -> tuple[Any, Any]:
    pointer, size, slots = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(SlotsView)
    return (
        shared_function("oc_prompt_lookup", [slots, pointer, pointer, size, size, size]),
        shared_function(
            "oc_predicted_lookup",
            [slots, pointer, pointer, size, pointer, size, pointer, pointer, pointer, pointer, size],
        ),
    )


class Predictions:
    """Predicted outputs of all slots, and how far each was followed."""

    def __init__(self, num_slots: int, width: int) -> None:
        self.width = width
        self.tokens = np.zeros((num_slots, width), dtype=np.int32)
        self.lengths = np.zeros(num_slots, dtype=np.int64)
        self.cursors = np.zeros(num_slots, dtype=np.int64)
        self.read = np.zeros(num_slots, dtype=np.int64)  # tokens, prompt included, taken into account
        self.prompt_lengths = np.zeros(num_slots, dtype=np.int64)

    def put(self, slot: int, tokens: Sequence[int], prompt_length: int) -> None:
        """A request with a prediction enters a slot."""
        self.tokens[slot, : len(tokens)] = tokens
        self.lengths[slot] = len(tokens)
        self.cursors[slot] = 0
        self.read[slot] = prompt_length
        self.prompt_lengths[slot] = prompt_length

    def widened(self, width: int) -> Predictions:
        """The same with room for longer ones."""
        wider = Predictions(len(self.lengths), max(width, 2 * self.width))
        wider.tokens[:, : self.width] = self.tokens
        for name in ("lengths", "cursors", "read", "prompt_lengths"):
            setattr(wider, name, getattr(self, name))
        return wider


def prompt_lookup(
    tables: SlotTables, slots: IntArray, counts: IntArray, min_match: int, max_match: int
) -> None:
    """Write up to counts[i] drafts behind the tokens of slots[i] and set num_drafts."""
    _check(slots, counts)
    _functions()[0](tables.view, slots.ctypes.data, counts.ctypes.data, len(slots), min_match, max_match)


def predicted_lookup(
    tables: SlotTables, slots: IntArray, counts: IntArray, predictions: Predictions, min_match: int
) -> None:
    """The same from the slots' predictions, which move along with the text."""
    _check(slots, counts)
    _functions()[1](
        tables.view,
        slots.ctypes.data,
        counts.ctypes.data,
        len(slots),
        predictions.tokens.ctypes.data,
        predictions.width,
        predictions.lengths.ctypes.data,
        predictions.cursors.ctypes.data,
        predictions.read.ctypes.data,
        predictions.prompt_lengths.ctypes.data,
        min_match,
    )


def _check(slots: IntArray, counts: IntArray) -> None:
    for name, array in (("slots", slots), ("counts", counts)):
        if array.dtype != np.int64 or not array.flags.c_contiguous or len(array) != len(slots):
            raise ValueError(f"{name} must be contiguous int64, one entry a request")
