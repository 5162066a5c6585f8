"""The line that ends a test run on a GPU, of made-up tests in a pytest of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CONFTEST = """
import pytest

class Version(str):
    pass

from tests.gpu_report import GpuReport, recorder

def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: as in the real tests")
    config.pluginmanager.register(GpuReport(config, lambda: FACTS))

@pytest.fixture
def record(request):
    return recorder(request)
"""
TESTS = """
import pytest

@pytest.mark.gpu
class TestKernels:
    @pytest.mark.parametrize("size", range(6))
    def test_sizes(self, size, record):
        record("products", 1e-3 * ((size * 5) % 7))
        record("products", 1e-9)
        record("of size 0" if size == 0 else "other sizes", size)
    def test_wrong(self, record):
        record("attention", float("nan"))
        record("attention", 0.5)
        assert False
    def test_skipped(self):
        pytest.skip("not here")
    @pytest.mark.xfail(strict=True)
    def test_known(self):
        assert False
    @pytest.fixture
    def broken(self):
        yield
        raise OSError("in the teardown")
    def test_teardown(self, broken):
        pass

def test_elsewhere():
    pass
"""


def run(folder: Path, facts: str, *options: str, tests: str = TESTS) -> tuple[list[str], Any]:
    """Lines of the output, and what was written to the file."""
    (folder / "conftest.py").write_text(CONFTEST.replace("FACTS", facts))
    (folder / "test_it.py").write_text(tests)
    file = folder / "report.json"
    file.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OCTAVO_GPU_REPORT": str(file)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer than the tests
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode in (0, 1), child.stdout + child.stderr
    return child.stdout.splitlines(), json.loads(file.read_text()) if file.exists() else None


@pytest.mark.parametrize("options", [[], ["-p", "xdist", "-n", "2"]], ids=["alone", "in workers"])
def test_the_last_line(tmp_path: Path, options: list[str]) -> None:
    facts = {"device": "NVIDIA H200", "driver": "570.1", "torch": "2.11", "triton": None}
    # torch's version is no plain text, which workers could not send
    shown = repr(facts).replace("'2.11'", "Version('2.11')")
    lines, written = run(tmp_path, shown, *options)
    found = json.loads(lines[-1])
    assert found == written
    assert (found["passed"], found["failed"], found["skipped"]) == (6, 2, 2)  # the teardown's is no pass
    assert found["exit_status"] == 1
    assert found["seconds"] > 0
    assert {name: found[name] for name in facts} == facts
    assert [name.rpartition("::")[2] for name in found["failures"]] == ["test_teardown", "test_wrong"]
    assert found["deviations"] == {
        "attention": "nan", "of size 0": 0.0, "other sizes": 5.0, "products": 0.006,
    }  # fmt: skip


def test_quiet_without_a_gpu(tmp_path: Path) -> None:
    lines, written = run(tmp_path, "None")
    assert not any(line.startswith("{") for line in lines)
    assert written is None
    lines, written = run(tmp_path, "{'device': 'a GPU'}", tests="def test_plain(): pass")
    assert "1 passed" in lines[-1]
    assert written is None
