"""Runs once what serving will run, so that nothing is compiled or loaded while a request waits.

Triton compiles a kernel when it is first launched in some form, which takes from a tenth of a second
to several; from the cache on disk, it still takes milliseconds. The graphs have launched what lies in
them. The rest is launched here: steps too large for a graph, the head, the draws, and the bookkeeping
around a step. These are real steps of made-up requests, which leave nothing behind but stale slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch

from octavo.core.messages import (
    DraftEntry,
    DraftGroup,
    DraftRows,
    NewSlot,
    Propose,
    RowKind,
    Rows,
    SchedulerOutput,
    SlotKey,
)
from octavo.models.decoder import CausalLM
from octavo.sampling.batch import SamplingBatch
from octavo.sampling.sampler import Sampler
from octavo.sampling_params import SamplingParams
from octavo.worker.graph_sizes import SHORT_ROWS
from octavo.worker.input_batch import MAX_DRAFTS
from octavo.worker.model_runner import ModelRunner

# Rows of logits at which a kernel takes another form: see kernels/triton/products and select.
_LOGIT_ROWS = (1, 9, 17, 33, 65)
_PLAIN = SamplingParams(max_tokens=4, temperature=1.0)
_RULES = _PLAIN.replace(presence_penalty=0.1, logit_bias={0: 0.1}, allowed_token_ids=[0, 1, 2])
_SHORT_PROMPT, _SHORT_PROMPTS = 200, 1000  # rows of one, and of a step of them
_SHORTER_PROMPTS = (30, 12)  # the same: 34 and 84 that want a row


@dataclass(slots=True)
class _Room:
    """What the made-up requests have."""

    max_step_rows: int
    block_size: int
    num_blocks: int
    num_draft_blocks: int
    reads: bool
    step_ids: count[int]


def warm_up(
    runner: ModelRunner,
    sampler: Sampler,
    *,
    max_step_rows: int,
    block_size: int,
    num_blocks: int,
    num_draft_blocks: int = 0,
    reads: bool = True,
) -> None:
    """Launch every kernel of `runner` once. Before the first request, and on a GPU only.

    `reads` False: nothing is really launched, and there are no answers to read.
    """
    from octavo.kernels.triton import prompt

    room = _Room(max_step_rows, block_size, num_blocks, num_draft_blocks, reads, count(-1, -1))
    with torch.inference_mode():
        for rows in _LOGIT_ROWS:
            if rows <= max_step_rows:
                _draw_all(runner.model, sampler, rows)
        _run_steps(runner, room)
        weights = torch.empty(0, dtype=runner.model.dtype, device=runner.model.device)
        prompt.warm_up(runner.model.attention_specs[0], block_size, weights)
        torch.cuda.synchronize()
    runner.num_replayed = runner.num_eager = 0


def _draw_all(model: CausalLM, sampler: Sampler, rows: int) -> None:
    """The head, and each kind of draw."""
    device = model.device
    hidden = torch.zeros(rows, model.config.hidden_size, dtype=model.dtype, device=device)
    position = torch.zeros(rows, dtype=torch.int64, device=device)
    # temperature, top_k, top_p, min_p, log-probabilities
    kinds = (
        (0.0, 0, 1.0, 0.0, -1),
        (1.0, 0, 1.0, 0.0, 0),
        (1.0, 0, 1.0, 0.1, -1),
        (1.0, 5, 1.0, 0.0, 3),
        (1.0, 5, 0.9, 0.0, -1),
    )
    for temperature, top_k, top_p, min_p, num_logprobs in kinds:
        batch = SamplingBatch(
            temperature=torch.full((rows,), temperature),
            top_k=torch.full((rows,), top_k, dtype=torch.int32),
            top_p=torch.full((rows,), top_p),
            min_p=torch.full((rows,), min_p),
            seed=torch.zeros(rows, dtype=torch.int64),
            position=position,
            all_greedy=temperature == 0.0,
            num_logprobs=[num_logprobs] * rows if num_logprobs >= 0 else None,
        )
        sampler.draw(model.logits(hidden), batch)


def _run_steps(runner: ModelRunner, room: _Room) -> None:
    """Chunks with and without a graph, then decoding and verifying; the KV written is nobody's yet."""
    longest = min(runner.model.max_model_len, room.num_blocks * room.block_size) - MAX_DRAFTS - 2
    if longest < 1:
        return
    # One long prompt; some too short for a long chunk's attention, together too long for a graph; many rows;
    # and so many requests that each size of the last layer's wanted rows is there.
    for total, each in (
        (min(longest, room.max_step_rows), longest),
        (min(_SHORT_PROMPTS, room.max_step_rows), min(_SHORT_PROMPT, longest)),
        (room.max_step_rows, longest),
        *((min(_SHORT_PROMPTS, room.max_step_rows), min(rows, longest)) for rows in _SHORTER_PROMPTS),
    ):
        lengths: list[int] = []
        while total > 0 and len(lengths) < runner.state.num_slots:
            lengths.append(min(each, total))
            total -= lengths[-1]
        if lengths[0] > SHORT_ROWS + 3 and len(lengths) < runner.state.num_slots:
            lengths[0] -= 3
            lengths.append(3)  # attention plans short and long requests apart
        for width in (1, 1 + MAX_DRAFTS) if runner.proposes else (1,):
            _one_life(runner, lengths, width, room)
    _one_life(runner, [min(3, longest)], 1, room, _RULES)


def _one_life(
    runner: ModelRunner, lengths: list[int], width: int, room: _Room, params: SamplingParams = _PLAIN
) -> None:
    """Requests of these lengths enter, decode once with rows of this width, and leave."""
    reach = -(-(max(lengths) + MAX_DRAFTS + 1) // room.block_size)
    keys = [SlotKey(slot, 0, f"warm up {slot}") for slot in range(len(lengths))]
    first = SchedulerOutput(
        next(room.step_ids),
        new_slots=[
            NewSlot(
                slot=slot, generation=0, request_id=f"warm up {slot}", token_ids=[0] * length,
                num_prompt_tokens=length, block_ids=[block % room.num_blocks for block in range(reach)],
                num_computed_tokens=0, params=params, seed=0, stop_token_ids=(),
                limit=length + MAX_DRAFTS + 1,
            )
            for slot, length in enumerate(lengths)
        ],
        rows=[Rows(slot, length, RowKind.CHUNK, True) for slot, length in enumerate(lengths)],
        row_keys=keys,
        propose=[Propose(slot, width - 1) for slot in range(len(lengths))] if width > 1 else [],
    )  # fmt: skip
    if runner.draft_model is not None and width > 1:
        own = [block % room.num_draft_blocks for block in range(reach)]
        first.draft = DraftGroup(
            entered=[DraftEntry(slot, 0, own) for slot in range(len(lengths))],
            rows=[DraftRows(slot, max(0, length - 1), width - 1) for slot, length in enumerate(lengths)],
        )
    _step(runner, first, room.reads)
    deciding = max(1, min(len(lengths), room.max_step_rows // width))
    second = SchedulerOutput(
        next(room.step_ids),
        rows=[Rows(slot, width, RowKind.VERIFY, True) for slot in range(deciding)],
        row_keys=keys[:deciding],
    )
    _step(runner, second, room.reads)
    runner.change(SchedulerOutput(next(room.step_ids), freed_slots=list(range(len(lengths)))))


def _step(runner: ModelRunner, out: SchedulerOutput, reads: bool) -> None:
    runner.forward(out)
    output = runner.sample()
    if reads:
        output.read()
