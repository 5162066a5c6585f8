"""Masks and penalties in C against the torch functions: the same bits at every level."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.cpu import processors
from octavo.kernels.cpu.library import CpuLibrary, CpuLibraryError, available_isas, load, set_num_threads
from octavo.sampling.batch import Bitmask, Penalties
from octavo.sampling.processors import apply_bitmask, apply_penalties
from tests.sampling.helpers import random_logits


def libraries() -> list[CpuLibrary]:
    try:
        return [load(isa) for isa in available_isas()]
    except CpuLibraryError:
        return []


pytestmark = pytest.mark.skipif(not libraries(), reason="the C library was not built")
every_level = pytest.mark.parametrize("library", libraries(), ids=lambda library: library.isa)


def random_words(entries: int, num_words: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(entries * 1000 + num_words)
    words = torch.randint(-(2**31), 2**31, (entries, num_words), generator=generator).to(torch.int32)
    words[:, ::3] = 0
    words[:, 1::5] = -1
    return words


@every_level
@pytest.mark.parametrize(
    ("vocab", "num_words"), [(1, 1), (31, 1), (32, 1), (97, 4), (97, 2), (640, 20), (64, 9)]
)
def test_masks_equal_the_reference(library: CpuLibrary, vocab: int, num_words: int) -> None:
    wide = random_logits(9, vocab + 3)
    rows = torch.tensor([7, 0, 3, 8])
    expected, found = wide[:, :vocab].clone(), wide.clone()
    mask = Bitmask(rows, random_words(len(rows), num_words))
    apply_bitmask(expected, mask)
    processors.mask_rows(found[:, :vocab], mask.rows, mask.words, library=library)
    assert torch.equal(found[:, :vocab], expected)
    assert torch.equal(found[:, vocab:], wide[:, vocab:])


def test_a_row_with_two_masks_obeys_both() -> None:
    rows = torch.tensor([1, 1, 0, 1] * 4)
    words = random_words(len(rows), 10) | random_words(len(rows) + 1, 10)[1:]
    expected = random_logits(2, 320)
    found = expected.clone()
    apply_bitmask(expected, Bitmask(rows, words))
    set_num_threads(2)
    try:
        processors.mask_rows(found, rows, words)
    finally:
        set_num_threads(1)
    assert torch.equal(found, expected)


@every_level
@pytest.mark.parametrize("vocab", [5, 97, 3000])
def test_penalties_equal_the_reference(library: CpuLibrary, vocab: int) -> None:
    entries, room = 40, 300
    generator = torch.Generator().manual_seed(vocab)

    def choose(values: list[float]) -> list[float]:
        return [values[i] for i in torch.randint(len(values), (entries,), generator=generator).tolist()]

    tokens = torch.randint(-2, vocab + 3, (entries, room), generator=generator).to(torch.int32)
    lengths = torch.randint(room + 1, (entries,), generator=generator).tolist()
    prompt_lengths = torch.randint(room + 1, (entries,), generator=generator).tolist()
    lengths[0], prompt_lengths[1] = 0, 0
    expected = random_logits(entries + 1, vocab)
    expected[:, ::4] = -torch.inf
    expected[:, 1::7] = -0.0
    found = expected.clone()
    order = torch.randperm(entries, generator=generator).tolist()
    penalties = Penalties(
        [row + 1 for row in order],
        order[::-1],
        lengths,
        prompt_lengths,
        choose([1.0, 1.1, 0.7, 1.3]),
        choose([0.0, 0.1, -1.9]),
        choose([0.0, 0.37, -0.2]),
        tokens,
    )
    apply_penalties(expected, penalties)
    for _ in range(2):  # the second time with cells that the first one used
        again = found.clone()
        processors.penalize_rows(
            again,
            penalties.rows,
            penalties.slots,
            penalties.lengths,
            penalties.prompt_lengths,
            penalties.repetition,
            penalties.presence,
            penalties.frequency,
            penalties.tokens,
            library=library,
        )
        assert torch.equal(again.view(torch.int32), expected.view(torch.int32))


def test_what_would_be_read_or_written_elsewhere_is_refused() -> None:
    logits, tokens = torch.zeros(2, 40), torch.zeros(3, 8, dtype=torch.int32)
    words = torch.zeros(1, 2, dtype=torch.int32)
    for row in (-1, 2):
        with pytest.raises(ValueError, match="rows must be in"):
            processors.mask_rows(logits, torch.tensor([row]), words)
    with pytest.raises(ValueError, match="words must have shape"):
        processors.mask_rows(logits, torch.tensor([0, 1]), words)

    def penalize(row: int, slot: int, length: int, prompt: int) -> None:
        processors.penalize_rows(logits, [row], [slot], [length], [prompt], [2.0], [0.0], [0.0], tokens)

    for name, values in (
        ("rows", (2, 0, 8, 0)),
        ("slots", (0, 3, 8, 0)),
        ("lengths", (0, 0, 9, 0)),
        ("prompt_lengths", (0, 0, 8, -1)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            penalize(*values)
    assert not logits.any()
