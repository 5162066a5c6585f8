"""What the terminal shows of a run: a line a request, and under them a table that changes.

Where there is no terminal, or without the package rich, only the lines are written.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, TextIO

from octavo.bench.metrics import quantile
from octavo.bench.record import RequestRecord
from octavo.bench.spec import is_installed

WINDOW = 10.0  # seconds of which the table shows the rate


class Progress:
    """Counts what has ended; the figures of the table."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.began = time.monotonic()
        self.ended = self.failed = self.tokens = self.drafted = self.accepted = 0
        self._ttft: list[float] = []
        self._recent: deque[tuple[float, int]] = deque()
        self.readings: dict[str, float] = {}

    def add(self, record: RequestRecord) -> None:
        """One request has ended."""
        self.ended += 1
        self.failed += not record.ok
        if not record.ok:
            return
        self.tokens += record.generated_tokens
        self.drafted += record.drafted or 0
        self.accepted += record.accepted or 0
        if record.ttft is not None:
            self._ttft.append(record.ttft)
        self._recent.append((time.monotonic(), record.generated_tokens))

    def rows(self) -> list[tuple[str, str]]:
        """(name, figure) for each row; a figure that is not known is a dash."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - WINDOW:
            self._recent.popleft()
        elapsed = now - self.began
        window = max(min(elapsed, WINDOW), 1e-3)
        of = "" if self.total is None else f" of {self.total}"
        rows = [
            ("requests", f"{self.ended}{of}" + (f", {self.failed} FAILED" if self.failed else "")),
            ("elapsed", f"{elapsed:.0f} s"),
            (
                "rate",
                f"{len(self._recent) / window:.2f} requests/s, "
                f"{sum(tokens for _, tokens in self._recent) / window:.0f} tok/s",
            ),
            ("TTFT", self._ttft_text()),
            ("acceptance", f"{self.accepted / self.drafted:.1%}" if self.drafted else "-"),
        ]
        shown = {"watts": ("power", "{:.0f} W"), "gpu_utilization": ("GPU", "{:.0f} %"),
                 "running": ("running", "{:.0f}"), "waiting": ("waiting", "{:.0f}"),
                 "kv_usage": ("KV cache", "{:.0%}")}  # fmt: skip
        for key, (name, form) in shown.items():
            if key in self.readings:
                rows.append((name, form.format(self.readings[key])))
            elif key == "watts":
                rows.append((name, "-"))
        return rows

    def _ttft_text(self) -> str:
        if not self._ttft:
            return "-"
        return f"p50 {quantile(self._ttft, 0.5) * 1e3:.0f} ms, p99 {quantile(self._ttft, 0.99) * 1e3:.0f} ms"


def request_line(record: RequestRecord) -> str:
    """The log line of one request."""
    if not record.ok:
        return f"Request {record.prompt_id or record.index} FAILED: {record.error}"
    seconds = record.latency if record.latency is not None else 0.0
    line = f"Generated {record.generated_tokens} tokens in {seconds:.3f} s"
    if record.drafted:
        line += f" ({record.accepted} of {record.drafted} drafts accepted)"
    return line


class TerminalView:
    """A `LiveView` on a text stream. `log_requests` False leaves the line a request out."""

    def __init__(self, stream: TextIO | None = None, *, log_requests: bool = True) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._log = log_requests
        self._progress: Progress | None = None
        self._live: Any = None
        self._is_terminal = self._stream.isatty() and is_installed("rich")

    def line(self, text: str) -> None:
        """One line, above the table where there is one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def stage(self, text: str) -> None:
        """What is being done."""
        self.line(f"octavo bench: {text}")

    def begin(self, total: int | None, label: str) -> None:
        """The measured part begins."""
        self._progress = Progress(total)
        self.line(f"octavo bench: measuring {label}" + ("" if total is None else f", {total} requests"))
        if self._is_terminal:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), refresh_per_second=4, transient=True)
            self._live.start()

    def ended(self, record: RequestRecord) -> None:
        """One request has ended."""
        if self._progress is not None:
            self._progress.add(record)
        if self._log or not record.ok:
            self.line(request_line(record))
        self._draw()

    def readings(self, readings: dict[str, float]) -> None:
        """New readings of monitor and engine."""
        if self._progress is not None:
            self._progress.readings = readings
        self._draw()

    def _draw(self) -> None:
        if self._live is None or self._progress is None:
            return
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, figure in self._progress.rows():
            table.add_row(name, figure)
        self._live.update(table)

    def end(self) -> None:
        """The measured part is over."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
