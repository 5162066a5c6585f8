"""Everything about this machine that a bug report should say, and nothing that is secret."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform as python_platform
import re
from typing import Any

from octavo.errors import OctavoError
from octavo.platform.backends import choose_attention
from octavo.platform.byte_code import describe_byte_code
from octavo.platform.environment import cache_root
from octavo.platform.hardware import Platform, detect

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "gguf",
    "transformers",
)
_VARIABLES = re.compile(
    r"(OCTAVO|VLLM|OMP|GOMP|KMP|MKL|CUDA|NCCL|HF|TORCH|TOKENIZERS|XDG_CACHE|TRANSFORMERS)(_\w+)?"
)
_SECRET = re.compile(r"TOKEN($|_)|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


class Report(dict[str, Any]):
    """The description as a mapping; as text, one line an entry."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        lines = []
        for name, value in self.items():
            rows = _rows(name, value)
            lines.append(f"{name:{width}}  {rows[0]}")
            lines += [f"{'':{width}}  {row}" for row in rows[1:]]
        return "\n".join(lines)


def describe() -> Report:
    """Versions, CPU, memory, GPUs, kernels, cache and environment, with plain values throughout.

    Nothing in it raises: what cannot be found out is said in its place. Memory is in bytes.
    Variables whose names speak of tokens, keys or passwords are only said to be set.
    """
    try:
        machine = detect()
        gpu_kernels = _gpu_kernels(machine)
    except OctavoError as error:  # a GPU that this torch has no code for
        machine, gpu_kernels = detect("cpu"), f"not available: {error}"
    return Report(
        octavo=_octavo_version(),
        python=f"{python_platform.python_version()} ({python_platform.python_implementation()})",
        system=python_platform.platform(),
        packages={name: _version(name) for name in _PACKAGES},
        device=machine.device,
        dtype_default=machine.dtype_default,
        cpu=machine.cpu_model,
        cores=machine.cores,
        cpu_flags=sorted(machine.cpu_flags),
        total_memory=machine.total_memory,
        available_memory=machine.available_memory,
        gpus=[
            {"name": gpu.name, "capability": f"{gpu.capability[0]}.{gpu.capability[1]}", "memory": gpu.memory}
            for gpu in machine.gpus
        ],
        driver=machine.driver,
        gpu_kernels=gpu_kernels,
        cpu_kernels=_cpu_kernels(),
        cache=str(cache_root()),
        byte_code=describe_byte_code(),
        environment=_environment(),
    )


def _octavo_version() -> str:
    return str(importlib.import_module("octavo").__version__)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_kernels(machine: Platform) -> str | None:
    if machine.device != "cuda":
        return None
    has_triton = importlib.util.find_spec("triton") is not None
    chosen = choose_attention("auto", machine, has_triton)
    return "Triton" if chosen.reason is None else f"torch's own, slower: {chosen.reason}"


def _cpu_kernels() -> str:
    """Which of the C kernels' instruction-set levels run here.

    The one look upwards from this package, by name and not by import: a report must also say that
    the kernels are missing.
    """
    try:
        library = importlib.import_module("octavo.kernels.cpu.library")
        levels = ", ".join(library.available_isas())
        return f"built; levels {levels}{' and amx' if library.has_amx_bf16() else ''}"
    except (ImportError, AttributeError, OSError, OctavoError) as error:
        return f"not available: {error}"


def _environment() -> dict[str, str]:
    found = {}
    for name in sorted(os.environ):
        if not _VARIABLES.fullmatch(name):
            continue
        # TOKENIZERS_… is no secret; a token of HF's is.
        hidden = _SECRET.search(name) and not name.startswith("TOKENIZERS_")
        found[name] = "(set)" if hidden else _USER_IN_URL.sub("", os.environ[name])
    return found


def _rows(name: str, value: Any) -> list[str]:
    """An entry's lines: a mapping and a list of mappings take one each."""
    if name.endswith("_memory"):
        return [_plain("memory", value)]
    if isinstance(value, dict):
        return [f"{key} {'-' if entry is None else entry}" for key, entry in value.items()] or ["-"]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [", ".join(f"{key} {_plain(key, entry)}" for key, entry in each.items()) for each in value]
    if isinstance(value, list):
        return [" ".join(map(str, value)) or "-"]
    return ["-" if value is None else str(value)]


def _plain(name: str, value: Any) -> str:
    return f"{value / 2**30:.1f} GiB" if name == "memory" else str(value)
