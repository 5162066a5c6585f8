"""One way to derive a 64-bit seed from another one and an index.

Child i of a request with n > 1 has seed `mix64(seed, i)`; a request without a seed gets
`mix64(engine seed, arrival index)`. Nothing is ever *added* to a seed: with addition, child 1 of
seed 7 would be child 0 of seed 8, and two users who count their seeds up would read one another's
samples.
"""

from __future__ import annotations

MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = 0x9E37_79B9_7F4A_7C15


def _finalise(z: int) -> int:
    """The bijective output function of SplitMix64 (Steele, Lea, Flood: OOPSLA 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & MASK64
    return z ^ (z >> 31)


def mix64(seed: int, i: int) -> int:
    """Seed number `i` of the family of `seed`, in [0, 2**64).

    It is output i of SplitMix64, started from the finalised seed: a bijection in `seed` for a fixed
    `i`, and in `i` for a fixed `seed`. Both are taken modulo 2**64. For seed 0 this is the published
    SplitMix64 sequence.
    """
    return _finalise((_finalise(seed & MASK64) + (i + 1) * _GOLDEN) & MASK64)


def fold_seed(seed: int) -> int:
    """Any integer as an unsigned 64-bit seed (modulo 2**64)."""
    return seed & MASK64
