"""What each request costs in joules: the hardware's counters, divided among the requests that ran.

A counter knows nothing of requests. What it counts over a stretch of steps makes a rate, joules a second
of steps; the steps after it are charged at this rate, and each step in equal parts to its sequences. So a
request's figure lags by one reading, a tenth of a second, and all requests together come to what was
measured while the engine stepped. What the hardware used while nothing ran is in the total alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from octavo.platform.energy import EnergyMeter

if TYPE_CHECKING:
    from octavo.engine.setup import EngineParts

INTERVAL = 0.1  # seconds between two readings: counters hardly move more often
COST_SHARE = 0.005  # of the time may go into reading


class EnergyAccount:
    """For the thread that steps an engine: `begin_step` and `end_step` around each step."""

    def __init__(self, meter: EnergyMeter, clock: Callable[[], float] = time.monotonic) -> None:
        """`meter` must have a counter."""
        self._meter = meter
        self._clock = clock
        began = clock()
        self._joules = meter.total()  # at the last reading
        self._read_at = self._settled = clock()
        self._interval = max(INTERVAL, (self._read_at - began) / COST_SHARE)
        self._is_in_step = False
        self._busy = 0.0  # seconds of steps since the last reading
        self._charged = 0.0  # joules of one sequence that had been in every step so far
        self._uncharged = 0.0  # its seconds, while there is no rate yet
        self._rate: float | None = None

    def begin_step(self) -> None:
        """A step begins. What was used in a pause before it is nobody's."""
        now = self._clock()
        if now - self._settled > self._interval:
            self._joules, self._read_at, self._busy = self._meter.total(), now, 0.0
        self._settled, self._is_in_step = now, True

    def end_step(self, num_sequences: int) -> None:
        """A step of so many sequences is over."""
        now = self._clock()
        self._charge(now, num_sequences)
        self._is_in_step = False
        if now - self._read_at >= self._interval:
            self._read(now)

    def mark(self) -> float:
        """Where the account stands: what a request that begins now gives to `since` at its end."""
        return self._charged

    def since(self, mark: float, num_sequences: int) -> float | None:
        """Joules of a sequence that was in every step since, the present one of so many included.

        None while no counter has moved yet.
        """
        now = self._clock()
        if self._is_in_step:
            self._charge(now, num_sequences)
        if self._rate is None:
            self._read(now)  # the very first request may be shorter than an interval
        return None if self._rate is None else self._charged - mark

    def read(self) -> dict[str, float]:
        """Joules of each counter since the start, pauses included."""
        return self._meter.read()

    def _charge(self, now: float, num_sequences: int) -> None:
        """The time of a step since this was called last."""
        seconds, self._settled = now - self._settled, now
        self._busy += seconds
        part = seconds / max(1, num_sequences)
        if self._rate is None:
            self._uncharged += part
        else:
            self._charged += self._rate * part

    def _read(self, now: float) -> None:
        joules = self._meter.total()
        if joules == self._joules or not self._busy:
            return  # a counter that has not moved says nothing yet
        self._rate = (joules - self._joules) / self._busy
        self._charged += self._rate * self._uncharged
        self._joules, self._read_at, self._busy, self._uncharged = joules, now, 0.0, 0.0


def measure_energy(parts: EngineParts) -> str | None:
    """Have an engine tell what its requests cost, by the counters of what it runs on.

    Returns why that cannot be done here, or None.
    """
    if parts.config.platform.device == "cuda":
        import torch

        meter = EnergyMeter.of_gpus([str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)])
    else:
        meter = EnergyMeter.of_processor()
    if not meter.is_empty:
        parts.engine.measure_energy(EnergyAccount(meter))
    return meter.reason
