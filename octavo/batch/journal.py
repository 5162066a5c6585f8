"""Results as lines of JSON, appended as they finish, so that whatever happens nothing finished is lost.

A job that is started again finds in its journal what it need not do. Beside the journal lies what the
job was (`out.jsonl.job.json`): the results of another job are never added to, and the difference is
named. One process writes; a second one is refused. A process that is killed in the middle of a line
leaves a torn one, which the next run cuts off: each line is written in one piece with its end, so only
the last can be torn.

What survives: a killed process loses nothing it has appended. A machine that loses its power may lose
the last second, which the next run does again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from octavo.batch.keys import KeySet
from octavo.errors import ConfigError, OctavoError

SYNC_SECONDS = 1.0
MAX_RUNS_KEPT = 100
_CHUNK = 1 << 16

Record = dict[str, Any]


class Journal:
    """The file of one job's results. Made by `open`.

    key_of: the name of what a record finishes; None for a record that finishes nothing.
    """

    def __init__(
        self, path: Path, file: BinaryIO, job: Record, key_of: Callable[[Record], str | None]
    ) -> None:
        self.path = path
        self.done = KeySet()
        self.was_torn = False
        self._file = file
        self._job = job
        self._key_of = key_of
        self._last_sync = time.monotonic()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        job: Mapping[str, Any],
        *,
        key_of: Callable[[Record], str | None] = lambda record: record.get("key"),
        overwrite: bool = False,
        drop: Callable[[Record], bool] | None = None,
    ) -> Journal:
        """Begin a journal, or go on with one of the same job.

        job: all that shapes the results, as plain JSON data. Compared key by key with that of the file.
        overwrite: throw away what another job, or an earlier run, has left there.
        drop: finished records for which this is true are taken out first, so that they are done again.

        Raises ConfigError for a file of another job, one that is no journal, or one in use.
        """
        path = Path(path)
        wanted: Record = json.loads(json.dumps(job))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab+")  # noqa: SIM115 - stays open
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
        try:
            _lock(file, path)
            if overwrite:
                file.truncate(0)
            found = _read_job(path)
            if file.seek(0, os.SEEK_END) > 0:
                _check_same(path, found, wanted)
            else:
                found = None
            journal = cls(path, file, found or {"job": wanted, "runs": []}, key_of)
            if found is None:
                journal._write_job()
            journal._repair()
            if drop is not None:
                journal._drop(drop)
            for record in journal.records():
                key = key_of(record)
                if key is not None:
                    journal.done.add(key)
        except BaseException:
            file.close()
            raise
        return journal

    def __contains__(self, key: str) -> bool:
        return key in self.done

    @property
    def num_done(self) -> int:
        """Names that are finished."""
        return len(self.done)

    def append(self, record: Record) -> None:
        """Write one finished record. Raises OctavoError where there is no room."""
        line = _line(record)
        key = self._key_of(record)
        with _written(self.path):
            self._file.write(line)
            self._file.flush()
            now = time.monotonic()
            if now - self._last_sync >= SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._last_sync = now
        if key is not None:
            self.done.add(key)

    def records(self) -> Iterator[Record]:
        """Everything that was appended, from the first line on. Raises ConfigError for a foreign line."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                record = _parsed(line)
                if record is None:
                    raise ConfigError(
                        f"line {number} of {self.path} is not a result: the file was changed by something "
                        "else. Name another output, or --overwrite it"
                    )
                yield record

    def note(self, summary: Mapping[str, Any]) -> None:
        """Keep the summary of a run beside the job."""
        runs = [*self._job.get("runs", []), dict(summary)]
        self._job["runs"] = runs[-MAX_RUNS_KEPT:]
        self._write_job()

    def close(self) -> None:
        """Have everything on the disk. May be called twice."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
            # Nothing is buffered but the line that could not be written, and that was said by then.
            with contextlib.suppress(OSError):
                self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _repair(self) -> None:
        """End the file behind its last whole line."""
        size = self._file.seek(0, os.SEEK_END)
        end = _last_line_end(self._file, size)
        if end == size:
            return
        self._file.seek(end)
        tail = self._file.read()
        self.was_torn = True
        if _parsed(tail) is not None:  # all of it but its end: a part of an object is never an object
            self._file.write(b"\n")
        else:
            self._file.truncate(end)
        self._file.flush()

    def _drop(self, drop: Callable[[Record], bool]) -> None:
        """Write the file anew without some of its records, unless there are none of them."""
        if not any(drop(record) for record in self.records()):
            return
        beside = self.path.with_name(self.path.name + ".new")
        with _written(beside), open(beside, "wb") as new, open(self.path, "rb") as old:
            for line in old:
                record = _parsed(line)
                if record is not None and not drop(record):
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        os.replace(beside, self.path)
        self._file.close()
        self._file = open(self.path, "ab+")  # noqa: SIM115
        _lock(self._file, self.path)

    def _write_job(self) -> None:
        place = _job_path(self.path)
        beside = place.with_name(place.name + ".new")
        with _written(place):
            beside.write_text(json.dumps(self._job, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, place)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Around writing: a disk that is full, gone or read-only is an OctavoError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise OctavoError(
            f"{path} cannot be written: {error.strerror}. What the results hold is safe; make room and "
            "start the same command again"
        ) from None


def _job_path(path: Path) -> Path:
    return path.with_name(path.name + ".job.json")


def read_job(path: str | os.PathLike[str]) -> Record | None:
    """What lies beside a journal, {"job": …, "runs": […]}; None where there is nothing readable."""
    return _read_job(Path(path))


def _read_job(path: Path) -> Record | None:
    try:
        found = json.loads(_job_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("job"), dict) else None


def _check_same(path: Path, found: Record | None, wanted: Record) -> None:
    ways_out = "Name another output, or throw the old results away with --overwrite"
    if found is None:
        raise ConfigError(f"{path} is there already, and {_job_path(path).name} beside it is not. {ways_out}")
    job = found["job"]
    names = [name for name in sorted({*job, *wanted}) if job.get(name) != wanted.get(name)]
    if names:
        lines = [f"  {name}: {_shown(job.get(name))} there, {_shown(wanted.get(name))} now" for name in names]
        raise ConfigError("\n".join([f"{path} holds the results of another job:", *lines, ways_out]))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:199] + "…"


def _line(record: Record) -> bytes:
    """A record in one line of UTF-8."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair somewhere: only an escape can say that
        return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _parsed(line: bytes) -> Record | None:
    """A line as the object it is; None if it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _last_line_end(file: BinaryIO, size: int) -> int:
    """The place behind the last newline."""
    end = size
    while end > 0:
        start = max(0, end - _CHUNK)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _lock(file: BinaryIO, path: Path) -> None:
    """Hold the file alone; the system lets go of it when the process ends, however that is."""
    try:
        import fcntl
    except ImportError:  # no such locks here
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"{path} is in use: another process is working on it. Wait for its end") from None
