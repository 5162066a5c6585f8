"""The only place that asks which hardware this is.

`detect` gives a frozen description of the machine; every later decision (device, dtype, threads,
memory plan) is made from it and can be tested by handing in another one.

    backends      which attention, and which dtype, this hardware allows
    hardware      cores, memory, instruction sets, GPUs: what this process may use
    cgroup        the limits of containers and batch systems
    byte_code     that of packages which have none, kept between starts
    head_start    what a start does while torch is being imported
    environment   variables that must be set before torch is imported; where the cache lies
    bandwidth     how fast main memory is read
    process       the operating system's view of our own processes
    energy        joules, from the hardware's counters
    report        all of it, for `octavo env` and for bug reports
"""

from __future__ import annotations

from octavo.platform.backends import (
    AttentionChoice,
    choose_attention,
    choose_dtype,
    has_bfloat16,
    why_not_triton,
)
from octavo.platform.bandwidth import memory_bandwidth_probe
from octavo.platform.environment import cache_root, prepare_environment
from octavo.platform.hardware import (
    Gpu,
    Platform,
    cpu_flags,
    cpu_model,
    detect,
    gpu_memory,
    memory,
    usable_cores,
)
from octavo.platform.report import describe

__all__ = [
    "AttentionChoice",
    "Gpu",
    "Platform",
    "cache_root",
    "choose_attention",
    "choose_dtype",
    "cpu_flags",
    "cpu_model",
    "describe",
    "detect",
    "gpu_memory",
    "has_bfloat16",
    "memory",
    "memory_bandwidth_probe",
    "prepare_environment",
    "usable_cores",
    "why_not_triton",
]
