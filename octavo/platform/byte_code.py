"""Keeps the byte code of packages that have none of their own, so that only the first start compiles them.

Python compiles a module when it is first imported and leaves the result beside the source. Many container
images install packages without it and tell Python to write none (`pip install --no-compile`,
PYTHONDONTWRITEBYTECODE=1): there each process compiles torch's thousand modules again, for two seconds.
Where torch has no byte code, and nowhere else, whatever Octavo imports is kept under its own cache instead.

The rest is Python's work: a module whose source has changed is compiled again, files are written beside
their names and renamed, and a folder that cannot be written to is passed over in silence.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from octavo.errors import ConfigError
from octavo.platform.environment import cache_root

VARIABLE = "OCTAVO_BYTECODE"
# What a start writes is 30 MB and more. Python before 3.13 does not look whether all of a file was written.
_LEAST_ROOM = 256 << 20
_lock = threading.Lock()
_within = 0  # how many are in `kept_byte_code` now: the first sets, the last restores
_ours: str | None = None
_before: tuple[str | None, bool] = (None, False)


def byte_code_folder() -> Path:
    """Where byte code is kept. It may be deleted at any time."""
    return cache_root() / "bytecode"


@contextmanager
def kept_byte_code() -> Iterator[None]:
    """What is imported within it finds its byte code in Octavo's cache, where torch has none of its own.

    That holds for all threads; it may be entered again, and by several. Nothing happens if the user has
    said where byte code lies (PYTHONPYCACHEPREFIX), or OCTAVO_BYTECODE=0. Raises ConfigError if that
    variable is neither 0 nor 1.
    """
    folder = _usable_folder() if _wanted() else None
    if folder is None:
        yield
        return
    _enter(folder)
    try:
        yield
    except EOFError:  # a file that was cut short, by a full disk say: the next start shall not trip over it
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        _leave()


def is_missing(package: str) -> bool:
    """Whether there is such a package, in source and without byte code beside it."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if found is None or not found.has_location or not str(found.origin).endswith(".py"):
        return False
    source = Path(str(found.origin))
    # Not cache_from_source, which may answer with our own folder.
    compiled = f"{source.stem}.{sys.implementation.cache_tag}.pyc"
    return not (source.parent / "__pycache__" / compiled).exists()


def describe_byte_code() -> str:
    """Where torch's byte code comes from, for `octavo env`."""
    if not is_missing("torch"):
        return "beside the packages"
    if os.environ.get(VARIABLE) == "0":
        return f"torch has none, and {VARIABLE}=0"
    if sys.pycache_prefix not in (None, _ours):
        return f"{sys.pycache_prefix}, as Python was told"
    folder = _usable_folder()
    if folder is None:
        return f"torch has none, and {byte_code_folder()} cannot be used or is not yours alone to write to"
    size = sum(file.stat().st_size for file in folder.rglob("*.pyc"))
    return f"{folder} ({size >> 20} MiB), since torch has none of its own"


def _wanted() -> bool:
    value = os.environ.get(VARIABLE, "").strip()
    if value not in ("", "0", "1"):
        raise ConfigError(
            f"{VARIABLE}={value} is not known: 0 keeps no byte code of packages in Octavo's cache, 1 does."
        )
    if value == "0" or sys.pycache_prefix not in (None, _ours):
        return False
    return is_missing("torch")


def _usable_folder() -> Path | None:
    """The folder, made if it has to be; None if it is not to be had, or not ours alone to write to.

    Byte code is run as it is found, so nobody else may have put it there.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: this user has no home
        folder = byte_code_folder()
        with suppress(OSError):  # what was put there before may be read all the same
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid in (0, os.getuid()) and not found.st_mode & 0o022:
            return folder
    return None


def _enter(folder: Path) -> None:
    global _within, _ours, _before
    full = shutil.disk_usage(folder).free < _LEAST_ROOM
    with _lock:
        _within += 1
        if _within == 1:
            _before = sys.pycache_prefix, sys.dont_write_bytecode
            sys.pycache_prefix = _ours = str(folder)
            sys.dont_write_bytecode = full


def _leave() -> None:
    global _within, _ours
    with _lock:
        _within -= 1
        if _within == 0:
            if sys.pycache_prefix == _ours:  # else somebody has changed it meanwhile
                sys.pycache_prefix, sys.dont_write_bytecode = _before
            _ours = None
