"""What else a start needs while torch is being imported, which takes seconds and one core.

Triton names what it compiled by a digest of its own files, half a gigabyte, and works that out when the
first kernel is asked for. Reading and hashing need neither torch nor Python's lock: a thread does it
meanwhile. And the garbage collector looks at every object again and again while an import makes a
hundred thousand that stay: it rests until that is over.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NVIDIA_DRIVER = Path("/dev/nvidiactl")


@contextmanager
def head_start() -> Iterator[None]:
    """Around the import of what imports torch. Where that is imported already, nothing happens."""
    if "torch" in sys.modules:
        yield
        return
    if _NVIDIA_DRIVER.exists():
        threading.Thread(target=_hash_triton, name="octavo-head-start", daemon=True).start()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _hash_triton() -> None:
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # no Triton, or one that keeps it elsewhere: whoever needs it will say so
        return
    triton_key()
