"""The sampling side of one step: from per-slot settings to per-row tensors.

When a request enters a slot, `compile_params` turns its SamplingParams into a small plain object,
and `SamplingSlots` keeps its numbers in columns. A step then says which slot each row of logits
belongs to and at which position it draws, and `SamplingSlots.batch` gathers the columns: a few
fancy indexes, however many requests there are. What few requests use (penalties, bias, bans,
masks) lies in a dict of the slots that need it, and costs nothing to the others.

A *row* here is one row of logits; it draws the token at `position`, counted from the start of the
prompt. Its history is `tokens[slot, :position]`: whoever fills the token table puts the drafts
in front of a row there before, so that every row sees the true prefix of its position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from octavo.sampling.noise import signed_bits
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.sampling.device_rules import DeviceRules, RuleRows

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SlotSampling:
    """One request's sampling settings, as the device side wants them."""

    temperature: float  # 0 is greedy
    top_k: int  # 0 is off
    top_p: float
    min_p: float
    seed: int  # signed 64-bit bits
    num_logprobs: int  # -1: not asked for
    num_prompt_tokens: int
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias_ids: IntArray | None = None
    bias_values: npt.NDArray[np.float32] | None = None
    allowed_words: npt.NDArray[np.int32] | None = None  # [ceil(vocab_size / 32)] bit mask
    min_tokens: int = 0  # while fewer tokens were generated, stop_ids are banned
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def has_penalties(self) -> bool:
        """True if the request's history changes its logits by a penalty."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def is_plain(self) -> bool:
        """True if the columns alone say everything."""
        return (
            not self.has_penalties
            and self.bias_ids is None
            and self.allowed_words is None
            and not self.bad_words
            and not (self.min_tokens and self.stop_ids)
        )


def compile_params(
    params: SamplingParams,
    *,
    seed: int,
    num_prompt_tokens: int,
    vocab_size: int,
    stop_ids: Iterable[int] = (),
    bad_words_ids: Iterable[Sequence[int]] = (),
) -> SlotSampling:
    """Settings of one request that enters a slot.

    `seed` is final (64 bit). `stop_ids` are all token ids that end the request, end-of-sequence
    included unless ignore_eos. `bad_words_ids` are the bad words' token sequences, each word in the
    spellings that shall be banned (see `bad_word_spellings`).
    """
    bias_ids = bias_values = None
    if params.logit_bias:
        bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        bias_values = np.fromiter(params.logit_bias.values(), dtype=np.float32)
    allowed = None
    if params.allowed_token_ids is not None:
        allowed = mask_words(params.allowed_token_ids, vocab_size)
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    return SlotSampling(
        temperature=0.0 if params.is_greedy else params.temperature,
        top_k=top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=signed_bits(seed),
        num_logprobs=-1 if params.logprobs is None else params.logprobs,
        num_prompt_tokens=num_prompt_tokens,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        bias_ids=bias_ids,
        bias_values=bias_values,
        allowed_words=allowed,
        min_tokens=params.min_tokens,
        stop_ids=tuple(token for token in stop_ids if 0 <= token < vocab_size),
        bad_words=tuple(tuple(word) for word in bad_words_ids if len(word) > 0),
    )


def bad_word_spellings(words: Iterable[str], encode: Callable[[str], Sequence[int]]) -> list[tuple[int, ...]]:
    """Token sequences that spell bad words: each word as it stands and after a space.

    `encode` turns text into ids without special tokens. Tokenizers write a word differently at the
    start of a text and within it, and both have to go.
    """
    spellings: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(" "), " " + word.lstrip(" ")):
            ids = tuple(encode(text))
            if text.strip(" ") and ids:
                spellings[ids] = None
    return list(spellings)


def mask_words(token_ids: Iterable[int], vocab_size: int) -> npt.NDArray[np.int32]:
    """A bit mask that allows just these tokens: bit (id % 32) of int32 word (id // 32)."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[np.fromiter(token_ids, dtype=np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32, copy=False)


@dataclass(slots=True)
class Penalties:
    """Rows with a penalty, and where their histories lie."""

    rows: list[int]  # rows of logits
    slots: list[int]  # rows of `tokens`
    lengths: list[int]  # history of each row, prompt included
    prompt_lengths: list[int]
    repetition: list[float]
    presence: list[float]
    frequency: list[float]
    tokens: torch.Tensor  # [slots, max_len] int32


@dataclass(slots=True)
class LogitBias:
    """Numbers added to single logits; no (row, id) appears twice."""

    rows: torch.Tensor  # [entries] int64
    ids: torch.Tensor  # [entries] int64
    values: torch.Tensor  # [entries] float32


@dataclass(slots=True)
class BannedTokens:
    """Single tokens that may not be drawn; duplicates do no harm."""

    rows: torch.Tensor  # [entries] int64
    ids: torch.Tensor  # [entries] int64


@dataclass(slots=True)
class Bitmask:
    """Tokens that may be drawn, for the rows that have such a mask. A row may appear more than once.

    Tokens behind the last word are not allowed: a grammar knows only the tokenizer's vocabulary,
    and a model's may be padded.
    """

    rows: torch.Tensor  # [entries] int64
    words: torch.Tensor  # [entries, num_words] int32, bit (id % 32) of word (id // 32)


@dataclass(slots=True)
class JudgedRows:
    """Rows whose draft was drawn from a known distribution: they are drawn by rejection sampling."""

    rows: torch.Tensor  # [n] int64 on the host, rows of logits
    tokens: torch.Tensor  # [n] int64, the drafts; -1: the row checks none after all
    probs: torch.Tensor  # [n, draft vocabulary] float32, what each draft was drawn from
    coins: torch.Tensor  # [n] float32, uniform


@dataclass(slots=True)
class SamplingBatch:
    """Everything the sampler must know about a step's rows of logits. None: no row needs it.

    A row with position -1 is padding; what is drawn for it means nothing.
    """

    temperature: torch.Tensor  # [rows] float32, 0 is greedy
    top_k: torch.Tensor  # [rows] int32, 0 is off
    top_p: torch.Tensor  # [rows] float32
    min_p: torch.Tensor  # [rows] float32
    seed: torch.Tensor  # [rows] int64, the bits of the unsigned seed
    position: torch.Tensor  # [rows] int64
    all_greedy: bool = False
    allowed: Bitmask | None = None
    grammar: Bitmask | None = None
    banned: BannedTokens | None = None
    logit_bias: LogitBias | None = None
    penalties: Penalties | None = None
    rules: RuleRows | None = None  # the last four and `allowed`, where a device works them out itself
    num_logprobs: list[int] | None = None  # a row's number of top logprobs; -1: not asked for
    judged: JudgedRows | None = None  # with rejection sampling

    def take(self, rows: torch.Tensor) -> SamplingBatch:
        """The columns of some rows [n] int64 (on the host), without what changes logits."""

        def take(column: torch.Tensor) -> torch.Tensor:
            return column[rows.to(column.device, non_blocking=True)]

        return SamplingBatch(
            take(self.temperature), take(self.top_k), take(self.top_p), take(self.min_p), take(self.seed),
            take(self.position), all_greedy=self.all_greedy,
        )  # fmt: skip

    @property
    def changes_logits(self) -> bool:
        """True if a processor will write into the logits."""
        return any(
            part is not None
            for part in (
                self.allowed,
                self.grammar,
                self.banned,
                self.logit_bias,
                self.penalties,
                self.rules,
            )
        )


class SamplingSlots:
    """Sampling settings of all slots, in columns. Slots that are free hold stale values."""

    def __init__(self, num_slots: int, rules: DeviceRules | None = None) -> None:
        """`rules`: a device keeps what changes logits; None: each step brings it, which reads positions."""
        self._rules = rules
        self._temperature = np.zeros(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int32)
        self._top_p = np.ones(num_slots, dtype=np.float32)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._seed = np.zeros(num_slots, dtype=np.int64)
        self._num_logprobs = np.full(num_slots, -1, dtype=np.int64)
        self._is_special = np.zeros(num_slots, dtype=np.bool_)
        self._only_draws = np.zeros(num_slots, dtype=np.bool_)
        self._special: dict[int, SlotSampling] = {}

    def put(self, slot: int, sampling: SlotSampling) -> None:
        """A request enters `slot`."""
        self._temperature[slot] = sampling.temperature
        self._top_k[slot] = sampling.top_k
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._seed[slot] = sampling.seed
        self._num_logprobs[slot] = sampling.num_logprobs
        self._is_special[slot] = not sampling.is_plain
        filters = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
        self._only_draws[slot] = sampling.is_plain and not filters and sampling.num_logprobs < 0
        if sampling.is_plain:
            self._special.pop(slot, None)
            return
        self._special[slot] = sampling
        if self._rules is not None:
            self._rules.put(slot, sampling)

    def remove(self, slot: int) -> None:
        """The request of `slot` has left; what it alone needed is let go."""
        self._is_special[slot] = False
        self._num_logprobs[slot] = -1
        self._special.pop(slot, None)

    def only_draw(self, slots: IntArray) -> bool:
        """True if temperature and seed say everything about the draws of these slots."""
        return bool(self._only_draws[slots].all())

    def batch(
        self,
        row_slots: IntArray,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        grammar: Bitmask | None = None,
    ) -> SamplingBatch:
        """The batch of one step.

        row_slots: [rows] the slot of each row. positions: [rows] int64, where each row draws, -1 for
        padding; on the CPU, or where the device keeps the rules. tokens: [slots, max_len] int32,
        confirmed tokens and this step's drafts. grammar: masks of the rows that have a grammar.
        """
        temperature = self._temperature[row_slots]
        batch = SamplingBatch(
            temperature=torch.from_numpy(temperature),
            top_k=torch.from_numpy(self._top_k[row_slots]),
            top_p=torch.from_numpy(self._top_p[row_slots]),
            min_p=torch.from_numpy(self._min_p[row_slots]),
            seed=torch.from_numpy(self._seed[row_slots]),
            position=positions,
            all_greedy=not temperature.any(),
            grammar=grammar,
        )
        num_logprobs = self._num_logprobs[row_slots]
        if (num_logprobs >= 0).any():
            batch.num_logprobs = num_logprobs.tolist()
        if self._special and (is_special := self._is_special[row_slots]).any():
            if self._rules is None:
                self._add_special_parts(batch, row_slots, tokens)
            else:
                batch.rules = self._rules.rows(row_slots, is_special, self._special, tokens)
        return batch

    def _add_special_parts(self, batch: SamplingBatch, row_slots: IntArray, tokens: torch.Tensor) -> None:
        penalties = Penalties([], [], [], [], [], [], [], tokens)
        bias: list[tuple[int, SlotSampling]] = []
        allowed_rows: list[int] = []
        allowed_words: list[npt.NDArray[np.int32]] = []
        banned_rows: list[int] = []
        banned_ids: list[int] = []
        slots = row_slots.tolist()
        positions = batch.position.tolist()
        for row in np.flatnonzero(self._is_special[row_slots]).tolist():
            slot, position = slots[row], positions[row]
            if position < 0:
                continue
            sampling = self._special[slot]
            if sampling.has_penalties:
                penalties.rows.append(row)
                penalties.slots.append(slot)
                penalties.lengths.append(position)
                penalties.prompt_lengths.append(sampling.num_prompt_tokens)
                penalties.repetition.append(sampling.repetition_penalty)
                penalties.presence.append(sampling.presence_penalty)
                penalties.frequency.append(sampling.frequency_penalty)
            if sampling.bias_ids is not None:
                bias.append((row, sampling))
            if sampling.allowed_words is not None:
                allowed_rows.append(row)
                allowed_words.append(sampling.allowed_words)
            banned = banned_now(sampling, tokens[slot], position)
            banned_rows.extend([row] * len(banned))
            banned_ids.extend(banned)

        if penalties.rows:
            batch.penalties = penalties
        if bias:
            batch.logit_bias = _gather_bias(bias)
        if allowed_rows:
            batch.allowed = Bitmask(torch.tensor(allowed_rows), torch.from_numpy(np.stack(allowed_words)))
        if banned_rows:
            batch.banned = BannedTokens(torch.tensor(banned_rows), torch.tensor(banned_ids))


def banned_now(sampling: SlotSampling, tokens: torch.Tensor, position: int) -> list[int]:
    """Token ids that may not be drawn at `position`, with `tokens[:position]` in front of it.

    Stop tokens while fewer than min_tokens were generated, and the last token of a bad word whose
    other tokens the generated text ends in (the prompt's end counts too, so that a word begun
    there is not completed).
    """
    banned: list[int] = []
    if position - sampling.num_prompt_tokens < sampling.min_tokens:
        banned.extend(sampling.stop_ids)
    if sampling.bad_words:
        longest = max(len(word) for word in sampling.bad_words) - 1
        start = max(0, position - longest)
        tail = tokens[start:position].tolist()
        for word in sampling.bad_words:
            prefix = list(word[:-1])
            if len(prefix) <= len(tail) and tail[len(tail) - len(prefix) :] == prefix:
                banned.append(word[-1])
    return banned


def _gather_bias(entries: list[tuple[int, SlotSampling]]) -> LogitBias:
    rows: list[IntArray] = []
    ids: list[IntArray] = []
    values: list[npt.NDArray[np.float32]] = []
    for row, sampling in entries:
        assert sampling.bias_ids is not None
        assert sampling.bias_values is not None
        rows.append(np.full(len(sampling.bias_ids), row, dtype=np.int64))
        ids.append(sampling.bias_ids)
        values.append(sampling.bias_values)
    return LogitBias(
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(np.concatenate(values)),
    )
