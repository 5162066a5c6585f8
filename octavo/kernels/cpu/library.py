"""Loads the C kernels and says which instruction-set levels this machine can run.

One shared library holds every level (`src/octavo_cpu.h`); a `CpuLibrary` is the view of one level.
Functions are called through ctypes with raw pointers, which releases the GIL for the time of the
call. The thread pool belongs to the library and is the same for all levels.

When the library was not built, `load` raises `CpuLibraryError`; callers then take their torch path
and say so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

ISAS = ("scalar", "avx2", "avx512", "avx512bf16")  # the numbers of OC_LEVEL_*

# The data types of the kernels' arguments (OC_F32, OC_BF16).
OC_F32 = 0
OC_BF16 = 1


class CpuLibraryError(OctavoError):
    """The CPU kernels are not there or do not fit this machine."""


class Step(ctypes.Structure):
    """`oc_step`: the ragged batch of one step."""

    _fields_ = (
        ("query_start_loc", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("slot_mapping", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("num_reqs", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
    )


class AttnSpec(ctypes.Structure):
    """`oc_attn_spec`: what a layer's attention is."""

    _fields_ = (
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("sliding_window", ctypes.c_int32),
        ("soft_cap", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )


class CpuLibrary:
    """The kernels at one instruction-set level."""

    def __init__(self, shared: ctypes.CDLL, isa: str) -> None:
        self.isa = isa
        self._shared = shared

    def function(self, name: str, restype: Any, argtypes: Sequence[Any]) -> Callable[..., Any]:
        """The C function `name` of this level, with its signature declared."""
        pointer = _symbol(self._shared, f"{name}__{self.isa}")
        pointer.restype = restype
        pointer.argtypes = list(argtypes)
        return pointer  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"CpuLibrary(isa={self.isa!r})"


@cache
def _shared_library() -> ctypes.CDLL:
    from octavo.kernels.cpu.build import library_name

    path = Path(__file__).parent / library_name()
    if not path.exists():
        raise CpuLibraryError(
            f"the CPU kernels were not built: {path.name} is missing. Build them with "
            "`python -m octavo.kernels.cpu.build` (needs gcc, clang or the package ziglang)."
        )
    try:
        shared = ctypes.CDLL(str(path))
    except OSError as error:
        raise CpuLibraryError(
            f"the CPU kernels cannot be loaded ({error}). Build them again with "
            "`python -m octavo.kernels.cpu.build`."
        ) from error
    for name in ("oc_cpu_level", "oc_cpu_has_amx_bf16"):
        getattr(shared, name).restype = ctypes.c_int32
    return shared


def _symbol(shared: ctypes.CDLL, name: str) -> Any:
    try:
        return getattr(shared, name)
    except AttributeError:
        raise CpuLibraryError(
            f"the CPU kernels are older than this code: {name} is missing. Build them again with "
            "`python -m octavo.kernels.cpu.build`."
        ) from None


def shared_function(name: str, argtypes: Sequence[Any], restype: Any = None) -> Callable[..., Any]:
    """A C function that is built once and serves every level."""
    pointer = _symbol(_shared_library(), name)
    pointer.restype = restype
    pointer.argtypes = list(argtypes)
    return pointer  # type: ignore[no-any-return]


def available_isas() -> list[str]:
    """The levels this machine can run, slowest first."""
    return list(ISAS[: _shared_library().oc_cpu_level() + 1])


def has_amx_bf16() -> bool:
    """Whether the processor multiplies bf16 tiles (Intel AMX) and the system allows it."""
    return bool(_shared_library().oc_cpu_has_amx_bf16())


@cache
def load(isa: str | None = None) -> CpuLibrary:
    """The kernels at level `isa`, by default the best one of this machine.

    Raises CpuLibraryError if they were not built or the machine cannot run that level.
    """
    available = available_isas()
    if isa is None:
        return load(available[-1])
    if isa not in available:
        raise CpuLibraryError(
            f"this machine cannot run the CPU kernels' level {isa!r}; it can run {available}"
        )
    return CpuLibrary(_shared_library(), isa)


def set_num_threads(threads: int) -> None:
    """How many threads the kernels use, the calling one included."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    _shared_library().oc_set_num_threads(ctypes.c_int(threads))


def num_threads() -> int:
    """How many threads the kernels use; 1 until `set_num_threads` was called."""
    return int(_shared_library().oc_num_threads())
