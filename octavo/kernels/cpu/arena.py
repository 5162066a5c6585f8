"""Memory for packed weights, on large pages.

A step reads every weight. Over pages of 4 KiB the processor spends a part of that time on
translating addresses: products of 16 rows took a quarter longer, of 64 rows 4%. Large pages exist
only where 2 MiB are used in one piece, so weights are laid out side by side in chunks.
"""

from __future__ import annotations

import ctypes
import math

import torch

from octavo.kernels.cpu.library import shared_function

CHUNK_BYTES = 64 << 20
_ALIGNMENT = 64  # a cache line


class WeightArena:
    """Hands out memory and never takes it back; a chunk lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D tensor, not initialised, that begins at a cache line."""
        size = elements * dtype.itemsize
        if self._used + size > self._chunk.nbytes:
            self._open_chunk(max(size, CHUNK_BYTES))
        part = self._chunk[self._used : self._used + size].view(dtype)
        self._used += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        return part

    def _open_chunk(self, size: int) -> None:
        memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        skip = -memory.data_ptr() % _ALIGNMENT
        use_huge_pages = shared_function("oc_use_huge_pages", [ctypes.c_void_p, ctypes.c_int64])
        use_huge_pages(memory.data_ptr(), memory.nbytes)
        self._chunk, self._used = memory[skip : skip + size], 0
