"""The `octavo` command; `python -m octavo` is the same.

A Ctrl-C that comes while the command is still being imported ends it as quietly as a later one: so nothing
is imported here before there is somebody to handle it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def run() -> NoReturn:
    """Import the command line and hand over to it."""
    try:
        import signal

        found = signal.getsignal(signal.SIGINT)
        if found is signal.default_int_handler:  # else whoever started us does not want to be interrupted
            # No exception: amid imports it may end up as a message, and be lost.
            signal.signal(signal.SIGINT, _end)
        from octavo.cli.main import run as run_command

        signal.signal(signal.SIGINT, found)
    except KeyboardInterrupt:
        _end()
    run_command()


def _end(*_: object) -> NoReturn:
    """Nothing is open yet."""
    os.write(2, b"\n")  # the terminal shows ^C without ending the line
    os._exit(130)


if __name__ == "__main__":
    run()
