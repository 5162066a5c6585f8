"""Runs the kernels' tests under Triton's interpreter, in a process of their own.

Triton decides when a kernel is defined whether it will be interpreted, so this choice cannot be
made inside a test process that may also run kernels on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


# Those that take long have a process each, all others share one.
LONG = ["shared", "model", "whole_step", "whole_pass", "sample", "persistent"]
SHORT = sorted({file.stem.removeprefix("check_") for file in HERE.glob("check_*.py")} - set(LONG))


@pytest.mark.parametrize("names", [*LONG, " ".join(SHORT)])
def test_interpreted(names: str) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    files = [str(HERE / f"check_{name}.py") for name in names.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
