"""What the operating system knows of a process of ours: its name, its arguments, its parent.

Linux gives a process the means to end with its parent and to overwrite the arguments that every user
of the machine can read. Elsewhere these calls do nothing and say so by their result.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# Places in /proc/self/stat (counted after the name in parentheses) of where the arguments lie.
_ARG_START, _ARG_END = 45, 46


def die_with_parent(parent: int) -> bool:
    """Have the kernel kill this process when `parent` ends, however it ends. False: not possible here.

    The signal comes when the *thread* that started this process ends, so it has to be one that lives
    as long as the parent. Ends at once if the parent is gone already.
    """
    if not sys.platform.startswith("linux"):
        return False
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
    return True


def name_process(name: str) -> None:
    """What `ps -o comm` and `top` show: at most 15 characters, without effect on the arguments."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def hide_arguments(secrets: Sequence[str]) -> bool:
    """Overwrite each of `secrets` in the arguments that `ps` and /proc show; False: not possible here.

    Between the start of the process and this call they can be read. A file or a variable of the
    environment never shows them to other users.
    """
    if not secrets or not sys.platform.startswith("linux"):
        return not secrets
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    except (OSError, ValueError, IndexError):
        return False
    if not 0 < start < end:
        return False
    arguments = ctypes.string_at(start, end - start)
    for secret in secrets:
        plain = os.fsencode(secret)
        at = arguments.find(plain)
        while plain and at >= 0:
            ctypes.memset(start + at, ord("x"), len(plain))
            at = arguments.find(plain, at + len(plain))
    return True
