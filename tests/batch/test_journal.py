"""What is appended is kept, whatever happens, and belongs to one job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.batch.journal import Journal, read_job
from octavo.errors import ConfigError, OctavoError

JOB = {"model": "m", "seed": 1, "sampling": {"top_p": 0.5}}


def fill(path: Path, count: int) -> None:
    with Journal.open(path, JOB) as journal:
        for i in range(count):
            journal.append({"key": f"k{i}", "text": f"été {i}"})


def test_finished_names_are_known_to_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    fill(path, 3)
    with Journal.open(path, JOB) as journal:
        assert journal.num_done == 3
        assert "k2" in journal
        assert "k3" not in journal
        journal.append({"key": "k3"})
        assert "k3" in journal
        assert [record["key"] for record in journal.records()] == ["k0", "k1", "k2", "k3"]
        assert not journal.was_torn
    assert "été 0" in path.read_text(encoding="utf-8")


def test_a_line_torn_anywhere_is_cut_off_and_done_again(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    fill(whole, 3)
    data = whole.read_bytes()
    first = data.index(b"\n") + 1
    path = tmp_path / "torn.jsonl"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        (tmp_path / "torn.jsonl.job.json").write_bytes((tmp_path / "whole.jsonl.job.json").read_bytes())
        lines = data[:length].split(b"\n")
        is_whole_without_end = bool(lines[-1]) and lines[-1].endswith(b"}")
        expected = data[:length].count(b"\n") + is_whole_without_end
        with Journal.open(path, JOB) as journal:
            assert journal.num_done == expected, length
            journal.append({"key": "new"})
        assert len([json.loads(line) for line in path.read_bytes().splitlines()]) == expected + 1
        assert expected == 0 or path.read_bytes().startswith(data[:first])


def test_a_long_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 2)
    good = path.read_bytes()
    path.write_bytes(good + b'{"key":"' + b"x" * 300_000)
    with Journal.open(path, JOB) as journal:
        assert journal.was_torn
        assert journal.num_done == 2
    assert path.read_bytes() == good


def test_another_job_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 1)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        Journal.open(path, {**JOB, "sampling": {"top_p": 0.9}, "more": True})
    text = str(caught.value)
    assert '{"top_p": 0.5} there, {"top_p": 0.9} now' in text
    assert "more: null there, true now" in text
    assert "model" not in text
    assert "--overwrite" in text
    assert path.read_bytes() == before


def test_overwriting_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 2)
    with Journal.open(path, {"other": 1}, overwrite=True) as journal:
        assert journal.num_done == 0
    assert path.read_bytes() == b""
    found = read_job(path)
    assert found is not None
    assert found["job"] == {"other": 1}


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    with pytest.raises(ConfigError, match="is there already"):
        Journal.open(path, JOB)
    assert path.read_text() == "precious\n"


def test_a_foreign_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"# by hand\n" + lines[2])
    with pytest.raises(ConfigError, match=r"line 2 of .* is not a result"):
        Journal.open(path, JOB)


def test_what_should_be_done_again_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, 4)
    with Journal.open(path, JOB, drop=lambda record: record["key"] in ("k1", "k3")) as journal:
        assert journal.num_done == 2
        assert "k1" not in journal
        journal.append({"key": "k1"})
        with pytest.raises(ConfigError, match="in use"):
            Journal.open(path, JOB)
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == ["k0", "k2", "k1"]


def test_one_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    code = (
        "import sys; from octavo.batch.journal import Journal; "
        f"journal = Journal.open({str(path)!r}, {JOB!r}); print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match="in use"):
            Journal.open(path, JOB)
    finally:
        other.kill()
        other.communicate()
    Journal.open(path, JOB).close()  # the dead hold nothing


def test_half_a_surrogate_pair_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal.open(path, JOB) as journal:
        journal.append({"key": "k\ud800"})
    path.read_bytes().decode()  # every reader of UTF-8 can read it
    with Journal.open(path, JOB) as journal:
        assert "k\ud800" in journal


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    class Full:
        closed = False

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return 0

        def close(self) -> None:
            self.closed = True

    with Journal.open(tmp_path / "out.jsonl", JOB) as journal:
        real: Any = journal._file
        journal._file = Full()  # type: ignore[assignment]
        with pytest.raises(OctavoError, match="No space left"):
            journal.append({"key": "a"})
        assert "a" not in journal
        journal._file = real


def test_runs_are_noted_beside_the_job(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for seconds in (1.0, 2.0):
        with Journal.open(path, JOB) as journal:
            journal.append({"key": f"k{seconds}"})
            journal.note({"seconds": seconds})
    found = read_job(path)
    assert found is not None
    assert [run["seconds"] for run in found["runs"]] == [1.0, 2.0]


def test_a_full_disk_is_told_and_what_was_written_is_gone_on_from(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; it cannot be lifted again within a process."""
    path = tmp_path / "out.jsonl"
    program = """
import resource, sys
from octavo.batch.journal import Journal
from octavo.errors import OctavoError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with Journal.open(sys.argv[1], {"a": 1}) as journal:
        try:
            for i in range(100):
                journal.append({"key": f"k{i}", "text": "x" * 90})
        finally:
            journal.note({"long": "y" * 2000})  # as jobs do at their end, whatever it was
except OctavoError as error:
    print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""
    assert "cannot be written: File too large" in ended.stdout
    assert "start the same command again" in ended.stdout
    with Journal.open(path, {"a": 1}) as journal:
        assert journal.num_done == 8
        assert journal.was_torn
        journal.append({"key": "k8"})
        assert [record["key"] for record in journal.records()][-2:] == ["k7", "k8"]
