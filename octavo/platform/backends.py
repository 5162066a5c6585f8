"""Which way to compute attention, and in which dtype, this machine's hardware allows.

The Triton kernels are written for the matrix units of compute capability 8.0 and later. Older GPUs (7.x:
V100, T4) get torch's own operations instead, `sdpa`, and compute in float16 or float32: they have no
bfloat16. Nothing here imports torch; a machine is described by its `Platform`.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import ConfigError
from octavo.platform.hardware import Gpu, Platform

LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class AttentionChoice:
    """What computes attention. `reason`: why it is not Octavo's own kernels, where those were not refused."""

    name: str  # triton, sdpa, cpu or torch
    reason: str | None = None


def why_not_triton(machine: Platform, has_triton: bool) -> str | None:
    """Why the Triton kernels do not run on this machine; None if they do."""
    if machine.device != "cuda":
        return "they run on a GPU only"
    if not has_triton:
        return "the package triton is not installed"
    gpu = machine.gpu
    if gpu is not None and gpu.capability < LEAST_CAPABILITY:
        return f"{_called(gpu)} is older than the 8.0 that they are written for"
    return None


def choose_attention(asked: str, machine: Platform, has_triton: bool) -> AttentionChoice:
    """What computes attention on this machine. `asked`: checked by octavo.config, auto among others.

    `has_triton`: the package is installed. Raises ConfigError for a backend that this machine cannot serve.
    """
    on_gpu, reason = machine.device == "cuda", why_not_triton(machine, has_triton)
    if asked == "triton" and reason is not None:
        other = "; leave it at auto, or say sdpa" if on_gpu else ""
        raise ConfigError(f"attention_backend='triton': the Triton kernels cannot be used: {reason}{other}")
    if asked == "cpu" and on_gpu:
        raise ConfigError("attention_backend='cpu' runs on a CPU only; here: auto, triton, sdpa or torch")
    if asked != "auto":
        return AttentionChoice(asked)
    if not on_gpu:
        return AttentionChoice("cpu")
    return AttentionChoice("triton") if reason is None else AttentionChoice("sdpa", reason)


def choose_dtype(asked: str, checkpoint: str, machine: Platform) -> str:
    """The dtype to compute in: float32, bfloat16 or float16. `asked` may also be "auto" and "half".

    Raises ConfigError for bfloat16 on a GPU that has none; auto takes float16 in its place there.
    """
    dtype, gpu = {"auto": checkpoint, "half": "float16"}.get(asked, asked), machine.gpu
    if dtype != "bfloat16" or gpu is None or has_bfloat16(machine):
        return dtype
    if asked == "auto":
        return "float16"
    raise ConfigError(
        f"dtype='bfloat16': {_called(gpu)} does not compute in bfloat16, which came with 8.0. Set "
        "dtype='float16' (--dtype float16), or 'float32'"
    )


def has_bfloat16(machine: Platform) -> bool:
    """True if the device computes in bfloat16; a CPU does, if slowly on some."""
    return machine.device != "cuda" or machine.gpu is None or machine.gpu.capability >= LEAST_CAPABILITY


def _called(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]})"
