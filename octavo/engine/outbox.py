"""What the engine's process says, sent by a thread of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from octavo.engine import wire
from octavo.outputs import RequestOutput, join_deltas


@dataclass(slots=True)
class Recipient:
    """Who an output goes to: a request in the engine, by the front end's number."""

    key: int
    is_delta: bool
    sent_first: bool = False  # prompt logprobs travel once


class Outbox:
    """Everything the engine says, sent by a thread of its own.

    Outputs of a request that wait together are joined, so a front end that reads slowly costs neither
    memory nor steps. While there is nothing to say, a heartbeat goes out at every `interval` seconds.
    """

    def __init__(
        self,
        sock: socket.socket,
        interval: float,
        step_seconds: Callable[[], float],
        on_tick: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._interval = interval
        self._step_seconds = step_seconds
        self._on_tick = on_tick
        self._changed = threading.Condition()
        self._outputs: dict[int, tuple[Recipient, RequestOutput]] = {}
        self._messages: list[wire.Message] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="octavo-sender", daemon=True)
        self._thread.start()

    def post(self, message: wire.Message) -> None:
        """Send a message, after the outputs that wait."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def post_outputs(self, outputs: list[tuple[Recipient, RequestOutput]]) -> None:
        """What a step brought."""
        with self._changed:
            for request, output in outputs:
                waiting = self._outputs.get(request.key)
                if waiting is not None and request.is_delta:
                    output = join_deltas(waiting[1], output)
                self._outputs[request.key] = (request, output)
            self._changed.notify()

    def forget(self, key: int) -> None:
        """Nobody waits for this request any more."""
        with self._changed:
            self._outputs.pop(key, None)

    def close(self) -> None:
        """Send what waits, then nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        next_beat = time.monotonic()
        while True:
            with self._changed:
                if not (self._outputs or self._messages or self._is_closed):
                    self._changed.wait(max(0.0, next_beat - time.monotonic()))
                outputs, self._outputs = self._outputs, {}
                messages, self._messages = self._messages, []
                is_closed = self._is_closed
            if outputs:
                messages.insert(0, _outputs_message(outputs))
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._interval
                messages.append(wire.Heartbeat(self._step_seconds()))
                self._on_tick()
            try:
                self._sock.sendall(b"".join(map(wire.frame, messages)))
            except OSError:  # the front end is gone; the reader ends the process
                return
            if is_closed and not outputs and not messages:
                return


def _outputs_message(outputs: dict[int, tuple[Recipient, RequestOutput]]) -> wire.Outputs:
    sent = []
    for key, (request, output) in outputs.items():
        sent.append(wire.output_to_wire(key, output, not request.sent_first))
        request.sent_first = True
    return wire.Outputs(sent)
