"""A request as the brain sees it: its tokens, how far they are computed, and what is in flight.

Two counters tell how far the device is. `num_computed_tokens` is what has been confirmed: the
outputs of those steps were read. `num_inflight_tokens` is an upper bound of what the launched but
unread steps may add: exact for chunks, 1 + K for a verify that may accept 0 to K drafts. The
device alone knows the true position in between.

    token_ids   |---------- prompt ----------|--- output ---|
                |--- num_computed_tokens ---|-- inflight --|
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import TYPE_CHECKING

from octavo.core.block_pool import Block
from octavo.core.draft_plan import DraftState
from octavo.core.messages import SlotKey
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.core.draft_kv import DraftProgress


class Status(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # new, or preempted: holds no slot once its last step was read
    RUNNING = "running"  # has a slot
    FINISHED = "finished"  # ended; a zombie while launched steps still hold it


class FinishReason(str, Enum):
    """Why a request ended, in the words of the OpenAI API where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Request:
    """One sequence to generate. n > 1 makes n of these, one for each sample.

    `limit` is the most tokens the request may ever hold, prompt included. `cache_namespace`
    keeps prefixes of different worlds apart (cache salts, adapters); None means that this
    request neither reads nor fills the prefix cache.
    """

    __slots__ = (
        "arrival", "bad_words_ids", "blocks", "cache_namespace", "capacity", "decision", "decoding",
        "draft_progress", "draft_state", "finish_reason", "generation", "key", "limit", "num_cached_tokens",
        "num_computed_tokens", "num_inflight_samples", "num_inflight_steps", "num_inflight_tokens",
        "num_preemptions", "num_prompt_tokens", "num_proposed", "num_registered_blocks",
        "num_speculative_tokens", "params", "prediction_ids", "prefix_parent", "priority", "read_cache",
        "request_id", "seed", "slot", "status", "stop_token_ids", "token_ids", "uses_mask",
        "verified_decision",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        seed: int,
        limit: int,
        arrival: int,
        stop_token_ids: tuple[int, ...] = (),
        bad_words_ids: tuple[tuple[int, ...], ...] = (),
        prediction_ids: tuple[int, ...] = (),
        priority: int = 0,
        cache_namespace: Hashable | None = "",
        read_cache: bool = True,
        uses_mask: bool = False,
    ) -> None:
        assert 0 < len(prompt_token_ids) < limit, "checked before a request is made"
        self.request_id = request_id
        self.params = params
        self.seed = seed
        self.limit = limit
        self.arrival = arrival
        self.priority = priority
        self.stop_token_ids = stop_token_ids
        self.bad_words_ids = bad_words_ids
        self.prediction_ids = prediction_ids
        self.cache_namespace = cache_namespace
        self.read_cache = read_cache
        self.uses_mask = uses_mask

        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_inflight_tokens = 0
        self.num_inflight_steps = 0
        self.num_inflight_samples = 0  # launched steps that emit at least one token
        self.decoding = False  # the rows that reach the last known token were launched
        self.num_speculative_tokens: int | None = None  # the request's own wish; None: the engine's
        self.draft_state: DraftState | None = None  # the draft budget's
        self.draft_progress: DraftProgress | None = None  # the draft model's KV cache's, while it runs
        self.decision = (0, "")  # with trace: the drafts asked for, and why
        self.verified_decision = (0, "")  # the same of the step that was launched last
        self.num_proposed = 0  # drafts the last launched step makes at its end
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # prompt tokens the first admission found in the cache
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None

        self.slot = -1
        self.generation = -1
        self.key = SlotKey(-1, -1, request_id)
        self.blocks: list[Block] = []
        self.capacity = 0  # tokens the blocks hold
        self.num_registered_blocks = 0
        self.prefix_parent: Hashable = None

    @property
    def num_tokens(self) -> int:
        """Confirmed tokens, prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Confirmed output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the confirmed output tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_zombie(self) -> bool:
        """True while launched steps still hold a request that no longer runs."""
        return self.status is not Status.RUNNING and self.num_inflight_steps > 0

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: smaller priority, then earlier arrival."""
        return (self.priority, self.arrival)

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, {self.status.value}, tokens={self.num_tokens}, "
            f"computed={self.num_computed_tokens}+{self.num_inflight_tokens}, slot={self.slot})"
        )
