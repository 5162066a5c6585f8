"""What else a start needs while torch is being imported, which takes seconds and one core.

Triton names what it compiled by a digest of its own files, half a gigabyte, and works that out when the
first kernel is asked for. Reading and hashing need neither torch nor Python's lock: a thread does it
meanwhile. And the garbage collector looks at every object again and again while an import makes a
million that stay: it rests until that is over. `byte_code` spares later starts the compiling.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from octavo.platform.byte_code import kept_byte_code

_NVIDIA_DRIVER = Path("/dev/nvidiactl")
# Seconds for which the import keeps Python's lock while the thread waits for it, 500 times and more: with
# Python's 0.005 the thread is done no earlier than the import.
_SWITCH_INTERVAL = 0.0005
_digest: threading.Thread | None = None


@contextmanager
def head_start() -> Iterator[None]:
    """Around the import of what imports torch. Raises ConfigError where `kept_byte_code` does."""
    with kept_byte_code():
        if "torch" in sys.modules:
            yield
        else:
            with _meanwhile():
                yield


def wait_for_digest() -> None:
    """Wait for what `head_start` began on the side: beside it, Triton would work out the same again."""
    if _digest is not None:
        _digest.join()


@contextmanager
def _meanwhile() -> Iterator[None]:
    global _digest
    interval = sys.getswitchinterval()
    if _NVIDIA_DRIVER.exists():
        sys.setswitchinterval(min(interval, _SWITCH_INTERVAL))
        _digest = threading.Thread(target=_hash_triton, name="octavo-head-start", daemon=True)
        _digest.start()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collects:
            if gc.get_freeze_count() == 0:  # else somebody else's objects are kept apart
                gc.freeze()
                gc.unfreeze()  # all there is, to the oldest generation, without a look at it
            gc.enable()


def _hash_triton() -> None:
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # no Triton, or one that keeps it elsewhere: whoever needs it will say so
        return
    triton_key()
