"""What long work in the hub says while it runs: a bar on a terminal, one line elsewhere.

Everything goes to standard error, so that standard output stays the program's own.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

_BAR_WIDTH = 28
_REDRAW_SECONDS = 0.1


def note(message: str, enabled: bool = True) -> None:
    """Print one line, if progress was asked for."""
    if enabled:
        print(f"octavo: {message}", file=sys.stderr, flush=True)


class ByteProgress:
    """Counts bytes towards a known total. `advance` may be called from several threads."""

    def __init__(self, label: str, total: int, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._label = label
        self._total = max(total, 1)
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled
        self._bar = enabled and self._stream.isatty()
        self._done = 0
        self._drawn = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> ByteProgress:
        if self._bar:
            self._draw()
        elif self._enabled:
            print(f"octavo: {self._label} ({self._total / 1e6:,.0f} MB)", file=self._stream, flush=True)
        return self

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._bar and time.monotonic() - self._drawn >= _REDRAW_SECONDS:
                self._draw()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._draw()
            print(file=self._stream, flush=True)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        share = min(self._done / self._total, 1.0)
        filled = round(share * _BAR_WIDTH)
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        sizes = f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
        self._stream.write(f"\roctavo: {self._label} [{bar}] {share:4.0%} {sizes}")
        self._stream.flush()
