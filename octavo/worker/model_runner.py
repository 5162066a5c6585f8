"""One step on the device: slot changes, forward, sampling, and the answer to the host.

A step is two launches. `forward` takes the rows and ends with logits; `sample` takes the grammar
masks, if any row waits for one, and ends with the tokens of the step and the moved counters.
Between the two the host may read the previous step and advance its grammars. Neither waits for a
GPU: `sample` returns a `PendingOutput`, and only reading that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.backend import AttentionMetadata, ForwardContext
from octavo.core.messages import NewSlot, RowKind, SchedulerOutput
from octavo.models.decoder import CausalLM
from octavo.sampling.batch import Bitmask, SamplingBatch, SamplingSlots, compile_params
from octavo.sampling.sampler import AskedLogprobs, Drawn, LogprobTensors, Sampler
from octavo.speculation.acceptance import Acceptance, SyntheticAcceptance, VerifyRows
from octavo.speculation.continued import ContinuedProposer
from octavo.speculation.draft_model import DraftModel
from octavo.speculation.proposer import Proposer
from octavo.worker.cuda_graph import CudaGraphs
from octavo.worker.device_time import Mark
from octavo.worker.graph_sizes import SHORT_ROWS
from octavo.worker.input_batch import MAX_DRAFTS, DeviceState
from octavo.worker.pending import PendingOutput, PendingPasses, PendingPrompt
from octavo.worker.step_math import StepInputs, StepMath, Verdict

if TYPE_CHECKING:  # it imports Triton
    from octavo.worker.whole_step import WholeStep, WholeSteps

# slot -> bit masks of its rows of logits, int32 [rows of the slot, words]
GrammarMasks = Mapping[int, npt.NDArray[np.int32]]

# Prompt logprobs need the head on every row of a chunk: in slices, because one row of logits is
# vocab_size floats.
_HEAD_SLICE = 64


@dataclass(slots=True)
class _Launched:
    """A step between its two launches."""

    out: SchedulerOutput
    inputs: StepInputs
    logits: torch.Tensor | None  # [L, vocab_size] float32; None if nothing is sampled
    prompt_logprobs: dict[int, PendingPrompt]  # by place among the step's rows
    started: Mark
    verdict: Verdict | None = None  # the graph of the step ended with it


@dataclass(slots=True)
class _AskingPrompt:
    """A request that wants its prompt's log-probabilities."""

    num_prompt_tokens: int
    num_top: int
    num_computed: int  # rows of its chunks so far: the host knows what a chunk computes


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
        graphs: CudaGraphs | None = None,
        acceptance: Acceptance | None = None,
        sampling: SamplingSlots | None = None,
        draft_model: DraftModel | None = None,
        whole_steps: WholeSteps | None = None,
    ) -> None:
        """`whole_steps`: what the graphs of short steps hold beside the forward."""
        self.model = model
        self.state = state
        self._steps = steps
        self._kv_caches = kv_caches
        self._sampler = sampler
        self._proposer = proposer
        self.graphs = graphs
        self.whole_steps = whole_steps
        self._acceptance = acceptance  # None: replay
        self.num_replayed = self.num_eager = 0  # forwards by graph, and without one
        self._sampling = sampling or SamplingSlots(state.num_slots)
        self.draft_model = draft_model  # drafts where the proposer, if there is one, found nothing
        self._prompt_logprobs: dict[int, _AskingPrompt] = {}  # by slot
        self._launched: _Launched | None = None
        # Only grammars and traces want to know the drafts themselves.
        self._reads_drafts = False

    @torch.inference_mode()
    def forward(self, out: SchedulerOutput) -> None:
        """First launch: apply the slot changes of `out` and compute its rows up to the logits."""
        assert self._launched is None, "the step before was not sampled"
        started = Mark(self.state.device)
        self.change(out)
        whole = self._launch_whole(out)
        if whole is not None:
            inputs, hidden, logits = whole.inputs, whole.hidden, whole.logits
        else:
            inputs = self._steps.prepare(out)
            assert inputs.metadata is not None
            hidden, logits = self._compute(inputs, inputs.metadata)
        prompt_logprobs = self._compute_prompt_logprobs(out, hidden) if self._prompt_logprobs else {}
        verdict = None if whole is None else whole.verdict
        self._launched = _Launched(out, inputs, logits, prompt_logprobs, started, verdict)

    def _compute(
        self, inputs: StepInputs, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states, and the rows of logits if there are any.

        The hidden states are those that the logits come from, or of all rows where somebody wants
        log-probabilities of a prompt.
        """
        rows = inputs.logits_rows
        is_all = len(rows) == len(inputs.input_ids)
        if is_all or self._prompt_logprobs:
            hidden = self._forward(inputs.input_ids, metadata)
            wanted = hidden if is_all else hidden[rows]
        else:
            hidden = wanted = self._forward(inputs.input_ids, metadata, rows)
        return hidden, self.model.logits(wanted) if len(rows) else None

    def _launch_whole(self, out: SchedulerOutput) -> WholeStep | None:
        """The step as one graph with its head, and with draw and verdict where those are plain."""
        if self.whole_steps is None or self.graphs is None:
            return None
        acceptance, slots = self._acceptance, [rows.slot for rows in out.rows]
        by_comparison = acceptance is None or isinstance(acceptance, SyntheticAcceptance)
        only_draws = by_comparison and not out.needs_mask and self._sampling.only_draw(np.array(slots))
        whole = self.whole_steps.launch(self.graphs, out, only_draws)
        self.num_replayed += whole is not None
        return whole

    @property
    def proposes(self) -> bool:
        """True if there is anybody to ask for drafts."""
        return self._proposer is not None or self.draft_model is not None

    @torch.inference_mode()
    def change(self, out: SchedulerOutput) -> None:
        """What a step changes before its rows: requests leave and enter their slots, blocks are added."""
        for slot in out.freed_slots:
            self._sampling.remove(slot)
            self._prompt_logprobs.pop(slot, None)
            if self._proposer is not None:
                self._proposer.leave(slot)
        self._steps.change_slots(out)
        for new in out.new_slots:
            self._enter(new)
        if self.draft_model is not None and out.draft is not None:
            self.draft_model.change(out.draft)

        if out.continuations and isinstance(self._proposer, ContinuedProposer):
            self._proposer.continue_with(out.continuations)

    @torch.inference_mode()
    def sample(self, masks: GrammarMasks | None = None) -> PendingOutput:
        """Second launch: draw, verify, move the counters. `masks` has an entry a mask slot."""
        launched = self._launched
        assert launched is not None, "no forward to sample from"
        self._launched = None
        out, inputs = launched.out, launched.inputs
        verdict = launched.verdict
        logprobs: AskedLogprobs | None = None
        if verdict is not None:
            pass
        elif launched.logits is None:
            self._steps.finish(out, inputs, None)
        else:
            grammar = _grammar_rows(masks, inputs.logits_slots) if masks else None
            batch = self._sampling.batch(
                inputs.logits_slots, inputs.draw_positions, self.state.tokens, grammar
            )
            drawn, logprobs = self._draw(inputs, launched.logits, batch)
            verdict = self._steps.finish(out, inputs, drawn)
        drawn_at = Mark(self.state.device)
        passes = self._propose(out)
        counts = drafts = None
        if out.propose and (self._proposer is not None or self.draft_model is not None):
            counts = self.state.num_drafts
            drafts = self._drafts([slot for slot, _ in out.propose]) if self._reads_drafts else None
        return PendingOutput(
            out, self.state.device, launched.started, drawn_at, verdict, logprobs, launched.prompt_logprobs,
            counts, drafts, passes,
        )  # fmt: skip

    def _propose(self, out: SchedulerOutput) -> PendingPasses | None:
        """Drafts for the next step: the proposer's, and where it found nothing the draft model's."""
        if out.propose and self._proposer is not None:
            slots, asked = zip(*out.propose, strict=True)
            self._proposer.propose(slots, asked)
        model, device = self.draft_model, self.state.device
        if model is None:
            return None
        started = Mark(device)
        rows = model.start(out)
        first = Mark(device)
        model.go_on()
        return PendingPasses(rows, started, first, model.from_model) if rows else None

    def _draw(self, inputs: StepInputs, logits: torch.Tensor, batch: SamplingBatch) -> Drawn:
        acceptance = self._acceptance
        if acceptance is None:
            return self._sampler.draw(logits, batch)
        read = inputs.input_ids[inputs.logits_rows]
        rows = VerifyRows.of(inputs.logits_slots, inputs.draw_positions, read)
        acceptance.before_draw(rows, batch)
        drawn = self._sampler.draw(logits, batch)
        acceptance.after_draw(rows, drawn.tokens)
        return drawn

    @torch.inference_mode()
    def time_rows(self, num_rows: int) -> float:
        """Seconds of a forward pass and its logits for this many rows, with no KV to read."""
        device = self.state.device
        ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        longest = min(num_rows, SHORT_ROWS)  # rows of a verify, not of a chunk
        metadata = AttentionMetadata.of_padding(num_rows, longest, device)
        # A GPU gets some passes at once, so that it never waits for the host's launches.
        repeats = 1 if device.type == "cpu" else 4
        started = Mark(device)
        for _ in range(repeats):
            whole, graphs = self.whole_steps, self.graphs
            if whole is None or graphs is None or not whole.time(graphs, num_rows):
                self.model.logits(self._forward(ids, metadata))
        ended = Mark(device)
        ended.wait()
        return started.seconds_until(ended) / repeats

    def _forward(
        self, input_ids: torch.Tensor, metadata: AttentionMetadata, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[num_tokens, hidden], or of the wanted rows; a graph's is valid until the next forward."""
        graphs = self.graphs
        if graphs is not None and graphs.replays(metadata):
            self.num_replayed += 1
            return graphs.replay(input_ids, metadata, wanted)
        self.num_eager += 1
        context = ForwardContext(metadata, self._kv_caches, wanted)
        return self.model.forward(input_ids, metadata.positions, context)

    def _drafts(self, slots: list[int]) -> torch.Tensor:
        """What lies behind the known tokens of these slots: [slots, MAX_DRAFTS]"""
        state = self.state
        rows = torch.tensor(slots).to(state.device, non_blocking=True)
        columns = state.num_tokens[rows, None] + torch.arange(MAX_DRAFTS, device=state.device)
        return state.tokens[rows[:, None], columns]

    def _enter(self, new: NewSlot) -> None:
        if self._proposer is not None:
            self._proposer.enter(new)
        if self._acceptance is not None:
            self._acceptance.enter(new)
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
            self._prompt_logprobs[new.slot] = _AskingPrompt(
                new.num_prompt_tokens, params.prompt_logprobs, new.num_computed_tokens
            )

    def _compute_prompt_logprobs(
        self, out: SchedulerOutput, hidden: torch.Tensor
    ) -> dict[int, PendingPrompt]:
        found: dict[int, PendingPrompt] = {}
        end_row = 0
        for index, (slot, num_rows, kind, _) in enumerate(out.rows):
            first, end_row = end_row, end_row + num_rows
            asking = self._prompt_logprobs.get(slot)
            if kind is RowKind.VERIFY or asking is None:
                continue
            start = asking.num_computed + 1  # the prompt token after the first row
            asking.num_computed += num_rows
            count = min(num_rows, asking.num_prompt_tokens - start)
            slices: list[LogprobTensors] = []
            for begin in range(0, count, _HEAD_SLICE):
                end = min(begin + _HEAD_SLICE, count)
                logits = self.model.logits(hidden[first + begin : first + end])
                targets = self.state.tokens[slot, start + begin : start + end].to(torch.int64)
                slices.append(self._sampler.logprobs(logits, targets, asking.num_top))
            if slices:
                tensors = LogprobTensors(*(torch.cat(parts) for parts in zip(*slices, strict=True)))
                found[index] = PendingPrompt(start, tensors, asking.num_top)
        return found


def _grammar_rows(masks: GrammarMasks, row_slots: npt.NDArray[np.int64]) -> Bitmask:
    rows: list[npt.NDArray[np.int64]] = []
    words: list[npt.NDArray[np.int32]] = []
    for slot, mask in masks.items():
        mine = np.flatnonzero(row_slots == slot)[: len(mask)]
        rows.append(mine)
        words.append(mask[: len(mine)])
    return Bitmask(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(words)))
