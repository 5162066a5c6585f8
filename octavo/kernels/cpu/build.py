"""Builds the C kernels of `src/` into one shared library, next to this file.

For the project file:

    [build-system]
    requires = ["setuptools>=77"]
    build-backend = "backend"
    backend-path = ["_build"]

    [tool.setuptools.package-data]
    octavo = ["kernels/cpu/src/*.c", "kernels/cpu/src/*.h", "kernels/cpu/*.so", "kernels/cpu/*.dylib"]

`_build/backend.py` is setuptools with two additions: it calls `build` below before a wheel or an
editable install is made, and it asks for the PyPI package `ziglang` (a C compiler in a wheel) only
where no system compiler is found. `setup.py` marks the wheel as belonging to a platform, but to no
Python version. Ignore in git: `octavo/kernels/cpu/*.so`, `octavo/kernels/cpu/*.dylib`. By hand:
`python -m octavo.kernels.cpu.build`.

Each source file is compiled once for every instruction-set level (`src/octavo_cpu.h` says how the
levels share one library), unless its first line is `// octavo: built once`. A file dropped into
`src/` is picked up without being named anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
BUILT_ONCE = "// octavo: built once"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS: dict[str, list[str]] = {
    "scalar": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}
COMMON_FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Werror=implicit-function-declaration",
]


class BuildError(Exception):
    """The kernels could not be compiled; the message holds the compiler's own words."""


def library_name() -> str:
    """The file name of the library on this platform."""
    return "liboctavo_cpu.dylib" if sys.platform == "darwin" else "liboctavo_cpu.so"


def system_compiler() -> list[str] | None:
    """What CC names, or the first C compiler on PATH, as the start of a command line."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    for name in ("gcc", "cc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    return None


def find_compiler() -> list[str]:
    """A system compiler, or else the one in the package `ziglang`."""
    found = system_compiler()
    if found:
        return found
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise BuildError(
        "no C compiler: gcc, cc and clang are not on PATH and the package ziglang is not installed. "
        "Install one of them (`pip install ziglang` is enough)."
    )


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _baseline_flags(compiler: list[str]) -> list[str]:
    """zig compiles for the machine it runs on unless told otherwise; the others for the baseline."""
    if "ziglang" in compiler or Path(compiler[0]).name.startswith("zig"):
        return ["-mcpu=baseline", "-fno-sanitize=undefined"]
    return []


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    if result.stderr.strip():
        print(result.stderr, file=sys.stderr)


def build(output_dir: Path, compiler: list[str] | None = None) -> Path:
    """Compile all of `src/` and put the library into `output_dir`; its path is returned.

    Raises BuildError when there is no compiler or it fails. The library appears in one move, so a
    reader never sees half of it.
    """
    command = compiler if compiler is not None else find_compiler()
    flags = [*COMMON_FLAGS, *_baseline_flags(command)]
    levels = LEVELS if _is_x86() else {"scalar": []}
    with tempfile.TemporaryDirectory(prefix="octavo-build-") as folder:
        jobs: list[list[str]] = []
        objects: list[str] = []

        def add(source: Path, suffix: str, extra: list[str]) -> None:
            target = str(Path(folder) / f"{source.stem}{suffix}.o")
            jobs.append([*command, *flags, *extra, "-c", str(source), "-o", target])
            objects.append(target)

        for source in sorted(SOURCES.glob("*.c")):
            with source.open(encoding="utf-8") as file:
                once = file.readline().startswith(BUILT_ONCE)
            if once:
                add(source, "", [])
                continue
            for number, (level, extra) in enumerate(levels.items()):
                add(source, f"-{level}", [f"-DOC_ISA={level}", f"-DOC_LEVEL={number}", *extra])
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as workers:
            list(workers.map(_run, jobs))
        linked = Path(folder) / library_name()
        strip = [] if sys.platform == "darwin" else ["-s"]
        _run([*command, "-shared", "-pthread", *strip, *objects, "-o", str(linked), "-lm"])
        output_dir.mkdir(parents=True, exist_ok=True)
        final = output_dir / library_name()
        partial = output_dir / (library_name() + f".{os.getpid()}")
        shutil.copy2(linked, partial)
        os.replace(partial, final)
    return final


def main() -> None:
    """`python -m octavo.kernels.cpu.build [folder]`"""
    parser = argparse.ArgumentParser(prog="python -m octavo.kernels.cpu.build", description=build.__doc__)
    parser.add_argument("output_dir", nargs="?", type=Path, default=Path(__file__).parent)
    try:
        print(build(parser.parse_args().output_dir))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
