#!/usr/bin/env python3
"""Makes the project's own `.venv`, with the packages that one purpose needs.

    python3 scripts/setup_env.py demo    what `make demo` runs with: Octavo and the GGUF reader
    python3 scripts/setup_env.py dev     what the tests and the linters need as well
    python3 scripts/setup_env.py full    and other people's clients, which `make test-full` drives

Called by every make target. A stamp in `.venv` remembers what was installed from which project
files, so that a call with nothing to do takes a moment. Needs nothing but Python's own library.

About torch: on Linux, PyPI's torch comes with several GB of CUDA packages. On a machine without
an NVIDIA driver a CPU build is taken instead: the one pip finds in its configured sources, or else
the one of PyTorch's CPU index, if that can be reached.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = {"demo": "gguf", "dev": "dev", "full": "dev,clients"}
# What is there once a purpose is installed: each needs all that the ones before it need.
COVERS = {"demo": ("demo",), "dev": ("demo", "dev"), "full": ("demo", "dev", "full")}
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 3
# Triton without a GPU only reads kernels; this is the version the tests were run with. A CUDA build
# of torch brings the one that belongs to it.
TRITON_ON_CPU = "triton==3.6.0"


def main() -> None:
    purpose = sys.argv[1] if len(sys.argv) == 2 else ""
    if purpose not in EXTRAS:
        sys.exit(f"usage: setup_env.py {{{'|'.join(EXTRAS)}}}")
    if sys.version_info < (3, 10):  # noqa: UP036  (the first thing to run, whatever Python is there)
        sys.exit(f"Octavo needs Python 3.10 or newer; this is {sys.version.split()[0]}. Try make PYTHON=…")
    wanted = fingerprint()
    if is_done(purpose, wanted):
        return
    if not (VENV / "bin" / "pip").exists():
        say(f"making {VENV.name} with Python {sys.version.split()[0]}")
        make_venv()
    install(purpose)
    for stale in VENV.glob(".octavo-*"):
        stale.unlink()
    for done in COVERS[purpose]:
        stamp(done).write_text(wanted)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def stamp(purpose: str) -> Path:
    return VENV / f".octavo-{purpose}"


def fingerprint() -> str:
    """A hash of everything an installation is made from."""
    sources = ROOT / "octavo" / "kernels" / "cpu"
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", CONSTRAINTS, Path(__file__), sources / "build.py"]
    files += sorted((ROOT / "_build").glob("*.py"))
    files += sorted([*sources.glob("src/*.c"), *sources.glob("src/*.h")])
    digest = hashlib.sha256(sys.version.encode())
    for file in files:
        if file.exists():
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def is_done(purpose: str, wanted: str) -> bool:
    return (
        stamp(purpose).exists()
        and stamp(purpose).read_text() == wanted
        and (VENV / "bin" / "octavo").exists()
    )


def make_venv() -> None:
    """A fresh virtual environment in place of a damaged one or none."""
    if VENV.exists():
        shutil.rmtree(VENV)
    try:
        venv.create(VENV, with_pip=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit("Python's venv module cannot install pip. On Debian: apt-get install python3-venv")


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask the environment's pip something and return what it said, whatever PIP_QUIET is set to."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]
    loud = {name: value for name, value in os.environ.items() if name != "PIP_QUIET"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=loud)


def install(purpose: str) -> None:
    """Install Octavo in place (editable), its C kernels compiled, with one extra."""
    extra_index, build = torch_source()
    say(f"installing octavo[{EXTRAS[purpose]}]; packages not in pip's cache are downloaded")
    say(f"torch: {build}")
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    command += ["-c", str(CONSTRAINTS), *extra_index, "-e", f"{ROOT}[{EXTRAS[purpose]}]"]
    if purpose != "demo" and sys.platform == "linux" and not has_nvidia_driver():
        command.append(TRITON_ON_CPU)
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit("setup: pip failed; its message is above")


def torch_source() -> tuple[list[str], str]:
    """Extra arguments for pip so that it takes the right build of torch, and what that will be."""
    version = next(
        line.split("==")[1].strip()
        for line in CONSTRAINTS.read_text().splitlines()
        if line.startswith("torch==")
    )
    if sys.platform != "linux":
        return [], f"{version} from PyPI"
    if has_nvidia_driver():
        return [], f"{version} with CUDA from PyPI (several GB with the CUDA packages)"
    local = f"{version}+cpu"
    if local in pip("index", "versions", "torch").stdout:
        return [], f"{local} from pip's configured sources (about 0.2 GB)"
    if can_reach(f"{TORCH_CPU_INDEX}/torch/"):
        return ["--extra-index-url", TORCH_CPU_INDEX], f"{local} from {TORCH_CPU_INDEX} (about 0.2 GB)"
    return [], (
        f"{version} from PyPI. There is no NVIDIA driver here, but {TORCH_CPU_INDEX} did not answer "
        f"within {PROBE_SECONDS} s, so this is the CUDA build: several GB"
    )


def has_nvidia_driver() -> bool:
    """True if CUDA could work here: on Linux, or in WSL, where the driver lives elsewhere."""
    places = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")
    return any(os.path.exists(place) for place in places) or shutil.which("nvidia-smi") is not None


def can_reach(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
