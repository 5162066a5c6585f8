"""The sampler's kernels on the GPU. Nothing here waits for the device.

Same results as `TorchDraw` but for rounding: scores and weights are float32, so two tokens whose
scores differ by a few units in the last place may change places, and so may the last token of a
top-p set whose mass meets p that closely. Every row is a function of itself alone.
"""

from __future__ import annotations

import torch

from octavo.kernels.triton import rules, sample, top
from octavo.sampling.batch import Bitmask, SamplingBatch
from octavo.sampling.noise import Stream
from octavo.sampling.processors import apply_processors
from octavo.sampling.sampler import LogprobTensors


class GpuDraw:
    """`DrawKernels` over octavo.kernels.triton.sample and top, `ProcessKernels` over rules."""

    def process(self, logits: torch.Tensor, batch: SamplingBatch) -> None:
        """See ProcessKernels. What a step brings from the host is torch's work, but for masks."""
        apply_processors(logits, batch, self._mask)
        if batch.rules is not None:
            batch.rules.apply(logits, batch.position.to(logits.device, non_blocking=True))

    def _mask(self, logits: torch.Tensor, mask: Bitmask) -> None:
        words = mask.words.to(torch.int32).contiguous()
        entries = torch.stack((mask.rows, torch.arange(len(mask.rows))), dim=1).to(torch.int32)
        if logits.device.type != "cpu":
            entries, words = (
                tensor.pin_memory().to(logits.device, non_blocking=True) for tensor in (entries, words)
            )
        rules.mask_rows(logits, entries, words)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See DrawKernels."""
        return sample.draw(logits, None)

    def draw(self, logits: torch.Tensor, batch: SamplingBatch, stream: Stream = Stream.DRAW) -> torch.Tensor:
        """See DrawKernels. Whether any row filters is read where the batch was made: on the host."""
        filtered = cut = both = True
        if batch.top_k.device.type == "cpu":
            few, heavy = batch.top_k > 0, batch.top_p < 1
            cut, both = bool((few | heavy).any()), bool((few & heavy).any())
            filtered = cut or bool((batch.min_p > 0).any())
        seed, temperature, top_k, top_p, min_p = _columns(batch, logits.device)
        position = batch.position.to(logits.device, non_blocking=True)
        if not filtered:
            return sample.draw(logits, temperature, seed=seed, position=position, stream=int(stream))
        return sample.draw(
            logits, temperature, top_k, top_p, min_p, seed, position, int(stream), any_cut=cut, any_both=both
        )

    def logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> LogprobTensors:
        """See DrawKernels."""
        return LogprobTensors(*top.top(logits, tokens, num_top))


def _columns(batch: SamplingBatch, device: torch.device) -> list[torch.Tensor]:
    """(seed, temperature, top_k, top_p, min_p) on the device: those of the host in one copy."""
    columns = [batch.seed, batch.temperature, batch.top_k, batch.top_p, batch.min_p]
    if device.type == "cpu" or batch.seed.device.type != "cpu":
        return [column.to(device, non_blocking=True) for column in columns]
    rows = len(batch.seed)
    packed = torch.empty(6 * rows, dtype=torch.int32, pin_memory=True)
    start = 0
    places: list[slice] = []
    for column in columns:
        size = rows * column.element_size() // 4
        places.append(slice(start, start + size))
        packed[places[-1]].view(column.dtype).copy_(column)
        start += size
    sent = packed.to(device, non_blocking=True)
    return [sent[place].view(column.dtype) for place, column in zip(places, columns, strict=True)]
