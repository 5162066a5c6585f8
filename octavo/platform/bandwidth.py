"""Measures how fast this machine reads its main memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from octavo.platform.hardware import memory, usable_cores

# Far beyond the last-level cache of ordinary machines, yet quick to fill.
_BUFFER_BYTES = 256 << 20
_LEAST_PASSES = 3


def memory_bandwidth_probe(seconds: float = 0.2) -> float:
    """Read bandwidth of main memory in GB/s (1e9 bytes), measured with every usable core.

    It is what bounds decoding on this machine: to make one token, every weight is read once. Each
    thread reads its own part of a buffer far larger than the caches, again and again; the best pass
    counts. Takes about `seconds`, the filling of the buffer included, and at least three passes.
    """
    import numpy as np

    started = time.perf_counter()
    threads = usable_cores()
    part = min(_BUFFER_BYTES, memory()[1] // 8) // threads // 8
    with ThreadPoolExecutor(threads, "octavo-bandwidth") as pool:
        # Each thread fills its own part, so that the pages lie near its core.
        parts = list(pool.map(lambda _: np.ones(part, np.uint64), range(threads)))
        best, passes = 0.0, 0
        while passes < _LEAST_PASSES or time.perf_counter() - started < seconds:
            before = time.perf_counter()
            # numpy reads with vector instructions here, and without the interpreter's lock.
            list(pool.map(np.bitwise_or.reduce, parts))
            best = max(best, part * 8 * threads / (time.perf_counter() - before))
            passes += 1
    return best / 1e9
