"""Folders that appear only when they are whole.

What Octavo prepares itself (a converted GGUF file, the default model) is kept under one root, see
`octavo.platform.cache_root`. A folder is built beside its final name and renamed into place at the
end, under a lock, so that an interrupted run leaves nothing that could be taken for a model, and
two processes that want the same one build it once.

Each such folder holds `octavo.json`, its record: where it came from and how large every file is.
The sizes are compared on every use, which costs a few `stat` calls and catches a copy that lost
its end (a full disk, a power cut).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo.errors import ModelError
from octavo.platform import cache_root

__all__ = ["CONVERSION_VERSION", "RECORD_NAME", "cache_root", "is_complete", "publish", "read_record"]

RECORD_NAME = "octavo.json"
# Raise it when the result of converting a GGUF file changes: older results are then made anew.
CONVERSION_VERSION = 1

Builder = Callable[[Path], Mapping[str, Any]]


def read_record(folder: Path) -> dict[str, Any] | None:
    """The folder's record, or None if it has none that can be read."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_complete(folder: Path) -> bool:
    """Whether the folder has a record and every file in it has the recorded size."""
    record = read_record(folder)
    files = record.get("files") if record else None
    if not isinstance(files, dict) or not files:
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def publish(folder: Path, build: Builder, on_wait: Callable[[], None] | None = None) -> Path:
    """Return `folder`, after building it if it is not there whole.

    `build` fills the empty folder it is given and returns what the record shall say.
    `on_wait` is called once if another process is building the same folder.

    Raises ModelError if the cache cannot be written. Errors of `build` pass through, and leave
    nothing behind.
    """
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder.parent / f".{folder.name}.lock", on_wait) as alone:
            if is_complete(folder):
                return folder
            if alone:
                _remove_leftovers(folder)
            return _build(folder, build)
    except OSError as error:
        raise ModelError(
            f"The cache folder {folder.parent} cannot be used: {error}.\n"
            "Make room or set OCTAVO_CACHE to a folder that can be written."
        ) from error


def _build(folder: Path, build: Builder) -> Path:
    scratch = folder.parent / f".{folder.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    scratch.mkdir()
    try:
        record = dict(build(scratch))
        record["files"] = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (scratch / RECORD_NAME).write_text(text, encoding="utf-8")
        if folder.exists() and not is_complete(folder):
            # Moved aside first, so that the final name never shows a half-deleted folder.
            broken = scratch.with_name(scratch.name + "-broken")
            folder.rename(broken)
            shutil.rmtree(broken, ignore_errors=True)
        try:
            scratch.rename(folder)
        except OSError:
            # Without a lock (some network file systems) another process may have been faster.
            if not is_complete(folder):
                raise
        return folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Delete what interrupted runs left. Only under the lock: nobody else is building then."""
    for leftover in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _exclusive(lock: Path, on_wait: Callable[[], None] | None) -> Iterator[bool]:
    """Hold `lock` while the block runs; yields False where the system offers no such lock.

    The lock belongs to the open file: it goes when the process ends, however it ends.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with lock.open("a") as stream:
        held = True
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            held = False
        yield held
