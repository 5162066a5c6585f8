"""The sampling kernels against numpy in float64, and their integers against the published vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from octavo.kernels.cpu import sample
from octavo.kernels.cpu.library import CpuLibrary, available_isas, load, set_num_threads

F = np.float32


@pytest.fixture(params=available_isas())
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return load(request.param)


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Iterator[None]:
    set_num_threads(1)
    yield
    set_num_threads(1)


@dataclass(frozen=True)
class Params:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def draw(
    logits: torch.Tensor,
    params: Params | list[Params],
    seeds: list[int],
    positions: list[int],
    library: CpuLibrary,
    stream: int = 0,
) -> torch.Tensor:
    rows = params if isinstance(params, list) else [params] * len(seeds)
    return sample.sample_rows(
        logits.expand(len(seeds), -1),
        torch.tensor([p.temperature for p in rows]),
        torch.tensor([p.top_k for p in rows], dtype=torch.int32),
        torch.tensor([p.top_p for p in rows]),
        torch.tensor([p.min_p for p in rows]),
        torch.tensor(seeds),
        torch.tensor(positions),
        stream,
        library=library,
    )


# ---- noise -------------------------------------------------------------------------------------------


def numpy_philox(counter: tuple[np.ndarray, int, int, int], key: int) -> list[np.ndarray]:
    """Philox4x32-10 of many counters that differ in their first word; four arrays of uint32."""
    mask = np.uint64(0xFFFFFFFF)
    first = np.asarray(counter[0], dtype=np.uint64)
    c = [first, *(np.full_like(first, word) for word in counter[1:])]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        left, right = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (right >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            right & mask,
            (left >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            left & mask,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return [word.astype(np.uint32) for word in c]


def numpy_words(seed: int, position: int, vocab: int, stream: int = 0) -> np.ndarray:
    blocks = np.arange(-(-vocab // 4))
    words = numpy_philox((blocks, position & 0xFFFFFFFF, stream, position >> 32), seed)
    return np.stack(words, axis=1).reshape(-1)[:vocab]


def numpy_log(x: np.ndarray) -> np.ndarray:
    """The logarithm of noise.h, operation by operation in float32."""
    bits = x.view(np.int32)
    e = (bits - np.int32(0x3F3504F3)) >> 23
    f = (bits - (e << 23)).view(F) - F(1)
    z = f * f
    p = np.full_like(f, 7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
              2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1):  # fmt: skip
        p = p * f + F(c)
    p = (p * f) * z
    p = p + e.astype(F) * F(-2.12194440e-4)
    p = p - z * F(0.5)
    return np.asarray((f + p) + e.astype(F) * F(0.693359375), dtype=F)


def numpy_exponentials(words: np.ndarray) -> np.ndarray:
    """The noise of noise.h, operation by operation in float32."""
    high = words >= 2**31
    near = np.where(high, ~words, words).astype(F)
    u = near * F(2.0**-32) + F(2.0**-33)
    rest = F(1) - u
    y = np.where(high, u, rest)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(high, F(1), u / (F(1) - rest))
        return np.where(y == 1, u, -(numpy_log(y) * ratio)).astype(F)


def test_philox_gives_the_published_vectors(library: CpuLibrary) -> None:
    """Random123's known answers for philox4x32, 10 rounds."""
    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0, 0, 0), 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ((ones,) * 4, ones << 32 | ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0 << 32 | 0xA4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in vectors:
        assert sample.philox(counter, key, library=library) == expected


@pytest.mark.parametrize("vocab", [1, 5, 64, 203, 100_000])
def test_noise_is_the_documented_one_bit_for_bit(library: CpuLibrary, vocab: int) -> None:
    for seed, position, stream in ((0, 0, 0), (2**64 - 3, 12345, 2), (7 << 40, 2**32 + 5, 1)):
        noise = sample.exponentials(seed, position, vocab, stream, library=library).numpy()
        words = numpy_words(seed, position, vocab, stream)
        assert np.array_equal(noise, numpy_exponentials(words))
        exact = -np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32)
        assert np.abs(noise / exact - 1).max() < 4e-7


def test_the_documented_noise_is_precise_at_its_ends() -> None:
    words = np.array([0, 1, 2, 100, 2**20, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    exact = -np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32)
    noise = numpy_exponentials(words)
    assert np.abs(noise / exact - 1).max() < 4e-7
    gumbel = -numpy_log(noise)
    assert gumbel.max() < 22.875
    assert gumbel.min() > -3.15


# ---- which tokens are kept ------------------------------------------------------------------------------


def kept_by_sorting(logits: np.ndarray, params: Params) -> np.ndarray:
    """Ids kept, from a full sort in float64."""
    order = np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))
    order = order[logits[order] > -np.inf]
    if params.top_k > 0:
        order = order[: params.top_k]
    z = logits / F(params.temperature)
    weights = np.exp((z[order] - z[order[0]]).astype(np.float64))
    if params.top_p < 1:
        sums = np.cumsum(weights) / weights.sum()
        order = order[: int(np.searchsorted(sums, float(F(params.top_p)))) + 1]
    if params.min_p > 0:
        order = order[z[order] - z[order[0]] >= F(np.log(float(F(params.min_p))))]
    return order


@cache
def numpy_gumbel(seed: int, position: int, vocab: int) -> np.ndarray:
    return -numpy_log(numpy_exponentials(numpy_words(seed, position, vocab)))


def expected_token(logits: np.ndarray, kept: np.ndarray, params: Params, noise: np.ndarray) -> int:
    score = logits / F(params.temperature) + noise
    masked = np.full_like(score, -np.inf)
    masked[kept] = score[kept]
    return int(masked.argmax())


FILTERS = [
    Params(),
    Params(0.7, min_p=0.05),
    Params(1.3, top_k=1),
    Params(0.8, top_k=7),
    Params(2.0, top_k=400),
    Params(1.0, top_p=0.9),
    Params(1.0, top_p=0.0),
    Params(5.0, top_p=0.999),
    Params(50.0, top_p=0.5),
    Params(0.6, top_k=40, top_p=0.8),
    Params(3.0, top_k=500, top_p=0.95, min_p=0.01),
    Params(1.0, top_k=10**9, top_p=1.0, min_p=1.0),
]


def rows_of_logits() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(5003, generator=generator) * 3
    masked = torch.full((1500,), float("-inf"))
    masked[[3, 700, 701, 1499]] = torch.tensor([1.0, 2.0, 2.0, -3.0])
    return {
        "normal": normal,
        "coarse, many ties": (normal[:2500] * 2).round() / 2,
        "all equal": torch.zeros(900),
        "mostly masked": masked,
        "tiny": torch.tensor([0.5, 0.25, 0.5, -1.0, 0.5]),
        "one": torch.tensor([-3.0]),
        "large": torch.randn(40_000, generator=generator) * 2 + 100,
    }


@pytest.mark.parametrize("params", FILTERS)
@pytest.mark.parametrize("name", list(rows_of_logits()))
def test_tokens_are_those_of_a_full_sort(library: CpuLibrary, name: str, params: Params) -> None:
    logits = rows_of_logits()[name]
    array = logits.numpy()
    kept = kept_by_sorting(array, params)
    draws = 12 if len(array) > 10_000 else 60
    seeds = [2**61 + 977 * i for i in range(draws)]
    positions = list(range(draws))
    tokens = draw(logits, params, seeds, positions, library).tolist()
    for seed, position, token in zip(seeds, positions, tokens, strict=True):
        assert token == expected_token(array, kept, params, numpy_gumbel(seed, position, len(array)))


@pytest.mark.parametrize(
    ("params", "size"),
    [
        (Params(top_k=37), 37),
        (Params(top_p=0.25), 50),
        (Params(top_k=80, top_p=0.125), 10),
        (Params(min_p=1.0), 200),
    ],
)
def test_of_equal_logits_the_lowest_ids_are_kept(library: CpuLibrary, params: Params, size: int) -> None:
    logits = torch.full((300,), -20.0)
    equal = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:200].sort().values
    logits[equal] = 5.0
    drawn = set(draw(logits, params, list(range(6000)), [0] * 6000, library).tolist())
    assert drawn == set(equal[:size].tolist())


def test_a_strided_view_and_every_alignment(library: CpuLibrary) -> None:
    wide = torch.randn(40, 301, generator=torch.Generator().manual_seed(2))
    for vocab in (1, 15, 16, 17, 63, 64, 65, 300):
        view = wide[:, :vocab]
        for params in (Params(), Params(top_k=5), Params(top_p=0.7)):
            many = [params] * 40
            seeds, positions = list(range(40)), [9] * 40
            tokens = draw(view, many, seeds, positions, library)
            assert torch.equal(tokens, draw(view.contiguous(), many, seeds, positions, library))
            assert int(tokens.max()) < vocab


def test_distribution(library: CpuLibrary) -> None:
    """Chi-square over seeds, over positions and over streams; 10 degrees of freedom, p = 0.001."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5, -2.0, 0.1, 0.2, 0.3, -0.5])
    draws = 20_000
    for seeds, positions, stream in (
        (list(range(draws)), [3] * draws, 0),
        ([42] * draws, list(range(draws)), 0),
        ([42] * draws, list(range(draws)), 1),
    ):
        tokens = draw(logits, Params(0.9), seeds, positions, library, stream)
        expected = (logits.double() / 0.9).softmax(-1) * draws
        counts = torch.bincount(tokens, minlength=11).double()
        assert float(((counts - expected) ** 2 / expected).sum()) < 29.6


def test_streams_and_positions_differ(library: CpuLibrary) -> None:
    logits = torch.zeros(1000)
    draws = {
        tuple(draw(logits, Params(), [seed] * 4, [p, p + 1, p + 2, p + 3], library, stream).tolist())
        for seed, p, stream in (
            (1, 0, 0),
            (2, 0, 0),
            (1 << 32, 0, 0),
            (1, 100, 0),
            (1, 0, 1),
            (1, 1 << 32, 0),
        )
    }
    assert len(draws) == 6


def test_a_row_is_a_function_of_itself(library: CpuLibrary) -> None:
    """Alone (where a row is drawn in slices), in a batch, with any number of threads."""
    logits = torch.randn(len(FILTERS), 20_000, generator=torch.Generator().manual_seed(4)) * 3
    seeds, positions = list(range(100, 100 + len(FILTERS))), list(range(len(FILTERS)))
    together = draw(logits, FILTERS, seeds, positions, library)
    for threads in (2, 4, 32):
        set_num_threads(threads)
        assert torch.equal(draw(logits, FILTERS, seeds, positions, library), together)
        for row, params in enumerate(FILTERS):
            alone = draw(
                logits[row : row + 1], params, seeds[row : row + 1], positions[row : row + 1], library
            )
            assert alone.tolist() == together[row : row + 1].tolist()


def test_levels_draw_the_same_tokens() -> None:
    logits = torch.randn(len(FILTERS), 3000, generator=torch.Generator().manual_seed(6)) * 3
    seeds = positions = list(range(len(FILTERS)))
    tokens = [draw(logits, FILTERS, seeds, positions, load(isa)).tolist() for isa in available_isas()]
    assert all(other == tokens[0] for other in tokens)


# ---- greedy and extremes ----------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_id_of_equal_logits(library: CpuLibrary) -> None:
    for vocab in (1, 2, 15, 16, 17, 200, 1000):
        for at in {0, vocab // 2, vocab - 1}:
            logits = torch.randn(3, vocab).clamp(max=3.0)
            logits[:, at:] = logits[:, at:].clamp(max=4.0)
            logits[:, at] = 4.0
            logits[1, vocab - 1] = 4.0
            assert sample.argmax_rows(logits, library=library).tolist() == [at] * 3
            assert draw(logits[:1], Params(0.0, top_k=3), [1], [1], library).tolist() == [at]


def test_rows_that_leave_no_choice(library: CpuLibrary) -> None:
    nothing = torch.full((1, 100), float("-inf"))
    assert sample.argmax_rows(nothing, library=library).tolist() == [-1]
    for params in (Params(), Params(0.0), Params(top_k=3), Params(top_p=0.5), Params(min_p=0.1)):
        assert draw(nothing, params, [1], [1], library).tolist() == [-1]
        one = nothing.clone()
        one[0, 77] = -50.0
        assert draw(one, params, [1], [1], library).tolist() == [77]
    overflow = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert draw(overflow, Params(1e-39), [1], [1], library).tolist() == [1]
    assert set(draw(overflow * 1e4, Params(0.01), list(range(50)), [0] * 50, library).tolist()) == {1, 2}


# ---- log-probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "top_n"), [(1, 1), (20, 20), (70, 64), (1003, 5), (50_000, 64), (50_000, 0)]
)
def test_logprobs(library: CpuLibrary, vocab: int, top_n: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(4, vocab, generator=generator) * 4
    logits[1] = (logits[1] * 2).round() / 2  # ties
    logits[2] += 1000
    logits[3, vocab // 2 :] = float("-inf")
    logits[3, 0] = 0.0
    tokens = torch.randint(0, vocab, (4,), generator=generator)
    tokens[3] = 0
    set_num_threads(2)
    found = sample.logprobs_rows(logits, tokens, top_n, library=library)
    exact = logits.double().log_softmax(-1)
    own = exact.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found.token_logprobs.double(), own, rtol=3e-7, atol=1e-6)
    assert found.ranks.tolist() == [
        1 + int((row > row[t]).sum()) for row, t in zip(logits, tokens, strict=True)
    ]
    for row in range(4):
        order = np.lexsort((np.arange(vocab), -logits[row].double().numpy()))[:top_n]
        assert found.top_ids[row].tolist() == order.tolist()
        torch.testing.assert_close(
            found.top_logprobs[row].double(), exact[row][torch.from_numpy(order)], rtol=3e-7, atol=1e-6
        )


def test_a_huge_flat_row_is_summed_precisely(library: CpuLibrary) -> None:
    logits = torch.full((1, 400_001), 3.25)
    found = sample.logprobs_rows(logits, torch.tensor([400_000]), 1, library=library)
    assert found.token_logprobs.item() == pytest.approx(-np.log(400_001), rel=1e-7)
    assert found.ranks.item() == 1
    assert found.top_ids.item() == 0


def test_bad_arguments_are_named() -> None:
    logits = torch.zeros(2, 10)
    good: dict[str, Any] = {
        "temperature": torch.ones(2),
        "top_k": torch.zeros(2, dtype=torch.int32),
        "top_p": torch.ones(2),
        "min_p": torch.zeros(2),
        "seed": torch.zeros(2, dtype=torch.int64),
        "position": torch.zeros(2, dtype=torch.int64),
    }
    for name, tensor in good.items():
        with pytest.raises(ValueError, match=name):
            sample.sample_rows(logits, **{**good, name: tensor[:1]})
        with pytest.raises(ValueError, match=name):
            sample.sample_rows(logits, **{**good, name: tensor.double()})
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            sample.sample_rows(logits, **{**good, "temperature": torch.tensor([1.0, value])})
    with pytest.raises(ValueError, match="stream"):
        sample.sample_rows(logits, **good, stream=2**32)
    with pytest.raises(ValueError, match="logits"):
        sample.argmax_rows(logits.double())
    with pytest.raises(ValueError, match="logits"):
        sample.argmax_rows(logits.T)
    with pytest.raises(ValueError, match="top_n"):
        sample.logprobs_rows(logits, torch.zeros(2, dtype=torch.int64), 11)
    with pytest.raises(ValueError, match="tokens"):
        sample.logprobs_rows(logits, torch.tensor([0, 10]), 1)
