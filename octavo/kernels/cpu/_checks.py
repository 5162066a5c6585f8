"""What every launcher checks before it hands a raw pointer to C.

A wrong shape or a hole in memory would not raise there; it would read somewhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo.kernels.cpu.library import OC_BF16, OC_F32

DTYPE_NUMBER = {torch.float32: OC_F32, torch.bfloat16: OC_BF16}


def dtype_number(dtype: torch.dtype, name: str) -> int:
    """OC_F32 or OC_BF16; ValueError naming the argument for anything else."""
    number = DTYPE_NUMBER.get(dtype)
    if number is None:
        raise ValueError(f"{name} must be float32 or bfloat16, not {dtype}")
    return number


def check(
    tensor: torch.Tensor,
    name: str,
    shape: Sequence[int | None],
    dtype: torch.dtype | None = None,
    rows_only: bool = False,
) -> None:
    """Raise ValueError unless the tensor is on the CPU, contiguous and of this shape and dtype.

    None in the shape stands for any size. With `rows_only` just the last dimension has to be
    contiguous: rows may lie further apart.
    """
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {tensor.device}")
    wanted = list(shape)
    fits = tensor.dim() == len(wanted) and all(
        size is None or size == actual for size, actual in zip(wanted, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {wanted}, not {list(tensor.shape)}")
    if dtype is None:
        dtype_number(tensor.dtype, name)
    elif tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
    dense_rows = tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    if not (dense_rows if rows_only else tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous, not of strides {list(tensor.stride())}")
