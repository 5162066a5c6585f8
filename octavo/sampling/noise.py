"""The noise of the draw: a pure function of (seed, position, token id), so that no state is kept.

Because a draw depends on nothing else, a request gets the same tokens alone, in a batch, after a
preemption, and with or without speculation; and a draft model that uses the same noise on its own
logits often draws the token that the target will draw.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as
1, 2, 3", SC 2011):

    key     = (low, high) 32-bit words of the seed
    counter = (token_id // 4, position, stream, 0)
    word    = output[token_id % 4]

with `position` the absolute position of the drawn token in prompt + output. A word w becomes a
standard exponential E = -log1p(-(w + 0.5) * 2**-32), and a token's score is logit/T - log E: the
greatest one is a draw from the softmax (Gumbel-max). Only the smallest E matter for who wins;
formed this way they keep full relative precision, which -log(u) with u near 1 would not.

Integers are equal on every backend. This torch form emulates 32-bit arithmetic in int64 and works
out logarithms in float64: it is the reference of the kernels, not a fast path.
"""

from __future__ import annotations

from enum import IntEnum

import torch

_MASK32 = 0xFFFF_FFFF
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_KEY_STEPS = (0x9E37_79B9, 0xBB67_AE85)
_ROUNDS = 10

# -log E lies within [-3.131, 22.875], whatever the word. So a token whose logit/T is further than
# this below the greatest one cannot be drawn, and its noise need not be computed.
NOISE_SPAN = 26.1


class Stream(IntEnum):
    """Third counter word: keeps noise of different purposes apart."""

    DRAW = 0  # shared by target and draft, on purpose
    REJECTION = 1  # coins of rejection sampling
    SYNTHETIC = 2  # coins of synthetic acceptance, in benchmarks
    RESIDUAL = 3  # draws of rejection sampling: the draft it refuses was drawn with DRAW


Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[int | torch.Tensor, int | torch.Tensor]) -> Words:
    """Philox4x32-10 of a batch of counters; every tensor int64 [n] with values in [0, 2**32)."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, and an arithmetic shift then masked still gives the true high word
        first = x0 * _MULTIPLIERS[0]
        second = x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((second >> 32) & _MASK32) ^ x1 ^ k0,
            second & _MASK32,
            ((first >> 32) & _MASK32) ^ x3 ^ k1,
            first & _MASK32,
        )
        k0 = (k0 + _KEY_STEPS[0]) & _MASK32
        k1 = (k1 + _KEY_STEPS[1]) & _MASK32
    return x0, x1, x2, x3


def noise_words(
    seed: int, position: int, token_ids: torch.Tensor, stream: Stream = Stream.DRAW
) -> torch.Tensor:
    """The 32-bit words of some tokens at one position, as int64 [n].

    `seed` may be given unsigned or as signed 64-bit bits. `token_ids` is int64 [n]; ascending ids
    are cheapest, because four neighbours share one evaluation.
    """
    blocks, place = torch.unique_consecutive(token_ids >> 2, return_inverse=True)
    counter = (
        blocks,
        torch.full_like(blocks, position & _MASK32),
        torch.full_like(blocks, int(stream)),
        torch.zeros_like(blocks),
    )
    words = torch.stack(philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32)))  # [4, blocks]
    return words[token_ids & 3, place]


def exponentials(words: torch.Tensor) -> torch.Tensor:
    """Standard exponentials of 32-bit words, float64 of the same shape; never 0 and never infinite."""
    return -torch.log1p(-(words.double() + 0.5) * 2.0**-32)


def uniforms(seed: int | torch.Tensor, positions: torch.Tensor, stream: Stream) -> torch.Tensor:
    """One number a position, float32 of the same shape as positions [n] int64, never 0 and never 1.

    seed: of all of them, or int64 [n]. What a number is made of: the upper 23 bits of the word of token
    0, and a half. So it is exact in float32, and the same everywhere.
    """
    zeros = torch.zeros_like(positions)
    counter = (zeros, positions & _MASK32, torch.full_like(positions, int(stream)), zeros)
    words = philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))[0]
    return ((words >> 9).double() + 0.5).mul_(2.0**-23).float()


def signed_bits(seed: int) -> int:
    """A 64-bit seed as the signed integer with the same bits, as int64 tensors hold it."""
    seed &= 0xFFFF_FFFF_FFFF_FFFF
    return seed - 2**64 if seed >= 2**63 else seed
