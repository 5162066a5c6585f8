"""One step on the device: slot changes, forward, sampling, and the answer to the host.

A step is two launches. `forward` takes the rows and ends with logits; `sample` takes the grammar
masks, if any row waits for one, and ends with the tokens of the step and the moved counters.
Between the two the host may read the previous step and advance its grammars.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.backend import AttentionMetadata, ForwardContext
from octavo.core.messages import (
    Finish,
    ModelOutput,
    NewSlot,
    PromptLogprobs,
    RowKind,
    SchedulerOutput,
    TokenLogprobs,
)
from octavo.models.decoder import CausalLM
from octavo.sampling.batch import Bitmask, SamplingSlots, compile_params
from octavo.sampling.sampler import NO_TOKEN, Sampler
from octavo.speculation.proposer import Proposer
from octavo.worker.input_batch import DeviceState
from octavo.worker.step_math import StepInputs, StepMath, StepResult

# slot -> bit masks of its rows of logits, int32 [rows of the slot, words]
GrammarMasks = Mapping[int, npt.NDArray[np.int32]]

# Prompt logprobs need the head on every row of a chunk: in slices, because one row of logits is
# vocab_size floats.
_HEAD_SLICE = 64

_NO_TOKEN_MESSAGE = (
    "no token is legal here: the masks of this request (structured_outputs, allowed_token_ids, "
    "logit_bias, bad_words, min_tokens) exclude each other, or the model computed no finite logit"
)


@dataclass(slots=True)
class _Launched:
    """A step between its two launches."""

    out: SchedulerOutput
    inputs: StepInputs
    logits: torch.Tensor | None  # [L, vocab_size] float32; None if nothing is sampled
    prompt_logprobs: list[PromptLogprobs | None]
    started: float


class ModelRunner:
    """Owns the device state, the KV caches and the model of one rank."""

    def __init__(
        self,
        model: CausalLM,
        kv_caches: list[torch.Tensor],
        state: DeviceState,
        steps: StepMath,
        sampler: Sampler,
        proposer: Proposer | None = None,
    ) -> None:
        self.model = model
        self.state = state
        self._steps = steps
        self._kv_caches = kv_caches
        self._sampler = sampler
        self._proposer = proposer
        self._sampling = SamplingSlots(state.num_slots)
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}  # slot -> (prompt length, how many)
        self._launched: _Launched | None = None
        # Only grammars and traces want to know the drafts themselves.
        self._reads_drafts = False

    @torch.inference_mode()
    def forward(self, out: SchedulerOutput) -> None:
        """First launch: apply the slot changes of `out` and compute its rows up to the logits."""
        assert self._launched is None, "the step before was not sampled"
        started = time.perf_counter()
        for slot in out.freed_slots:
            self.state.remove(slot)
            self._sampling.remove(slot)
            self._prompt_logprobs.pop(slot, None)
            if self._proposer is not None:
                self._proposer.leave(slot)
        for new in out.new_slots:
            self._put(new)
        for slot, block_ids in out.new_blocks:
            self.state.append_blocks(slot, block_ids)

        inputs = self._steps.prepare(out)
        context = ForwardContext(inputs.metadata, self._kv_caches)
        hidden = self.model.forward(inputs.input_ids, inputs.positions, context)
        logits = None
        if len(inputs.logits_rows):
            all_rows = len(inputs.logits_rows) == len(hidden)
            logits = self.model.logits(hidden if all_rows else hidden[inputs.logits_rows])
        asked = self._compute_prompt_logprobs(out, hidden) if self._prompt_logprobs else {}
        prompt_logprobs = [asked.get(index) for index in range(len(out.rows))]
        self._launched = _Launched(out, inputs, logits, prompt_logprobs, started)

    @torch.inference_mode()
    def sample(self, masks: GrammarMasks | None = None) -> ModelOutput:
        """Second launch: draw, verify, move the counters. `masks` has an entry a mask slot."""
        launched = self._launched
        assert launched is not None, "no forward to sample from"
        self._launched = None
        out, inputs = launched.out, launched.inputs
        count = len(out.rows)
        output = ModelOutput(
            step_id=out.step_id,
            keys=out.row_keys,
            tokens=[[] for _ in range(count)],
            num_drafts_valid=[0] * count,
            num_accepted=[0] * count,
            finished=[Finish.NO] * count,
            logprobs=[None] * count,
            prompt_logprobs=launched.prompt_logprobs,
        )
        if launched.logits is None:
            self._steps.finish(out, inputs, None)
        else:
            grammar = _grammar_rows(masks, inputs.logits_slots) if masks else None
            batch = self._sampling.batch(
                inputs.logits_slots, inputs.draw_positions, self.state.tokens, grammar
            )
            drawn, logprobs = self._sampler(launched.logits, batch)
            _fill(output, out, self._steps.finish(out, inputs, drawn), logprobs)
        drawn_at = time.perf_counter()
        output.target_seconds = drawn_at - launched.started
        if out.propose and self._proposer is not None:
            self._propose(out, output, self._proposer)
            output.draft_seconds = time.perf_counter() - drawn_at
        return output

    @torch.inference_mode()
    def time_rows(self, num_rows: int) -> float:
        """Seconds of a forward pass and its logits for this many rows, with no KV to read."""
        device = self.state.device
        ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        padding = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, num_rows], dtype=torch.int32, device=device),
            seq_lens=torch.zeros(1, dtype=torch.int32, device=device),
            block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
            slot_mapping=padding,
            positions=padding,
            num_reqs=1,
            num_tokens=num_rows,
            max_query_len=num_rows,
            max_seq_len=0,
        )
        started = time.perf_counter()
        hidden = self.model.forward(ids, padding, ForwardContext(metadata, self._kv_caches))
        self.model.logits(hidden)
        return time.perf_counter() - started

    def _propose(self, out: SchedulerOutput, output: ModelOutput, proposer: Proposer) -> None:
        slots, counts = zip(*out.propose, strict=True)
        proposer.propose(slots, counts)
        state = self.state
        if state.device.type == "cpu":  # elsewhere it would mean to wait
            output.num_drafted = dict(zip(slots, state.num_drafts[list(slots)].tolist(), strict=True))
        if not self._reads_drafts:
            return
        for slot in slots:
            known, count = int(state.num_tokens[slot]), int(state.num_drafts[slot])
            output.drafts[slot] = state.tokens[slot, known : known + count].tolist()

    def _put(self, new: NewSlot) -> None:
        self.state.put(new)
        if self._proposer is not None:
            self._proposer.enter(new)
        self._reads_drafts = self._reads_drafts or new.params.structured_outputs is not None
        self._reads_drafts = self._reads_drafts or new.params.trace
        params = new.params
        self._sampling.put(
            new.slot,
            compile_params(
                params,
                seed=new.seed,
                num_prompt_tokens=new.num_prompt_tokens,
                vocab_size=self.model.config.vocab_size,
                stop_ids=new.stop_token_ids,
                bad_words_ids=new.bad_words_ids,
            ),
        )
        if params.prompt_logprobs is None:
            self._prompt_logprobs.pop(new.slot, None)
        else:
            self._prompt_logprobs[new.slot] = (new.num_prompt_tokens, params.prompt_logprobs)

    def _compute_prompt_logprobs(
        self, out: SchedulerOutput, hidden: torch.Tensor
    ) -> dict[int, PromptLogprobs]:
        found: dict[int, PromptLogprobs] = {}
        end_row = 0
        for index, (slot, num_rows, kind, _) in enumerate(out.rows):
            first, end_row = end_row, end_row + num_rows
            if kind is RowKind.VERIFY or slot not in self._prompt_logprobs:
                continue
            num_prompt_tokens, num_top = self._prompt_logprobs[slot]
            start = int(self.state.num_computed[slot]) + 1  # the prompt token after the first row
            count = min(num_rows, num_prompt_tokens - start)
            entries: list[TokenLogprobs] = []
            for begin in range(0, count, _HEAD_SLICE):
                end = min(begin + _HEAD_SLICE, count)
                logits = self.model.logits(hidden[first + begin : first + end])
                targets = self.state.tokens[slot, start + begin : start + end].to(torch.int64)
                entries += self._sampler.logprobs(logits, targets, [num_top] * (end - begin))
            if count > 0:
                found[index] = PromptLogprobs(start, entries)
        return found


def _grammar_rows(masks: GrammarMasks, row_slots: npt.NDArray[np.int64]) -> Bitmask:
    rows: list[npt.NDArray[np.int64]] = []
    words: list[npt.NDArray[np.int32]] = []
    for slot, mask in masks.items():
        mine = np.flatnonzero(row_slots == slot)[: len(mask)]
        rows.append(mine)
        words.append(mask[: len(mine)])
    return Bitmask(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(words)))


def _fill(
    output: ModelOutput, out: SchedulerOutput, result: StepResult, logprobs: list[TokenLogprobs | None] | None
) -> None:
    """Put what was read back where its requests are."""
    place, start = 0, 0  # among the sampled requests, and among the rows of logits
    for index, (_, num_rows, kind, samples) in enumerate(out.rows):
        if not samples:
            continue
        mine = result.tokens[place][: result.num_emitted[place]]
        if finished := result.finished[place]:
            output.finished[index] = Finish(finished)
            if mine[-1] == NO_TOKEN:
                mine.pop()
                output.errors[output.keys[index]] = _NO_TOKEN_MESSAGE
        output.tokens[index] = mine
        output.num_drafts_valid[index] = result.num_drafts[place]
        output.num_accepted[index] = result.num_accepted[place]
        if logprobs is not None and logprobs[start] is not None:
            output.logprobs[index] = [entry for entry in logprobs[start : start + len(mine)] if entry]
        place += 1
        start += num_rows if kind is RowKind.VERIFY else 1
