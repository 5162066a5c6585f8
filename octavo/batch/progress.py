"""How far a job has come: counts, speed, the time that is left, and joules where they are measured.

On a terminal one line is drawn again and again; elsewhere (a log file) a line is written now and then.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, TextIO

from octavo.platform.energy import EnergyMeter

REDRAW_SECONDS = 0.2
LINE_SECONDS = 30.0  # where nothing can be drawn again
SPEED_SECONDS = 30.0  # the speed shown is that of the last so many seconds


class Progress:
    """Counts one run of a job. `num_before` of the `total` were done by earlier runs."""

    def __init__(
        self,
        total: int | None,
        num_before: int = 0,
        *,
        unit: str = "requests",
        stream: TextIO | None = None,
        quiet: bool = False,
        meter: EnergyMeter | None = None,
    ) -> None:
        self.total = total
        self.num_before = num_before
        self.num_done = 0  # by this run
        self.num_failed = 0
        self.num_tokens = 0
        self._unit = unit
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._is_drawn = not quiet and self._stream.isatty()
        self._meter = meter if meter is not None else EnergyMeter.of_machine()
        self._began = time.monotonic()
        self._shown = self._began
        self._width = 0
        self._marks: deque[tuple[float, int, int]] = deque([(self._began, 0, 0)])  # time, items, tokens

    def note(self, num_tokens: int = 0, *, failed: bool = False) -> None:
        """One more item has ended."""
        self.num_done += 1
        self.num_failed += failed
        self.num_tokens += num_tokens
        now = time.monotonic()
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self.num_done, self.num_tokens))
            # read now and then: a processor's counter begins again after a while
            self._meter.read()
            while len(self._marks) > 2 and now - self._marks[0][0] > SPEED_SECONDS:
                self._marks.popleft()
        if not self._quiet and now - self._shown >= (REDRAW_SECONDS if self._is_drawn else LINE_SECONDS):
            self._show(now)

    def line(self, now: float | None = None) -> str:
        """What is shown."""
        now = time.monotonic() if now is None else now
        began, items, tokens = self._marks[0]
        seconds = max(now - began, 1e-9)
        rate = (self.num_done - items) / seconds
        done = self.num_before + self.num_done
        parts = [
            f"{done:,}/{self.total:,} {self._unit}" if self.total is not None else f"{done:,} {self._unit}"
        ]
        if self.num_failed:
            parts.append(f"{self.num_failed:,} failed")
        parts.append(f"{(self.num_tokens - tokens) / seconds:,.0f} tok/s")
        if self.total is not None and rate > 0:
            parts.append(f"{duration((self.total - done) / rate)} left")
        if not self._meter.is_empty:
            parts.append(f"{self._meter.total():,.0f} J")
        return ", ".join(parts)

    def close(self) -> dict[str, Any]:
        """End the line; what this run did, as plain data."""
        now = time.monotonic()
        if not self._quiet:
            self._show(now)
            if self._is_drawn:
                self._stream.write("\n")
        seconds = now - self._began
        return {
            "seconds": round(seconds, 3),
            "items": self.num_done,
            "failed_items": self.num_failed,
            "generated_tokens": self.num_tokens,
            "items_per_second": round(self.num_done / seconds, 3) if seconds else None,
            "tokens_per_second": round(self.num_tokens / seconds, 1) if seconds else None,
            "energy": self.energy(),
        }

    def energy(self) -> dict[str, Any]:
        """{"joules", "by_counter"}, or {"joules": None, "reason"}."""
        if self._meter.is_empty:
            return {"joules": None, "reason": self._meter.reason}
        found = self._meter.read()
        return {
            "joules": round(sum(found.values()), 3),
            "by_counter": {name: round(value, 3) for name, value in found.items()},
        }

    def _show(self, now: float) -> None:
        self._shown = now
        text = self.line(now)
        if self._is_drawn:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """42 s, 3:07 min, 2:05 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60:,}:{minutes % 60:02d} h"
