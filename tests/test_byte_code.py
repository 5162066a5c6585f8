"""Byte code of packages that have none: compiled by the first start, found by the next, and no one else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.errors import ConfigError
from octavo.platform import byte_code
from octavo.platform.byte_code import kept_byte_code

ROOT = Path(__file__).resolve().parent.parent
IMPORT_TORCH = "from octavo.platform.head_start import head_start\nwith head_start():\n    import torch"
SHOW = "\nimport sys; print(torch.ANSWER, torch.more.ANSWER, sys.pycache_prefix, sys.dont_write_bytecode)"


class Image:
    """A machine whose torch (two modules, for this test) was installed without byte code."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.packages = folder / "cache", folder / "packages"
        self.torch = self.packages / "torch"
        self.torch.mkdir(parents=True)
        (self.torch / "__init__.py").write_text("from torch import more\nANSWER = 1\n")
        (self.torch / "more.py").write_text("ANSWER = 1\n")

    def change(self, old: str, new: str) -> None:
        """Other sources of the same size and time: whoever compiles them would answer otherwise."""
        for file in self.torch.glob("*.py"):
            found = file.stat()
            file.write_text(file.read_text().replace(old, new))
            os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))

    def start(self, code: str = IMPORT_TORCH + SHOW, **variables: str) -> str:
        """What a process prints, the last line of its error if it fails."""
        env = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"OCTAVO_CACHE": str(self.cache), "PYTHONPATH": f"{self.packages}:{ROOT}"}
        env |= {"PYTHONDONTWRITEBYTECODE": "1"} | variables
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    def kept(self) -> list[str]:
        """The modules whose byte code lies in the cache."""
        prefix = self.cache / "bytecode"
        return sorted(path.name.split(".")[0] for path in prefix.rglob("torch/*.pyc"))


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path)


def test_the_second_start_compiles_nothing(image: Image) -> None:
    assert image.start() == "1 1 None True"  # and both settings are as they were
    assert image.kept() == ["__init__", "more"]
    assert not list(image.packages.rglob("*.pyc"))  # nothing beside the packages, as the image wants it
    assert (image.cache / "bytecode").stat().st_mode & 0o777 == 0o700
    image.change("= 1", "= 2")
    assert image.start() == "1 1 None True"
    (image.torch / "more.py").write_text("ANSWER = 3\n")  # a newer file is compiled again
    os.utime(image.torch / "more.py", (1, 1))
    assert image.start() == "1 3 None True"


def test_the_command_line_keeps_what_a_verb_imports(image: Image) -> None:
    code = "import octavo.__main__ as octavo; octavo.run()"
    verb = "import sys; sys.argv = ['octavo', 'models']; "
    image.start(verb + code)
    modules = {path.name.split(".")[0] for path in (image.cache / "bytecode").rglob("octavo/cli/*.pyc")}
    assert "models" in modules


@pytest.mark.parametrize("reason", ["there is byte code", "switched off", "the user has a folder"])
def test_nothing_is_kept_where(image: Image, reason: str, tmp_path: Path) -> None:
    variables = {}
    if reason == "there is byte code":
        image.start("import torch", PYTHONDONTWRITEBYTECODE="")
    elif reason == "switched off":
        variables = {"OCTAVO_BYTECODE": "0"}
    else:
        variables = {"PYTHONPYCACHEPREFIX": str(tmp_path / "mine")}
    image.start(**variables)
    assert not image.cache.exists()


def test_a_folder_that_others_write_to_is_not_used(image: Image) -> None:
    folder = image.cache / "bytecode"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert image.start() == "1 1 None True"
    assert image.kept() == []


def test_a_cache_that_cannot_be_made_is_no_error(image: Image) -> None:
    image.cache.write_text("a file where the folder would be")
    assert image.start() == "1 1 None True"


def test_a_file_cut_short_is_not_tripped_over_twice(image: Image) -> None:
    image.start()
    (found,) = (image.cache / "bytecode").rglob("more.*.pyc")
    found.write_bytes(found.read_bytes()[:-8])
    assert image.start().startswith("EOFError")
    assert image.start() == "1 1 None True"
    assert image.kept() == ["__init__", "more"]


def test_a_full_disk_is_read_and_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    monkeypatch.setattr(byte_code, "is_missing", lambda package: True)
    monkeypatch.setattr(byte_code, "_LEAST_ROOM", 1 << 62)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    with kept_byte_code():
        assert sys.pycache_prefix == str(tmp_path / "bytecode")
        assert sys.dont_write_bytecode


def test_the_last_to_leave_restores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    monkeypatch.setattr(byte_code, "is_missing", lambda package: True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    ours = str(tmp_path / "bytecode")
    first, second = kept_byte_code(), kept_byte_code()
    first.__enter__()
    second.__enter__()
    assert (sys.pycache_prefix, sys.dont_write_bytecode) == (ours, False)
    first.__exit__(None, None, None)
    assert (sys.pycache_prefix, sys.dont_write_bytecode) == (ours, False)
    second.__exit__(None, None, None)
    assert (sys.pycache_prefix, sys.dont_write_bytecode) == (None, True)
    with kept_byte_code():
        sys.pycache_prefix = "of the user"
    assert sys.pycache_prefix == "of the user"


def test_a_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_BYTECODE", "off")
    with pytest.raises(ConfigError, match="OCTAVO_BYTECODE=off"), kept_byte_code():
        pass


def test_octavo_env_says_where_it_lies(image: Image) -> None:
    show = "\nfrom octavo.platform.byte_code import describe_byte_code\nprint(describe_byte_code())"
    image.start()
    assert image.start(IMPORT_TORCH + show).startswith(f"{image.cache / 'bytecode'} (")
    assert image.start(IMPORT_TORCH + show, OCTAVO_BYTECODE="0").endswith("OCTAVO_BYTECODE=0")
    image.start("import torch", PYTHONDONTWRITEBYTECODE="")
    assert image.start(IMPORT_TORCH + show) == "beside the packages"
