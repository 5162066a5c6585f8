"""What this process may use of the machine: cores, memory, instruction sets, GPUs.

What counts is the share of this process: cores by affinity and cgroup quota, memory by cgroup
limit, not what the board has.

Linux is read from /proc and /sys. macOS answers through sysctl and vm_stat; that part is untested.
torch is imported only by the functions that ask about a GPU.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError
from octavo.platform.cgroup import cpu_quota, memory_limit

DEVICES = ("auto", "cpu", "cuda")

# Of the many flags of a CPU, those that a kernel is chosen by.
_X86_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
_NEWER_X86_FLAGS = ("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
_ARM_FLAGS = ("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2")
_FLAGS_THAT_MATTER = frozenset((*_X86_FLAGS, *_NEWER_X86_FLAGS, *_ARM_FLAGS))
# macOS writes avx512 flags without the underscore, and others with dots.
_SYSCTL_FLAGS = (
    "hw.optional.avx2_0",
    "hw.optional.avx512f",
    "hw.optional.arm.FEAT_BF16",
    "hw.optional.arm.FEAT_I8MM",
)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device, as torch sees it."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int  # bytes


@dataclass(frozen=True)
class Platform:
    """The machine as far as this process may use it. Memory in bytes."""

    device: str  # "cpu" or "cuda"
    dtype_default: str  # for checkpoints that name none
    cores: int
    total_memory: int
    available_memory: int
    cpu_model: str
    cpu_flags: frozenset[str]
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None

    @property
    def threads(self) -> int:
        """Threads to compute with on a CPU: the usable cores, or OMP_NUM_THREADS if that is fewer."""
        asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        return min(self.cores, int(asked)) if asked.isdigit() and int(asked) > 0 else self.cores

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that is used when one is enough."""
        return self.gpus[0] if self.gpus else None


def detect(device: str = "auto") -> Platform:
    """Describe this machine for the device asked for; "auto" takes a GPU where there is one.

    Raises ConfigError for another device, for "cuda" where torch finds no GPU, and for a GPU that this torch
    holds no code for.
    """
    if device not in DEVICES:
        raise ConfigError(f"device={device!r} is unknown; choose one of {', '.join(DEVICES)}.")
    gpus = () if device == "cpu" else _gpus()
    if device == "cuda" and not gpus:
        raise ConfigError(
            f"device='cuda' was asked for, but {_why_no_gpu()}.\n"
            "Use device='cpu' (or 'auto'), or make a GPU visible."
        )
    for gpu in gpus:
        if (reason := _why_no_code_for(gpu)) is not None:
            raise ConfigError(f"{reason}.\nInstall a torch that was built for it, or use device='cpu'.")
    flags = cpu_flags()
    total, available = memory()
    return Platform(
        device="cuda" if gpus else "cpu",
        dtype_default=_default_dtype(gpus, flags),
        cores=usable_cores(),
        total_memory=total,
        available_memory=available,
        cpu_model=cpu_model(),
        cpu_flags=flags,
        gpus=gpus,
        driver=_driver_version() if gpus else None,
    )


def usable_cores() -> int:
    """Logical cores this process may use: its affinity, capped by the cgroup's CPU quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = cpu_quota()
    # Rounded down: a thread more than the quota pays for is stopped in the middle of a step.
    return max(1, cores if quota is None else min(cores, math.floor(quota)))


def memory() -> tuple[int, int]:
    """(total, available) main memory in bytes, both within the cgroup's limit."""
    if sys.platform == "darwin":
        total, available = _darwin_memory()
    else:
        fields = _meminfo()
        total = fields["MemTotal"]
        available = fields.get("MemAvailable", fields["MemFree"])
    limit = memory_limit()
    if limit is not None:
        total = min(total, limit.limit)
        available = min(available, max(0, limit.limit - limit.used))
    return total, available


def gpu_memory(index: int = 0) -> tuple[int, int]:
    """(free, total) memory of a CUDA device in bytes. Creates torch's context on it."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return int(free), int(total)


def cpu_model() -> str:
    """The CPU's name as its maker writes it."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or "unknown"
    info = _cpuinfo()
    return info.get("model name") or info.get("Model") or info.get("CPU part") or "unknown"


def cpu_flags() -> frozenset[str]:
    """The instruction sets that kernels are chosen by, in Linux's spelling."""
    if sys.platform == "darwin":
        found = {name.rsplit(".", 1)[1].removesuffix("_0") for name in _SYSCTL_FLAGS if _sysctl(name) == "1"}
        names = {"FEAT_BF16": "bf16", "FEAT_I8MM": "i8mm"}
        return frozenset(names.get(name, name) for name in found)
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split()) & _FLAGS_THAT_MATTER


def _default_dtype(gpus: tuple[Gpu, ...], flags: frozenset[str]) -> str:
    if gpus:
        return "bfloat16" if all(gpu.capability >= (8, 0) for gpu in gpus) else "float16"
    # Below AVX-512 (or Arm's bf16) torch's bfloat16 products are emulated, and slow.
    return "bfloat16" if flags & {"avx512bw", "avx512_bf16", "amx_bf16", "bf16"} else "float32"


def _gpus() -> tuple[Gpu, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (int(properties.major), int(properties.minor))
        found.append(Gpu(index, str(properties.name), capability, int(properties.total_memory)))
    return tuple(found)


def _why_no_code_for(gpu: Gpu) -> str | None:
    """Newer builds of torch leave older GPUs out, and each call would fail there; None: it has code."""
    import torch

    built_for = torch.cuda.get_arch_list()  # "sm_90": machine code, "compute_90": code that is compiled on
    for name in built_for:
        kind, _, number = name.partition("_")
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not digits.isdigit():
            return None  # no CUDA: its own names
        major, minor = divmod(int(digits), 10)
        if kind == "sm" and major == gpu.capability[0] and minor <= gpu.capability[1]:
            return None
        if kind == "compute" and (major, minor) <= gpu.capability:
            return None
    if not built_for:
        return None
    return (
        f"this torch ({torch.__version__}) has no code for {gpu.name} (compute capability "
        f"{gpu.capability[0]}.{gpu.capability[1]}), only for {', '.join(built_for)}"
    )


def _why_no_gpu() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"this torch ({torch.__version__}) is built for CPUs only"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"torch finds no GPU (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r})"
    return "torch finds no GPU"


def _driver_version() -> str | None:
    """The NVIDIA driver's version, from the kernel module's own report."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
    versions = [word for word in first.split() if word[0].isdigit() and word.count(".") >= 1]
    return versions[0] if versions else None


def _meminfo() -> dict[str, int]:
    fields = {}
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * (1024 if rest.endswith("kB") else 1)
    return fields


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return fields
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _darwin_memory() -> tuple[int, int]:
    total = int(_sysctl("hw.memsize") or 0)
    page, free = 4096, 0
    try:
        report = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return total, total // 2
    for line in report.splitlines():
        name, _, value = line.partition(":")
        if "page size of" in line:
            page = int(line.split("page size of")[1].split()[0])
        elif name in ("Pages free", "Pages inactive", "Pages speculative"):
            free += int(value.strip().rstrip("."))
    return total, free * page


def _sysctl(name: str) -> str | None:
    try:
        result: Any = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
