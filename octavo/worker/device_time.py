"""Moments in a device's own time, and tensors on their way from it.

A GPU works through what it was given in order, while the host is elsewhere. A `Mark` is put between
two pieces of that work and later says how long lay between two of them; a `Readback` copies tensors
to the host behind the work that makes them, and `wait` returns when they are there. On a CPU all work
is done when a call returns, so both are what they look like.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


class Mark:
    """This moment, as the device sees it."""

    __slots__ = ("_event", "_time")

    def __init__(self, device: torch.device) -> None:
        self._time = 0.0
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._time = time.perf_counter()

    def wait(self) -> None:
        """Until the device has come here."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_until(self, later: Mark) -> float:
        """Device time between two marks that were both reached."""
        if self._event is None:
            return later._time - self._time
        assert later._event is not None
        return float(self._event.elapsed_time(later._event)) / 1e3


class Readback:
    """Some tensors as they are at this point of the device's work."""

    __slots__ = ("_mark", "_tensors")

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        # a non-blocking copy to the host lands in page-locked memory, which torch keeps and reuses
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._mark = Mark(device)

    @property
    def mark(self) -> Mark:
        """The end of the copies."""
        return self._mark

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host."""
        self._mark.wait()
        return self._tensors


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """An array of the host on the device, without waiting for what the device does now."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
