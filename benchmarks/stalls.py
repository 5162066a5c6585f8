"""How often the machine itself takes a core away: the floor under every latency measured on it.

A process on each core looks at the clock without pause. Where the clock jumps, somebody else had the
core: another process, the kernel, or, on a virtual machine, a neighbour.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time


def stalls_a_second(seconds: float = 2.0, longer_than: float = 0.004) -> float:
    """Interruptions longer than `longer_than` seconds, of all cores this process may use together."""
    command = [sys.executable, __file__, str(seconds), str(longer_than)]
    watchers = [
        subprocess.Popen([*command, str(core)], stdout=subprocess.PIPE) for core in os.sched_getaffinity(0)
    ]
    return sum(int(watcher.communicate()[0]) for watcher in watchers) / seconds


def watch(seconds: float, longer_than: float, core: int) -> None:
    """Print the number of interruptions of one core."""
    os.sched_setaffinity(0, {core})
    count = 0
    last = time.monotonic()
    end = last + seconds
    while last < end:
        now = time.monotonic()
        count += now - last > longer_than
        last = now
    print(count)


if __name__ == "__main__":
    watch(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
