"""The two plain messages that cross between the brain and the muscle.

The scheduler hands out rows in a `SchedulerOutput`; the model runner answers with a
`ModelOutput`, which the scheduler may read one step late. Neither holds a tensor, so that both
can be tested in milliseconds and sent to another process.

Words: a *slot* is a place on the device that holds one running request (its tokens, block table,
sampling parameters and counters). A *generation* tells apart the requests that used one slot
after another. A *row* is one token position computed in this step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from octavo.sampling_params import SamplingParams


class RowKind(IntEnum):
    """What a request's rows of one step are."""

    CHUNK = 0  # known tokens that are computed in order: prompt, or recompute after a preemption
    VERIFY = 1  # the last token, then the drafts proposed at the end of the previous step


class Finish(IntEnum):
    """Why the device ended a request in this step."""

    NO = 0
    STOP = 1  # a stop token (an end-of-sequence token included)
    LENGTH = 2  # the request reached its limit


class SlotKey(NamedTuple):
    """Who sat in a slot when a step was launched."""

    slot: int
    generation: int
    request_id: str


@dataclass(slots=True)
class NewSlot:
    """A request enters a slot; everything the device must know about it."""

    slot: int
    generation: int
    request_id: str
    token_ids: list[int]  # all confirmed tokens, prompt then output
    num_prompt_tokens: int
    block_ids: list[int]
    num_computed_tokens: int  # tokens whose KV is in the blocks already
    params: SamplingParams
    seed: int  # 64 bit, final: nothing is added to it on the device
    stop_token_ids: tuple[int, ...]  # end-of-sequence tokens included, unless ignore_eos
    limit: int  # the request never holds more than this many tokens, prompt included
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    prediction_ids: tuple[int, ...] = ()  # a guess of the whole output, for drafters


class SlotBlocks(NamedTuple):
    """Blocks appended to the block table of a running slot."""

    slot: int
    block_ids: list[int]


class Rows(NamedTuple):
    """One request's rows of a step.

    A CHUNK of n rows computes the n tokens that follow the device's num_computed_tokens.
    VERIFY with n rows computes the last token and up to n - 1 drafts; rows whose draft was never
    made are padding. `samples` is set for every VERIFY and for the CHUNK that reaches the last
    known token: only such rows emit tokens.
    """

    slot: int
    num_rows: int
    kind: RowKind
    samples: bool


class Propose(NamedTuple):
    """Make up to `num_drafts` drafts for this slot at the end of the step."""

    slot: int
    num_drafts: int


class DraftEntry(NamedTuple):
    """A running slot gets a block table of its own in the draft model's KV cache."""

    slot: int
    num_computed_tokens: int  # tokens whose draft KV is in the blocks already
    block_ids: list[int]


class DraftRows(NamedTuple):
    """What the draft model computes for one slot at the end of a step.

    First `catch_up` known tokens that follow the device's own count of computed ones (as many of
    them as are known, the last one excepted). Then, if `num_drafts` is not 0 and no more than two
    known tokens are left, these and up to num_drafts drafts, one pass each.
    """

    slot: int
    catch_up: int
    num_drafts: int


@dataclass(slots=True)
class DraftGroup:
    """The draft model's part of a step, in this order: leave, enter, grow, run.

    A slot that is freed, or entered anew, has left by that.
    """

    left: list[int] = field(default_factory=list)
    entered: list[DraftEntry] = field(default_factory=list)
    new_blocks: list[SlotBlocks] = field(default_factory=list)
    rows: list[DraftRows] = field(default_factory=list)


class Continuation(NamedTuple):
    """A guess made on the host: from position `start` on, the text of this slot may go on like this.

    The device follows it while the true tokens do (method "suffix").
    """

    slot: int
    start: int
    token_ids: list[int]


@dataclass(slots=True)
class SchedulerOutput:
    """What one step computes, in the order given here: free, enter, grow, run, propose."""

    step_id: int
    freed_slots: list[int] = field(default_factory=list)
    new_slots: list[NewSlot] = field(default_factory=list)
    new_blocks: list[SlotBlocks] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    row_keys: list[SlotKey] = field(default_factory=list)  # parallel to rows
    propose: list[Propose] = field(default_factory=list)
    mask_slots: list[int] = field(default_factory=list)  # slots whose logits wait for a grammar mask
    continuations: list[Continuation] = field(default_factory=list)  # known before the drafts are made
    draft: DraftGroup | None = None  # None: there is no draft model

    @property
    def needs_mask(self) -> bool:
        """True if the second launch of the step waits for the host's grammar masks."""
        return bool(self.mask_slots)

    @property
    def num_tokens(self) -> int:
        """Token rows of this step, before any padding."""
        return sum(rows.num_rows for rows in self.rows)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, from a float32 softmax of the raw logits."""

    logprob: float  # of the token itself
    rank: int  # of the token itself, 1 is the most probable
    top_ids: list[int]  # most probable first
    top_logprobs: list[float]


class PromptLogprobs(NamedTuple):
    """Log-probabilities of consecutive prompt tokens; the first is token `start` of the prompt."""

    start: int
    entries: list[TokenLogprobs]


@dataclass(slots=True)
class DraftPasses:
    """What the draft model computed at the end of a step."""

    rows: list[int]  # token rows of each pass, the first of them with what it caught up
    first_seconds: float = 0.0  # of the first pass; 0: not measured apart


@dataclass(slots=True)
class ModelOutput:
    """What one step brought. Every list is parallel to `keys`, the rows the step was launched with."""

    step_id: int
    keys: list[SlotKey]
    tokens: list[list[int]]  # emitted, already cut after a stop token and at the limit
    num_drafts_valid: list[int]  # drafts that were really verified
    num_accepted: list[int]  # drafts accepted, counted within the emitted tokens
    finished: list[Finish]
    # per emitted token; None where the request did not ask
    logprobs: list[list[TokenLogprobs] | None]
    # of the prompt tokens that follow the rows of a chunk; only for requests that asked
    prompt_logprobs: list[PromptLogprobs | None]
    # why the request cannot go on (a mask without a legal token, say); None for nearly all
    errors: dict[SlotKey, str] = field(default_factory=dict)
    # drafts made at the end of the step, by slot; the next step verifies them
    drafts: dict[int, list[int]] = field(default_factory=dict)
    # how many were made, by slot; None where the device has not waited to know
    num_drafted: dict[int, int] | None = None
    # slots whose drafts of this step a draft model made, where a lookup might have made them
    drafted_by_model: frozenset[int] = frozenset()
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    draft_passes: DraftPasses | None = None  # None: the draft model did not run
