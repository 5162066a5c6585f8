"""Runs the programs of a kernel that wait for one another under the interpreter: in turns.

Triton's interpreter runs one program behind the other, so a program would wait for ever for the next one.
Here each is a thread of its own, one of them runs at a time, and where it has to wait another takes over,
in an order drawn by lot. If none can go on, that is an error, not a hang.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


class Turns:
    """The programs of one launch. `wait` takes the place of the kernel's own."""

    def __init__(self, programs: int, seed: int) -> None:
        self._programs = programs
        self._lot = random.Random(seed)
        self._changed = threading.Condition()
        self._running: set[int] = set()
        self._turn = 0
        self._idle = 0  # turns since a program last went on
        self.waits = 0
        self.failure: BaseException | None = None

    def wait(self, counter_ptr: Any, arrivals: Any, SPINS: Any) -> None:
        """As persistent_sync.wait."""
        import triton.language as tl

        wanted = int(getattr(arrivals, "value", arrivals))
        me = self._turn
        self.waits += 1
        self._pass_on(me)  # even if it need not: who goes on first must not matter
        while int(tl.load(counter_ptr)) < wanted:
            self._idle += 1
            if self._idle > 20 * self._programs:
                self.failure = self.failure or RuntimeError(f"no program can go on: {wanted} arrivals wanted")
            if self.failure is not None:
                raise RuntimeError("another program failed") from self.failure
            self._pass_on(me)
        self._idle = 0

    def _pass_on(self, me: int) -> None:
        with self._changed:
            self._turn = self._lot.choice(sorted(self._running))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._turn == me)
        interpreter.interpreter_builder.set_grid_idx(me, 0, 0)

    def _run(self, index: int, work: Callable[[], None]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == index)
        interpreter.interpreter_builder.set_grid_idx(index, 0, 0)
        try:
            work()
        except BaseException as error:
            self.failure = self.failure or error
        with self._changed:
            self._running.discard(index)
            if self._running:
                self._turn = self._lot.choice(sorted(self._running))
            self._changed.notify_all()

    def launch(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        """All programs of the kernel, to their end. Raises what a program raised."""
        fn = kernel.rewrite()
        known = inspect.getfullargspec(fn).args
        executor = interpreter.GridExecutor(fn, kernel.arg_names, (self._programs,))
        scope = interpreter._patch_lang(fn)
        try:
            named = inspect.getcallargs(fn, *arguments, **{k: v for k, v in options.items() if k in known})
            named = {
                name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
                for name, value in named.items()
            }
            interpreter.interpreter_builder.set_grid_dim(self._programs, 1, 1)
            self._running = set(range(self._programs))
            threads = [
                threading.Thread(target=self._run, args=(index, lambda: fn(**named)))
                for index in range(self._programs)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            scope.restore()
        if self.failure is not None:
            raise self.failure
