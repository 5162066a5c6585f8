"""Runs one command as a child process and watches it from outside.

The child leads its own session, so that whatever it started ends with it, also when the benchmark
is interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines.job import ForeignCores

# Settings that would give one engine other threads than another. The cores are set by affinity.
_THREAD_SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "VLLM_CPU_")


@dataclass(frozen=True)
class Finished:
    """A child that ended well."""

    stdout: str
    first_byte_s: float  # from its start to its first byte on stdout
    total_s: float
    peak_bytes: int  # of the largest of its processes
    foreign_cores: float | None


class ChildError(RuntimeError):
    """It failed, or said nothing; the message ends with what it wrote to stderr."""


def clean_environment(root: Path) -> dict[str, str]:
    """This environment without settings of threads, and with the project's own packages in reach."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_THREAD_SETTINGS)}
    return env | {"PYTHONPATH": str(root)}


def run_child(
    command: Sequence[str], cwd: Path, env: dict[str, str], stdin: str = "", timeout: float = 1800.0
) -> Finished:
    """Run it to its end. Raises ChildError if it fails, prints nothing, or takes longer than `timeout`."""
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as errors, ForeignCores() as watch:
        asked.write(stdin.encode())
        asked.seek(0)
        process, timer = None, None
        try:
            with _signals_wait():
                start = time.perf_counter()
                process = subprocess.Popen(
                    command,
                    cwd=cwd,
                    env=env,
                    stdin=asked,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                    bufsize=0,
                )
            timer = threading.Timer(timeout, _kill_group, (process.pid,))
            timer.start()
            assert process.stdout is not None
            said = process.stdout.read(1 << 16) or b""
            first = time.perf_counter() - start
            while more := process.stdout.read(1 << 16):
                said += more
            _, status, usage = os.wait4(process.pid, 0)
            total = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            process.stdout.close()
        except BaseException:
            if process is not None:
                _kill_group(process.pid)
                process.wait()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if process.returncode or not said:
            errors.seek(0)
            tail = errors.read().decode(errors="replace")[-2000:]
            late = f" (longer than {timeout:.0f} s)" if total > timeout else ""
            shown = " ".join(word for word in command[:4] if "\n" not in word)
            raise ChildError(f"{shown} … ended with {process.returncode}{late}, stderr:\n{tail}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Finished(said.decode(errors="replace"), first, total, peak, watch.cores)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """What SIGINT and SIGTERM do happens at the end of the block: an exception that came up within Popen
    would leave behind the child that it has just started. Main thread only."""
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
