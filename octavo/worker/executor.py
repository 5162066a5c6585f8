"""How a step reaches the model runner: in line, or in a thread of its own, one step late.

The engine says `launch`, then, if the step waits for grammar masks, `provide_masks`, and reads
the oldest step with `collect`. In line the step is launched inside these calls: a CPU has done it
when they return, a GPU works on while the host schedules the next one. With the thread, `launch`
returns at once on a CPU too.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import Protocol

from octavo.core.messages import ModelOutput, SchedulerOutput
from octavo.errors import EngineDeadError
from octavo.worker.model_runner import GrammarMasks


class Pending(Protocol):
    """A launched step's answer."""

    def read(self) -> ModelOutput: ...


class StepRunner(Protocol):
    """What an executor drives: a `ModelRunner`, or a fake one in tests."""

    def forward(self, out: SchedulerOutput) -> None: ...

    def sample(self, masks: GrammarMasks | None = None) -> Pending: ...


class Executor(Protocol):
    """Steps go in and come out in the same order. Errors of a step are raised by `collect`."""

    def launch(self, out: SchedulerOutput) -> None:
        """Start a step. One that needs no masks runs to its end."""
        ...

    def provide_masks(self, masks: GrammarMasks) -> None:
        """Masks for the step launched last; only if it needs any."""
        ...

    def collect(self) -> ModelOutput:
        """The oldest step that was not collected; waits for it."""
        ...

    def shutdown(self) -> None:
        """Stop. Steps not collected are lost. May be called twice."""
        ...


class InlineExecutor:
    """Launches each step where it is called, and reads it in `collect`."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner: StepRunner | None = runner
        self._outputs: deque[Pending] = deque()

    def launch(self, out: SchedulerOutput) -> None:
        """See Executor."""
        assert self.runner is not None, "the executor was shut down"
        self.runner.forward(out)
        if not out.needs_mask:
            self._outputs.append(self.runner.sample())

    def provide_masks(self, masks: GrammarMasks) -> None:
        """See Executor."""
        assert self.runner is not None, "the executor was shut down"
        self._outputs.append(self.runner.sample(masks))

    def collect(self) -> ModelOutput:
        """See Executor."""
        return self._outputs.popleft().read()

    def shutdown(self) -> None:
        """See Executor. Lets go of the runner, and with it of the device's memory."""
        self._outputs.clear()
        self.runner = None


class ThreadExecutor:
    """Runs the steps in one thread, in order; the caller is free meanwhile.

    An error in a step stops the thread: `collect` raises it for that step and an EngineDeadError
    from then on.
    """

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._steps: queue.SimpleQueue[SchedulerOutput | None] = queue.SimpleQueue()
        self._masks: queue.SimpleQueue[GrammarMasks | None] = queue.SimpleQueue()
        self._outputs: queue.SimpleQueue[ModelOutput | BaseException] = queue.SimpleQueue()
        self._cause: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="octavo-worker", daemon=True)
        self._thread.start()

    def launch(self, out: SchedulerOutput) -> None:
        """See Executor."""
        self._steps.put(out)

    def provide_masks(self, masks: GrammarMasks) -> None:
        """See Executor."""
        self._masks.put(masks)

    def collect(self) -> ModelOutput:
        """See Executor."""
        if self._cause is not None:
            raise EngineDeadError(f"the worker has stopped: {self._cause}") from self._cause
        output = self._outputs.get()
        if isinstance(output, BaseException):
            self._cause = output
            raise output
        return output

    def shutdown(self) -> None:
        """See Executor. Waits for the step that is running."""
        self._steps.put(None)
        self._masks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (out := self._steps.get()) is not None:
            try:
                self._runner.forward(out)
                masks = self._masks.get() if out.needs_mask else None
                if out.needs_mask and masks is None:
                    return  # shut down while waiting
                self._outputs.put(self._runner.sample(masks).read())
            except BaseException as error:  # handed to whoever collects
                self._outputs.put(error)
                return
