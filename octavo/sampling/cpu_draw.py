"""The sampler's kernels in C, for the CPU.

Same results as `TorchDraw` but for rounding: the C kernels work in float32, so two tokens whose
scores differ by less than a few units in the last place may change places, and so may the last
token of a top-p set whose mass meets p that closely. Every row is still a function of itself alone.
What changes logits before that (`process`) gives the same bits as the torch functions.
"""

from __future__ import annotations

import torch

from octavo.kernels.cpu import processors, sample
from octavo.kernels.cpu.library import CpuLibrary
from octavo.sampling.batch import Bitmask, Penalties, SamplingBatch
from octavo.sampling.noise import Stream
from octavo.sampling.processors import apply_processors
from octavo.sampling.sampler import LogprobTensors, TorchDraw


class CpuDraw:
    """`DrawKernels` over octavo.kernels.cpu.sample. `library` None: the one this machine loads."""

    def __init__(self, library: CpuLibrary | None = None) -> None:
        self._library = library
        self._torch = TorchDraw()

    def process(self, logits: torch.Tensor, batch: SamplingBatch) -> None:
        """See ProcessKernels. Bans and bias are a single indexed write each, so torch does them."""
        apply_processors(logits, batch, self._mask, self._penalize)

    def _mask(self, logits: torch.Tensor, mask: Bitmask) -> None:
        processors.mask_rows(logits, mask.rows, mask.words.contiguous(), library=self._library)

    def _penalize(self, logits: torch.Tensor, penalties: Penalties) -> None:
        processors.penalize_rows(
            logits,
            penalties.rows,
            penalties.slots,
            penalties.lengths,
            penalties.prompt_lengths,
            penalties.repetition,
            penalties.presence,
            penalties.frequency,
            penalties.tokens,
            library=self._library,
        )

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See DrawKernels."""
        return sample.argmax_rows(logits, library=self._library)

    def draw(self, logits: torch.Tensor, batch: SamplingBatch, stream: Stream = Stream.DRAW) -> torch.Tensor:
        """See DrawKernels."""
        return sample.sample_rows(
            logits,
            batch.temperature,
            batch.top_k,
            batch.top_p,
            batch.min_p,
            batch.seed,
            batch.position,
            int(stream),
            library=self._library,
        )

    def logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> LogprobTensors:
        """See DrawKernels. The kernel keeps a short list; more than it holds is torch's work."""
        num_top = min(num_top, logits.shape[1])
        if num_top > sample.MAX_TOP:
            return self._torch.logprobs(logits, tokens, num_top)
        missing = tokens < 0
        found = sample.logprobs_rows(logits, tokens.clamp(min=0), num_top, library=self._library)
        return LogprobTensors(
            found.token_logprobs.masked_fill(missing, float("-inf")),
            found.ranks.to(torch.int64).masked_fill(missing, 0),
            found.top_ids.to(torch.int64),
            found.top_logprobs,
        )
