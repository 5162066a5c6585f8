"""The build backend: setuptools, and the C kernels of octavo/kernels/cpu.

A wheel and an editable install both end with the compiled library beside its sources, in
`octavo/kernels/cpu/`. The compiler is the system's; only where there is none is the PyPI package
`ziglang` asked for, which brings one. A source distribution needs no compiler.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

KERNELS = Path(__file__).resolve().parent.parent / "octavo" / "kernels" / "cpu"
ZIG = "ziglang>=0.13,<0.17"

Settings = dict[str, Any] | None


def _kernel_builder() -> ModuleType:
    """octavo/kernels/cpu/build.py by its path: the package itself need not be importable here."""
    spec = importlib.util.spec_from_file_location("octavo_kernel_build", KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiler_requirement() -> list[str]:
    return [] if _kernel_builder().system_compiler() else [ZIG]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler_requirement()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler_requirement()]


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _kernel_builder().build(KERNELS)
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _kernel_builder().build(KERNELS)
    return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))
