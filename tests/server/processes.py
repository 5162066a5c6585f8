"""Real servers in processes of their own, for tests: started, asked, ended, and looked after."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 90.0  # seconds; machines that run tests are slow and busy


class ServerProcess:
    """`octavo serve` (or, with `stub`, the same with the stub application) on a free port.

    `out` and `err` hold the lines it has written. `family` are all processes that ever belonged to it.
    """

    def __init__(
        self, *arguments: str, stub: bool = True, env: dict[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        module = "tests.server.serve_stub" if stub else "octavo"
        verb = [] if stub else ["serve"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *verb, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self.family: dict[int, psutil.Process] = {}
        self._note_family()
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))

    def _note_family(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for process in [parent, *parent.children(recursive=True)]:
                self.family.setdefault(process.pid, process)

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        self._note_family()
        (engine,) = (p for p in self.family.values() if p.pid != self.process.pid)
        return engine

    def url(self) -> str:
        """Wait until the port is open."""
        for line in self._lines(" is open"):
            return next(word for word in line.split() if word.startswith("http"))
        raise AssertionError(f"the server never opened its port: {self.err}")

    def wait_ready(self) -> str:
        """Wait until the model is loaded; the URL."""
        url = self.url()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self._note_family()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready", timeout=10, verify=False).status_code == 200:
                    return url
            assert self.process.poll() is None, self.err
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready: {self.err}")

    def wait_end(self) -> int:
        """Wait for the end of the process; its code."""
        self._note_family()
        code = self.process.wait(PATIENCE)
        for reader, stream in zip(self._readers, (self.process.stdout, self.process.stderr), strict=True):
            reader.join(PATIENCE)
            assert stream is not None
            stream.close()
        return code

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the server alone."""
        self._note_family()
        self.process.send_signal(number)

    def end(self) -> int:
        """SIGTERM, twice; its code."""
        if self.process.poll() is None:
            self.signal()
            time.sleep(0.1)
            if self.process.poll() is None:
                self.signal()
        return self.wait_end()

    def log(self) -> list[dict[str, Any]]:
        """The access log so far."""
        return [json.loads(line) for line in self.out if line.startswith("{")]

    def assert_no_orphans(self) -> None:
        """No process that ever belonged to it is left (within a few seconds); kills what is."""
        _, left = psutil.wait_procs(list(self.family.values()), timeout=10)
        for process in left:
            process.kill()
        assert not left, f"left running: {left}"

    def _lines(self, wanted: str) -> Iterator[str]:
        deadline = time.monotonic() + PATIENCE
        seen = 0
        while time.monotonic() < deadline:
            while seen < len(self.err):
                if wanted in self.err[seen]:
                    yield self.err[seen]
                seen += 1
            if self.process.poll() is not None and seen == len(self.err):
                return
            time.sleep(0.02)


@contextlib.contextmanager
def server(*arguments: str, **options: Any) -> Iterator[ServerProcess]:
    """A server that is ended with the block, and leaves no process behind."""
    process = ServerProcess(*arguments, **options)
    try:
        yield process
    finally:
        process.end()
        process.assert_no_orphans()
