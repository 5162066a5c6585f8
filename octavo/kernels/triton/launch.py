"""What every launch needs.

Kernels of one forward are launched as programmatic dependents where the GPU can do that (compute
capability 9.0 and later): a kernel may start while the one before it drains, fetches its weights
into the cache, and only then waits. So every kernel launched this way calls `begin` before it reads
what the launch before wrote, and before it writes anything. A kernel lets the next one start only
after its own wait: whatever is older than the launch before is complete when a kernel starts.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.triton import quick


def one_form(*specialized: str):
    """`triton.jit` for a kernel of which there is one form.

    Triton compiles a kernel anew for a number that is 1 or a multiple of 16, and for a pointer aligned
    to 16 bytes. Here only the named arguments are looked at so: nothing is compiled while serving
    because a step has another number of rows.
    """

    def decorate(kernel):
        names = [
            name
            for name, parameter in inspect.signature(kernel).parameters.items()
            if parameter.annotation not in (tl.constexpr, "tl.constexpr") and name not in specialized
        ]
        return quick.kernel(do_not_specialize=names)(kernel)

    return decorate


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start, and wait until the one before has written everything."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask the second-level cache for the lines that these pointers lie in."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@lru_cache(maxsize=8)
def _can_launch_dependents(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 9


def uses_pdl(tensor: torch.Tensor) -> bool:
    """True where kernels on this tensor's device are launched as programmatic dependents."""
    return tensor.is_cuda and _can_launch_dependents(tensor.device.index or 0)


def pdl_options(pdl: bool) -> dict[str, Any]:
    """Launch options that go with PDL=pdl."""
    return {"launch_pdl": True} if pdl else {}


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact float32; for narrower types there is one precision only."""
    return "ieee" if dtype == torch.float32 else "tf32"
