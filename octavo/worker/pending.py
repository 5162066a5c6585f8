"""The answer of a step that was launched: read when it is there.

On a CPU it is read at once. On a GPU the tokens are copied to the host behind the step, the host
launches the next one, and `read` waits for this step alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from octavo.core.messages import (
    DraftPasses,
    Finish,
    ModelOutput,
    PromptLogprobs,
    RowKind,
    SchedulerOutput,
    TokenLogprobs,
)
from octavo.sampling.sampler import NO_TOKEN, AskedLogprobs, LogprobTensors, token_logprobs
from octavo.worker.device_time import Mark, Readback
from octavo.worker.step_math import Verdict

_NO_TOKEN_MESSAGE = (
    "no token is legal here: the masks of this request (structured_outputs, allowed_token_ids, "
    "logit_bias, bad_words, min_tokens) exclude each other, or the model computed no finite logit"
)


class PendingPasses(NamedTuple):
    """What the draft model computes at the end of the step."""

    rows: list[int]  # of each pass
    started: Mark
    first: Mark  # the end of the first pass
    from_model: torch.Tensor  # [slots] bool: these drafts are its own


class PendingPrompt(NamedTuple):
    """Log-probabilities of some tokens of a prompt, still where they were computed."""

    start: int  # place of the first in the prompt
    tensors: LogprobTensors
    num_top: int

    def read(self, tensors: Iterator[torch.Tensor]) -> PromptLogprobs:
        """From the tensors as they are on the host, taken in order."""
        found = LogprobTensors(*(next(tensors) for _ in LogprobTensors._fields))
        return PromptLogprobs(self.start, token_logprobs(found, [self.num_top] * len(found.logprobs)))


class PendingOutput:
    """One step on its way. `read` may be called once."""

    def __init__(
        self,
        out: SchedulerOutput,
        device: torch.device,
        started: Mark,
        drawn: Mark,  # the end of the target's part
        verdict: Verdict | None,  # None: nothing was sampled
        logprobs: AskedLogprobs | None,
        prompt_logprobs: Mapping[int, PendingPrompt],  # by place among the step's rows
        draft_counts: torch.Tensor | None,  # [slots] how many drafts were made; None: none were asked for
        drafts: torch.Tensor | None,  # [asked, MAX_DRAFTS], where the host wants to know them
        passes: PendingPasses | None = None,
    ) -> None:
        self._out = out
        self._started, self._drawn = started, drawn
        self._asked = logprobs
        self._has_verdict = verdict is not None
        self._prompt_logprobs = prompt_logprobs
        tensors: list[torch.Tensor] = []
        self._width = 0  # tokens of a request, where they come in one piece with the numbers
        if verdict is not None and verdict.packed is not None:
            self._width = verdict.tokens.shape[1]
            tensors.append(verdict.packed)
        elif verdict is not None:
            tensors += (verdict.tokens, verdict.numbers)
        if logprobs is not None:
            tensors += logprobs.tensors
        for prompt in prompt_logprobs.values():
            tensors += prompt.tensors
        self._has_counts, self._has_drafts = draft_counts is not None, drafts is not None
        if draft_counts is not None:
            tensors.append(draft_counts)
        if drafts is not None:
            tensors.append(drafts)
        self._passes = passes
        if passes is not None:
            tensors.append(passes.from_model)
        self._readback = Readback(tensors, device)
        self._output = self._make() if device.type == "cpu" else None

    def read(self) -> ModelOutput:
        """The step's output; waits for it."""
        return self._make() if self._output is None else self._output

    def _make(self) -> ModelOutput:
        out, tensors = self._out, iter(self._readback.wait())
        count = len(out.rows)
        output = ModelOutput(
            step_id=out.step_id,
            keys=out.row_keys,
            tokens=[[] for _ in range(count)],
            num_drafts_valid=[0] * count,
            num_accepted=[0] * count,
            finished=[Finish.NO] * count,
            logprobs=[None] * count,
            prompt_logprobs=[None] * count,
            target_seconds=self._started.seconds_until(self._drawn),
        )
        if self._has_verdict:
            tokens = next(tensors)
            if self._width:
                sampled = len(tokens) // (self._width + 4)
                tokens, numbers = tokens[: -4 * sampled].view(sampled, -1), tokens[-4 * sampled :].view(4, -1)
            else:
                numbers = next(tensors)
            logprobs = None
            if self._asked is not None:
                found = LogprobTensors(*(next(tensors) for _ in LogprobTensors._fields))
                logprobs = self._asked._replace(tensors=found).read()
            _fill(output, out, tokens.tolist(), numbers.tolist(), logprobs)
        for index, prompt in self._prompt_logprobs.items():
            output.prompt_logprobs[index] = prompt.read(tensors)
        if self._has_counts:
            counts = next(tensors)
            slots = [slot for slot, _ in out.propose]
            made = counts[slots].tolist()
            output.num_drafted = dict(zip(slots, made, strict=True))
            output.draft_seconds = self._drawn.seconds_until(self._readback.mark)
            if self._has_drafts:
                rows = next(tensors).tolist()
                output.drafts = {
                    slot: row[:number] for slot, row, number in zip(slots, rows, made, strict=True)
                }
        if self._passes is not None:
            from_model = next(tensors).tolist()
            output.drafted_by_model = frozenset(slot for slot, _ in out.propose if from_model[slot])
            output.draft_seconds = self._drawn.seconds_until(self._readback.mark)
            first = self._passes.started.seconds_until(self._passes.first)
            output.draft_passes = DraftPasses(self._passes.rows, first)
        return output


def _fill(
    output: ModelOutput,
    out: SchedulerOutput,
    tokens: list[list[int]],
    numbers: list[list[int]],
    logprobs: list[TokenLogprobs | None] | None,
) -> None:
    """Put what was read back where its requests are."""
    emitted, drafts, accepted, finished = numbers
    place, start = 0, 0  # among the sampled requests, and among the rows of logits
    for index, (_, num_rows, kind, samples) in enumerate(out.rows):
        if not samples:
            continue
        mine = tokens[place][: emitted[place]]
        if ended := finished[place]:
            output.finished[index] = Finish(ended)
            if mine[-1] == NO_TOKEN:
                mine.pop()
                output.errors[output.keys[index]] = _NO_TOKEN_MESSAGE
        output.tokens[index] = mine
        output.num_drafts_valid[index] = drafts[place]
        output.num_accepted[index] = accepted[place]
        if logprobs is not None and logprobs[start] is not None:
            output.logprobs[index] = [entry for entry in logprobs[start : start + len(mine)] if entry]
        place += 1
        start += num_rows if kind is RowKind.VERIFY else 1
