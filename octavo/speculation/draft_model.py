"""A smaller model guesses: its own weights, KV cache, block tables and counters beside the target's.

At the end of a step it catches up where the scheduler says so, and then makes one draft a slot with
each pass. A draft is drawn as the target will draw: with the request's own sampling parameters and
with the same noise, which depends on the seed and the position alone. So where the two models agree,
they agree in sampling too, and not in greedy decoding only. Grammar masks are not known here; drafts
that a grammar forbids are refused like any others.

Nothing waits for the device between the passes. Where a lookup went first (method "hybrid"), slots
that hold drafts already are left alone.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import torch

from octavo.attention.backend import AttentionMetadata, ForwardContext
from octavo.core.messages import DraftGroup, SchedulerOutput
from octavo.sampling.batch import SamplingBatch, SamplingSlots
from octavo.sampling.processors import NEG_INF
from octavo.sampling.rejection import probabilities
from octavo.sampling.sampler import Sampler
from octavo.speculation.draft_passes import DraftPasses, IntArray, PassInputs
from octavo.speculation.proposer import DraftTables
from octavo.speculation.rejection import DraftDistributions


class DraftNetwork(Protocol):
    """What is needed of the draft model: a decoder."""

    device: torch.device

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, hidden], or [L, hidden] where `ctx` wants L rows"""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, draft vocabulary] float32"""
        ...


class DraftModel:
    """Drafts of a step by passes of a second model. `tables` are the target's."""

    def __init__(
        self,
        network: DraftNetwork,
        kv_caches: list[torch.Tensor],
        passes: DraftPasses,
        tables: DraftTables,
        sampler: Sampler,
        sampling: SamplingSlots,
        *,
        vocab_size: int,
        target_vocab_size: int,
        distributions: DraftDistributions | None = None,
        catch_up_rows: int = 256,
    ) -> None:
        """`catch_up_rows`: of a pass, at most."""
        self.catch_up_rows = catch_up_rows
        self.network = network
        self._kv_caches = kv_caches
        self._passes = passes
        self._tables = tables
        self._sampler = sampler
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._target_vocab_size = target_vocab_size
        self._distributions = distributions
        self._is_masked = passes.masks_rows
        self._pass_rows: list[int] = []
        self._depth = 0
        # Of the pass before, if the next one differs from it in positions only.
        self._batch: SamplingBatch | None = None
        self._batch_slots: IntArray = np.empty(0, dtype=np.int64)

    @property
    def from_model(self) -> torch.Tensor:
        """[slots] bool: the drafts in the slot are the draft model's"""
        return self._passes.from_model

    def change(self, group: DraftGroup) -> None:
        """Slots leave and enter, block tables grow: before the step's rows."""
        self._passes.change(group)

    def start(self, out: SchedulerOutput) -> list[int]:
        """The first pass of the step's draft group; what was verified or drawn is in the tables.

        Returns the token rows of each pass, a list that `go_on` lengthens.
        """
        self._pass_rows = []
        self._depth = 0
        self._batch = None
        sampled = [rows.slot for rows in out.rows if rows.samples]
        if sampled:
            self._passes.settle(np.array(sampled, dtype=np.int64))
        if self._distributions is not None and out.propose:
            self._distributions.begin([slot for slot, _ in out.propose])
        if out.draft is not None and out.draft.rows:
            inputs = self._passes.first(out.draft.rows)
            if inputs is not None:
                self._run(inputs)
        return self._pass_rows

    def go_on(self) -> None:
        """The other passes of the step."""
        if not self._pass_rows:
            return
        while (inputs := self._passes.next()) is not None:
            self._depth += 1
            self._run(inputs)

    def time_rows(self, num_rows: int) -> float:
        """Seconds of a pass with so many rows that read no KV. Waits for the device.

        A row a request, or two, as in drafting; more rows than that are those of one that catches up.
        """
        device = self.network.device
        ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        catches_up = num_rows > 2 * len(self._tables.tokens)
        metadata = AttentionMetadata.of_padding(num_rows, num_rows if catches_up else 1, device)
        # A GPU gets some passes at once, so that it never waits for the host's launches.
        repeats = 1 if device.type == "cpu" else 4
        context = ForwardContext(metadata, self._kv_caches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        with torch.inference_mode():
            for _ in range(repeats):
                if catches_up or not self._passes.time(num_rows):
                    hidden = self.network.forward(ids, metadata.positions, context)
                    self.network.logits(hidden[:1] if catches_up else hidden)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / repeats

    def _run(self, inputs: PassInputs) -> None:
        self._pass_rows.append(len(inputs.input_ids))
        logits = inputs.logits if inputs.computed else self._compute(inputs)
        if logits is None:
            self._passes.draft(inputs, None)
            return
        logits = self._common_vocabulary(logits)
        batch = self._sampling_batch(inputs)
        drawn = self._sampler.draw(logits, batch).tokens
        self._passes.draft(inputs, drawn)
        if self._distributions is not None:
            self._record(self._distributions, inputs, logits, batch)

    def _compute(self, inputs: PassInputs) -> torch.Tensor | None:
        """[L, draft vocabulary] float32; None if the pass has no rows of logits."""
        metadata, ids = inputs.metadata, inputs.input_ids
        assert metadata is not None
        if self._vocab_size < self._target_vocab_size:  # a token of the text that the draft model lacks
            ids = ids.clamp(max=self._vocab_size - 1)
        wanted = inputs.logits_rows if len(inputs.logits_slots) < len(ids) else None
        context = ForwardContext(metadata, self._kv_caches, wanted)
        hidden = self.network.forward(ids, metadata.positions, context)
        return self.network.logits(hidden) if len(inputs.logits_slots) else None

    def _common_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, target vocabulary]: the draft model's may be padded to another size."""
        missing = self._target_vocab_size - self._vocab_size
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=NEG_INF)
        return logits if missing == 0 else logits[:, : self._target_vocab_size].contiguous()

    def _sampling_batch(self, inputs: PassInputs) -> SamplingBatch:
        slots, positions = inputs.logits_slots, inputs.draw_positions
        batch = self._batch
        if batch is not None and len(slots) == len(self._batch_slots) and (slots == self._batch_slots).all():
            batch.position = positions
            return batch
        batch = self._sampling.batch(slots, positions, self._tables.tokens)
        batch.num_logprobs = None
        if not batch.changes_logits:
            self._batch, self._batch_slots = batch, slots
        return batch

    def _record(
        self, known: DraftDistributions, inputs: PassInputs, logits: torch.Tensor, batch: SamplingBatch
    ) -> None:
        """What each draft of this pass was drawn from; `logits` were processed by the draw."""
        if batch.all_greedy:
            return
        probs = probabilities(logits, batch)
        if self._is_masked:
            # What another drafter has put there was certain: 1 at the draft.
            tables = self._tables
            slots = torch.from_numpy(inputs.logits_slots).to(probs.device, non_blocking=True)
            drafts = tables.tokens[slots, tables.num_tokens[slots] + self._depth].to(torch.int64)
            certain = torch.zeros_like(probs).scatter_(1, drafts.clamp(min=0)[:, None], 1.0)
            probs = torch.where((inputs.draw_positions >= 0)[:, None], probs, certain)
        known.record(inputs.logits_slots.tolist(), self._depth, probs)
