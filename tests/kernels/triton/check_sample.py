"""The sampling kernels against their oracle: same noise, same kept sets, same ties."""

from __future__ import annotations

import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.sampling.batch import SamplingBatch  # noqa: E402
from octavo.sampling.gpu_draw import GpuDraw  # noqa: E402
from octavo.sampling.sampler import TorchDraw  # noqa: E402


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


def test_draw() -> None:
    batch, logits = batch_and_logits()
    assert GpuDraw().draw(logits, batch).tolist() == TorchDraw().draw(logits, batch).tolist()


def test_draw_without_filters() -> None:
    batch, logits = batch_and_logits()
    batch.top_k, batch.top_p, batch.min_p = (
        torch.zeros_like(batch.top_k), torch.ones(16), torch.zeros(16),
    )  # fmt: skip
    assert GpuDraw().draw(logits, batch).tolist() == TorchDraw().draw(logits, batch).tolist()


def test_argmax() -> None:
    _, logits = batch_and_logits()
    assert GpuDraw().argmax(logits).tolist() == TorchDraw().argmax(logits).tolist()


def test_logprobs() -> None:
    _, logits = batch_and_logits()
    tokens = torch.arange(16) * 7
    tokens[2] = -1
    for ours, theirs in zip(
        GpuDraw().logprobs(logits, tokens, 9), TorchDraw().logprobs(logits, tokens, 9), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
