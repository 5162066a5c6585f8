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


@pytest.mark.parametrize(
    "name",
    [
        "products",
        "model",
        "sample",
        "step",
        "whole_step",
        "lookup",
        "draft",
        "whole_pass",
        "shared",
        "prompt",
    ],
)
def test_interpreted(name: str) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(HERE / f"check_{name}.py"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
