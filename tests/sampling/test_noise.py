"""The noise: published Philox vectors, exponentials to the last bit, and independence."""

from __future__ import annotations

from decimal import Decimal, getcontext

import pytest
import torch

from octavo.sampling.noise import NOISE_SPAN, Stream, exponentials, noise_words, philox4x32, signed_bits

MASK = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    words = philox4x32((c0, c1, c2, c3), key)
    assert tuple(int(word) for word in words) == expected


def philox_python(counter: list[int], key: list[int]) -> list[int]:
    """A second form in plain integers, written from the paper's figure."""
    x, k = list(counter), list(key)
    for _ in range(10):
        first, second = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(second >> 32) ^ x[1] ^ k[0], second & MASK, (first >> 32) ^ x[3] ^ k[1], first & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return x


@pytest.mark.parametrize("seed", [0, 1, 0xDEADBEEF_12345678, 2**64 - 1])
@pytest.mark.parametrize("stream", list(Stream))
def test_words_of_tokens_are_where_the_definition_puts_them(seed: int, stream: Stream) -> None:
    ids = [0, 1, 2, 3, 4, 7, 49151, 49150, 5, 5]
    for position in (0, 1, 131071):
        found = noise_words(signed_bits(seed), position, torch.tensor(ids), stream).tolist()
        for token, word in zip(ids, found, strict=True):
            block = philox_python([token // 4, position, int(stream), 0], [seed & MASK, seed >> 32])
            assert word == block[token % 4]
        assert found == noise_words(seed, position, torch.tensor(ids), stream).tolist()


def test_small_exponentials_keep_their_relative_precision() -> None:
    getcontext().prec = 60
    words = [0, 1, 2, 3, 1000, 2**16 + 1, 2**31, 2**32 - 2, 2**32 - 1]
    found = exponentials(torch.tensor(words)).tolist()
    for word, value in zip(words, found, strict=True):
        exact = -(1 - (Decimal(word) + Decimal("0.5")) / 2**32).ln()
        assert abs(Decimal(value) - exact) < exact * Decimal(2) ** -50
        assert value > 0


def test_the_span_of_the_noise_is_covered() -> None:
    noise = -exponentials(torch.tensor([0, 2**32 - 1])).log()
    assert NOISE_SPAN - 0.2 < float(noise[0] - noise[1]) < NOISE_SPAN


def test_noise_is_exponential_and_uncorrelated() -> None:
    ids = torch.arange(50_000)
    rows = torch.stack([exponentials(noise_words(7, position, ids)) for position in range(8)])
    assert float(rows.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(rows.var()) == pytest.approx(1.0, abs=0.03)
    others = torch.stack(
        [
            exponentials(noise_words(7, 0, ids, Stream.REJECTION)),
            exponentials(noise_words(8, 0, ids)),
            exponentials(noise_words(7 + 2**32, 0, ids)),
        ]
    )
    everything = torch.cat((rows, others)) - 1.0
    correlation = everything @ everything.T / everything.shape[1]
    correlation.fill_diagonal_(0.0)
    assert float(correlation.abs().max()) < 0.03
