"""Draws of many rows at once in torch against the reference, which draws row by row."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.sampling import device_draw
from octavo.sampling.batch import SamplingBatch
from octavo.sampling.device_draw import DeviceDraw
from octavo.sampling.noise import Stream, exponentials, noise_words
from octavo.sampling.sampler import NO_TOKEN, TorchDraw, kept_tokens
from tests.sampling.helpers import random_logits


def make_batch(rows: int, seed: int, *, filters: bool = True) -> SamplingBatch:
    generator = torch.Generator().manual_seed(seed)

    def choose(values: list[float], off: float) -> torch.Tensor:
        picked = torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]
        return picked if filters else torch.full((rows,), off)

    return SamplingBatch(
        temperature=torch.tensor([0.0, 0.3, 0.7, 1.0, 1.7])[torch.arange(rows) % 5],
        top_k=choose([0, 0, 1, 2, 40, 1000], 0).to(torch.int32),
        top_p=choose([1.0, 1.0, 0.95, 0.5, 0.01], 1.0),
        min_p=choose([0.0, 0.0, 0.02, 0.5, 1.0], 0.0),
        seed=torch.randint(-(2**62), 2**62, (rows,), generator=generator) * 2,
        position=torch.randint(0, 100_000, (rows,), generator=generator),
    )


def on_the_edge(logits: torch.Tensor, batch: SamplingBatch, row: int, tokens: set[int]) -> bool:
    """True if float64 sums in another order decide: a near-tie, or a token at the end of what top-p keeps."""
    temperature, top_p, position = (float(c[row]) for c in (batch.temperature, batch.top_p, batch.position))
    ids = torch.tensor(sorted(tokens))
    noise = exponentials(noise_words(int(batch.seed[row]), int(position), ids)).log()
    scores = logits[row, ids].double() / temperature - noise
    if float(scores.max() - scores.min()) < 1e-9:
        return True
    rest = int(batch.top_k[row]), float(batch.min_p[row])
    less, more = (
        set(kept_tokens(logits[row], temperature, rest[0], min(1.0, top_p * nudge), rest[1]).tolist())
        for nudge in (1 - 1e-9, 1 + 1e-9)
    )
    return bool(tokens & (more ^ less))


def compare(device: torch.device, vocab_size: int, rows: int = 96, *, filters: bool = True) -> None:
    """Every kind of row; the oracle works on the host."""
    for scale in (0.5, 4.0, 20.0):
        logits = random_logits(rows, vocab_size, seed=vocab_size, scale=scale)
        logits[::7, : vocab_size // 2] = -math.inf
        logits[3::7] = logits[3::7].round()  # ties
        logits[5] = -math.inf
        logits[6, 0] = math.nan
        logits[8] = math.nan
        logits[9, vocab_size // 3] = math.inf
        batch = make_batch(rows, seed=int(scale), filters=filters)
        expected = TorchDraw().draw(logits, batch)
        draws = DeviceDraw()
        batch.position = batch.position.to(device)
        found = draws.draw(logits.to(device), batch).cpu()
        batch.position = batch.position.cpu()
        assert expected[5] == expected[8] == NO_TOKEN
        differ = (expected != found).nonzero()[:, 0].tolist()
        assert len(differ) <= 1
        for row in differ:
            assert on_the_edge(logits, batch, row, {int(expected[row]), int(found[row])})
        assert torch.equal(draws.argmax(logits.to(device)).cpu(), TorchDraw().argmax(logits))


@pytest.mark.parametrize("vocab_size", [1, 5, 130, 5003])
@pytest.mark.parametrize("filters", [True, False])
def test_tokens_equal_the_reference(vocab_size: int, filters: bool) -> None:
    compare(torch.device("cpu"), vocab_size, filters=filters)


def test_rows_are_drawn_alike_in_any_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, batch = random_logits(40, 333), make_batch(40, 2)
    whole = DeviceDraw().draw(logits, batch)
    monkeypatch.setattr(device_draw, "SLICE", 3 * 333)
    assert torch.equal(DeviceDraw().draw(logits, batch), whole)
    assert not torch.equal(DeviceDraw().draw(logits, batch, Stream.RESIDUAL), whole)
