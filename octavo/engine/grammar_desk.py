"""Where the engine's process compiles grammars, beside the steps."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from octavo.engine import wire
from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams


@dataclass(slots=True)
class CompileJob:
    """A request whose grammar is not compiled yet."""

    admit: wire.Admit
    params: SamplingParams
    deadline: float  # monotonic; inf: none
    is_over: bool = False  # answered, or given up


class GrammarDesk:
    """Compiles grammars one after another, beside the steps, and refuses those that take too long.

    A compilation cannot be stopped half-way (the library bounds its work); one that is late is refused
    in time and its result dropped.
    """

    def __init__(
        self, compile_job: Callable[[CompileJob], None], refuse: Callable[[int, Exception], None]
    ) -> None:
        self._compile = compile_job
        self._refuse = refuse
        self._lock = threading.Lock()
        self._open: dict[int, CompileJob] = {}
        self._jobs: queue.SimpleQueue[CompileJob] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, job: CompileJob) -> None:
        """From the reader's thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="octavo-grammar", daemon=True)
            self._thread.start()
        with self._lock:
            self._open[job.admit.key] = job
        self._jobs.put(job)

    def take(self, key: int, then: Callable[[], None] = lambda: None) -> bool:
        """Close the job of this request and do what follows; False if it was over already.

        Both in one: who closes a job later can be sure that what followed has happened.
        """
        with self._lock:
            job = self._open.pop(key, None)
            if job is None:
                return False
            job.is_over = True
            then()
            return True

    def expire(self) -> None:
        """Refuse what is late."""
        now = time.monotonic()
        with self._lock:
            late = [job for job in self._open.values() if now > job.deadline]
        for job in late:
            if self.take(job.admit.key):
                self._refuse(
                    job.admit.key,
                    RequestError(
                        "compiling structured_outputs took longer than this server allows; simplify the "
                        "schema, regex or grammar, or raise --grammar-timeout",
                        "structured_outputs",
                    ),
                )

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if not job.is_over:
                self._compile(job)
