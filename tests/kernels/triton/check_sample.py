"""The sampling kernels against their oracle: same noise, same kept sets, same ties."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.kernels.triton import filters, select  # noqa: E402
from octavo.sampling.batch import SamplingBatch  # noqa: E402
from octavo.sampling.gpu_draw import GpuDraw  # noqa: E402
from octavo.sampling.sampler import TorchDraw, kept_tokens  # noqa: E402


def batch_and_logits() -> tuple[SamplingBatch, torch.Tensor]:
    logits = torch.randn(16, 131, generator=torch.Generator().manual_seed(0)) * 3
    logits[3], logits[4], logits[8], logits[11] = (logits[row].round() for row in (3, 4, 8, 11))  # ties
    logits[5, 10:] = float("-inf")
    logits[6] = float("-inf")
    logits[7, 3] = float("nan")
    batch = SamplingBatch(
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.0, 1.3, 1.0, 1.0, 1.0] * 2),
        top_k=torch.tensor([0, 5, 0, 7, 3, 40, 0, 0] * 2, dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 0.8, 0.9, 1.0, 1.0, 0.5, 0.3] * 2),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.0, 0.0] * 2),
        seed=torch.arange(16) * 7919 - 3 + (1 << 40),
        position=torch.arange(16) + 5,
    )
    return batch, logits


def small(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Several programs a row, and room for so many tokens in a list."""
    monkeypatch.setattr(select, "LIST", room)
    monkeypatch.setattr(select, "chunk_of", lambda rows, vocab: 32)


# with room for 16 most bins do not fit and are searched in the logits
@pytest.mark.parametrize(("room", "scale"), [(4096, 1.0), (16, 40.0)])
def test_draw(room: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, room)
    batch, logits = batch_and_logits()
    logits = logits * scale
    if scale > 1:
        batch.temperature[batch.temperature > 0] *= scale
    assert GpuDraw().draw(logits, batch).tolist() == TorchDraw().draw(logits, batch).tolist()


@pytest.mark.parametrize("room", [4096, 8])
def test_kept_tokens(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, room)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(12, 90, generator=generator) * 4
    logits[::3] = (logits[::3] / 2).round()
    logits[::5] = -logits[::5].abs() - 100  # all far below zero
    logits[7, 20:] = float("-inf")
    temperature = torch.tensor([0.4, 1.0, 2.0] * 4)
    top_k = torch.tensor([0, 1, 3, 30, 89, 90, 0, 60, 0, 5, 7, 40], dtype=torch.int32)
    top_p = torch.tensor([0.9, 0.4, 1.0, 0.99, 0.9999, 0.1] * 2)
    order, limit, best = filters.thresholds(logits, temperature, top_k, top_p)
    for row in range(len(logits)):
        ours = select_kept(logits[row], int(order[row]), int(limit[row]))
        theirs = kept_tokens(logits[row], float(temperature[row]), int(top_k[row]), float(top_p[row]), 0.0)
        assert ours == theirs.tolist(), row
        assert best[row] == logits[row].max()


def select_kept(logits: torch.Tensor, least: int, limit: int) -> list[int]:
    bits = torch.where(logits == 0, 0.0, logits).view(torch.int32).tolist()
    kept = []
    for token, value in enumerate(bits):
        order = value ^ 0x7FFFFFFF if value < 0 else value
        if logits[token] > float("-inf") and (order > least or (order == least and token < limit)):
            kept.append(token)
    return kept


def test_draw_without_filters() -> None:
    batch, logits = batch_and_logits()
    batch.top_k, batch.top_p, batch.min_p = (
        torch.zeros_like(batch.top_k), torch.ones(16), torch.zeros(16),
    )  # fmt: skip
    assert GpuDraw().draw(logits, batch).tolist() == TorchDraw().draw(logits, batch).tolist()


def test_argmax() -> None:
    _, logits = batch_and_logits()
    assert GpuDraw().argmax(logits).tolist() == TorchDraw().argmax(logits).tolist()


@pytest.mark.parametrize(("room", "num_top"), [(4096, 0), (4096, 200), (4, 9)])
def test_logprobs(room: int, num_top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, room)
    _, logits = batch_and_logits()
    logits, tokens = logits[2:9], torch.arange(7) * 7
    tokens[2] = -1
    for ours, theirs in zip(
        GpuDraw().logprobs(logits, tokens, num_top),
        TorchDraw().logprobs(logits, tokens, num_top),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=2e-6, atol=2e-6)
