"""The sampler's kernels on the GPU. Nothing here waits for the device.

Same results as `TorchDraw` but for rounding: scores and weights are float32, so two tokens whose
scores differ by a few units in the last place may change places, and so may the last token of a
top-p set whose mass meets p that closely. Every row is a function of itself alone.
"""

from __future__ import annotations

import torch

from octavo.kernels.triton import sample
from octavo.sampling.batch import SamplingBatch
from octavo.sampling.noise import Stream
from octavo.sampling.sampler import LogprobTensors

NEG_INF = float("-inf")


class GpuDraw:
    """`DrawKernels` over octavo.kernels.triton.sample."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See DrawKernels."""
        return sample.draw(logits, None)

    def draw(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """See DrawKernels. Whether any row filters is read where the batch was made: on the host."""

        def there(column: torch.Tensor) -> torch.Tensor:
            return column.to(logits.device, non_blocking=True)

        columns = (batch.top_k, batch.top_p, batch.min_p)
        filtered = True
        if not batch.top_k.is_cuda:
            filtered = bool((batch.top_k > 0).any() or (batch.top_p < 1).any() or (batch.min_p > 0).any())
        top_k, top_p, min_p = (there(column) for column in columns) if filtered else (None, None, None)
        return sample.draw(
            logits, there(batch.temperature), top_k, top_p, min_p, there(batch.seed), there(batch.position),
            int(Stream.DRAW),
        )  # fmt: skip

    def logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> LogprobTensors:
        """See DrawKernels."""
        highest = torch.finfo(logits.dtype).max
        logits = torch.nan_to_num(logits, nan=NEG_INF, posinf=highest, neginf=NEG_INF)
        logprobs = torch.log_softmax(logits, dim=-1)
        missing = tokens < 0
        column = tokens.clamp(min=0)[:, None]
        greater = (logits > logits.gather(1, column)).sum(dim=-1)
        top_ids = _top_ids(logits, min(num_top, logits.shape[1]))
        return LogprobTensors(
            logprobs.gather(1, column)[:, 0].masked_fill(missing, NEG_INF),
            (greater + 1).masked_fill(missing, 0),
            top_ids,
            logprobs.gather(1, top_ids),
        )


def _top_ids(logits: torch.Tensor, num_top: int) -> torch.Tensor:
    """Greatest logits first, the lowest id among equals: one integer a token says both."""
    bits = torch.where(logits == 0, 0.0, logits).contiguous().view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (order << 32) | (0xFFFF_FFFF - ids)
    return 0xFFFF_FFFF - (keys.topk(num_top, dim=-1).values & 0xFFFF_FFFF)
