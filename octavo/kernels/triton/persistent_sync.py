"""How the programs of a persistent kernel wait for one another.

The programs of one launch, one for each multiprocessor, are all resident at once, so they may wait for
each other. A phase of the work has a counter: each program that had a share in it adds one when it is
done, and whoever reads what the phase wrote waits until the counter holds them all. What was written
before `arrive` is seen after `wait` by every thread of the program, whichever multiprocessor wrote it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

_SPIN = tl.constexpr("""
{
    .reg .pred again;
    .reg .u32 seen;
    mov.u32 seen, %tid.x;
    setp.ne.u32 again, seen, 0;
    @again bra ARRIVED;
LOOK:
    ld.acquire.gpu.global.u32 seen, [$1];
    setp.lt.u32 again, seen, $2;
    @again bra LOOK;
ARRIVED:
    mov.u32 $0, 0;
}
""")


@triton.jit
def wait(counter_ptr, arrivals, SPINS: tl.constexpr):
    """Go on when so many programs have arrived. Without SPINS there is one program: it has."""
    if SPINS:
        tl.inline_asm_elementwise(
            _SPIN, "=r,l,r", [counter_ptr.to(tl.int64), arrivals], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.debug_barrier()


@triton.jit
def arrive(counter_ptr):
    """This program has written its share."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def leave(exit_ptr, counters_ptr, num_counters, PROGRAMS: tl.constexpr, COUNTERS: tl.constexpr):
    """The last program to leave makes the counters zero again: nobody waits any more."""
    if tl.atomic_add(exit_ptr, 1, sem="acq_rel") == PROGRAMS - 1:
        c = tl.arange(0, COUNTERS)
        tl.store(counters_ptr + c, tl.zeros((COUNTERS,), dtype=tl.int32), mask=c < num_counters)
        tl.store(exit_ptr, 0)
