"""The engine's process: how it is started and how it ends.

It is started before the front end imports anything slow, so that both get ready at the same time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.engine import wire

HEARTBEAT_SECONDS = 1.0


class EngineChild:
    """The engine's process and our end of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process = process
        self.sock = sock

    @classmethod
    def start(
        cls,
        engine_args: Mapping[str, Any],
        *,
        log_level: str = "info",
        grammar_timeout: float = 10.0,
        hidden_variables: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> EngineChild:
        """Start the process; it begins to load at once.

        Call it in a thread that lives as long as the server (the main thread): on Linux the child ends
        with the thread that started it. The child's environment is ours without `hidden_variables` and with
        `variables`.
        """
        ours, theirs = socket.socketpair()
        try:
            environment = {name: value for name, value in os.environ.items() if name not in hidden_variables}
            environment.update(variables or {})
            process = subprocess.Popen(
                _command(theirs.fileno(), os.getpid()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.sendall(wire.frame(wire.Start(dict(engine_args), log_level, grammar_timeout, HEARTBEAT_SECONDS)))
        return cls(process, ours)

    def describe_end(self) -> str:
        """How the process ended, once it has."""
        code = self.process.returncode
        if code is None:
            return "its process does not answer"
        if code >= 0:
            return f"its process ended with code {code}"
        with contextlib.suppress(ValueError):
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process was killed by signal {-code}"

    def kill(self) -> None:
        """End the process now, and wait for it. May be called twice."""
        self.sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _command(fd: int, parent: int) -> list[str]:
    """The same interpreter, and the same places to import from."""
    # Nothing is imported before sys.path is ours: the folder it is started in is no place to import from.
    code = (
        "import sys; sys.path[:] = sys.argv[3:]\n"
        "from octavo.platform.byte_code import kept_byte_code\n"
        "with kept_byte_code():\n"
        "    from octavo.engine.process import main\n"
        "    main(int(sys.argv[1]), int(sys.argv[2]))"
    )
    return [sys.executable, "-c", code, str(fd), str(parent), *sys.path]
