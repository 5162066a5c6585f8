"""Launchers of the suffix drafter's memory (src/suffix.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from octavo.kernels.cpu.library import shared_function


class _HistoryView(ctypes.Structure):
    """`oc_history`"""

    _fields_ = (
        ("tokens", ctypes.c_void_p),
        ("spaces", ctypes.c_void_p),
        ("earlier", ctypes.c_void_p),
        ("latest", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("written", ctypes.c_int64),
    )


@cache
def _functions() -> tuple[Any, Any]:
    pointer, size, history = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_HistoryView)
    space, real = ctypes.c_int32, ctypes.c_double
    return (
        shared_function("oc_history_add", [history, pointer, size, space]),
        shared_function(
            "oc_history_find",
            [history, pointer, size, space, size, size, real, size, pointer, pointer],
            ctypes.c_int64,
        ),
    )


class CHistory:
    """See octavo.speculation.suffix.History. Raises CpuLibraryError if the kernels were not built."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1 or capacity & (capacity - 1):
            raise ValueError(f"capacity must be a power of two, not {capacity}")
        self._add, self._find = _functions()
        self._tokens = np.full(capacity, -1, dtype=np.int32)
        self._spaces = np.zeros(capacity, dtype=np.int32)
        self._earlier = np.full(capacity, -1, dtype=np.int64)
        self._latest = np.full(capacity, -1, dtype=np.int64)
        arrays = (self._tokens, self._spaces, self._earlier, self._latest)
        self._view = _HistoryView(*(array.ctypes.data for array in arrays), capacity, 0)
        self._match = ctypes.c_int64(0)

    def add(self, tokens: Sequence[int], space: int) -> None:
        """See History."""
        array = np.array(tokens, dtype=np.int32)
        self._add(self._view, array.ctypes.data, len(array), space)

    def find(
        self, tail: Sequence[int], space: int, min_match: int, max_match: int, least: float, most: int
    ) -> tuple[int, list[int]]:
        """See History."""
        array, found = np.array(tail, dtype=np.int32), np.empty(most, dtype=np.int32)
        count = self._find(
            self._view, array.ctypes.data, len(array), space, min_match, max_match, least, most,
            found.ctypes.data, ctypes.byref(self._match),
        )  # fmt: skip
        return self._match.value, found[:count].tolist()
