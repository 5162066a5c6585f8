"""A caller's request inside the engine: its samples, their texts, and the output they become.

The scheduler knows only single sequences; a request with n (or best_of) samples is several of
them, its *samples*. Here they meet again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import count
from typing import Literal
from weakref import WeakKeyDictionary

from octavo.core.messages import PromptLogprobs, TokenLogprobs
from octavo.core.request import FinishReason, Request
from octavo.engine.detokenizer import IncrementalDetokenizer
from octavo.engine.grammar import Matcher
from octavo.engine.tokenizer import Tokenizer
from octavo.outputs import CompletionOutput, Logprob, LogprobsAt, RequestMetrics, RequestOutput
from octavo.sampling_params import SamplingParams

# final: one output, at the end. cumulative: one a step, each with everything so far.
# delta: one a step, each with what is new.
OutputKind = Literal["final", "cumulative", "delta"]

# Texts of single tokens, as log-probabilities show them: decoding one again costs more than all else.
_MAX_TEXTS = 1 << 18  # more than most vocabularies have
_texts_of: WeakKeyDictionary[Tokenizer, dict[int, str]] = WeakKeyDictionary()


@dataclass(slots=True)
class Sample:
    """One sequence: what it has said so far."""

    index: int
    request: Request
    detokenizer: IncrementalDetokenizer | None  # None without a tokenizer
    matcher: Matcher | None = None
    logprobs: list[LogprobsAt] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    drafts_held: bool = False  # all drafts of the last verification were right
    sent_tokens: int = 0  # with deltas: what the caller has
    new_text: str = ""  # with deltas: what the caller does not have
    energy_mark: float | None = None  # the energy account when it was first scheduled; None: there is none

    def add_logprobs(
        self, entries: list[TokenLogprobs], token_ids: list[int], tokenizer: Tokenizer | None
    ) -> None:
        """Log-probabilities of the tokens of one step."""
        if self.logprobs is None:
            self.logprobs, self.cumulative_logprob = [], 0.0
        assert self.cumulative_logprob is not None
        texts = token_texts(tokenizer)
        for token_id, entry in zip(token_ids, entries, strict=True):
            self.logprobs.append(logprobs_at(token_id, entry, tokenizer, texts))
            self.cumulative_logprob += entry.logprob

    @property
    def mean_logprob(self) -> float:
        """What best_of ranks by."""
        num_tokens = self.request.num_output_tokens
        return (self.cumulative_logprob or 0.0) / num_tokens if num_tokens else float("-inf")


@dataclass(slots=True)
class RequestState:
    """Everything the engine keeps about a request between steps."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    kind: OutputKind
    metrics: RequestMetrics
    samples: list[Sample] = field(default_factory=list)
    prompt_logprobs: list[LogprobsAt | None] | None = None

    @property
    def finished(self) -> bool:
        """True once all samples have ended."""
        for sample in self.samples:  # noqa: SIM110 - asked for every request in every step
            if sample.finish_reason is None:
                return False
        return True

    def add_prompt_logprobs(self, found: PromptLogprobs, tokenizer: Tokenizer | None) -> None:
        """Of a chunk of the prompt. A prompt that is computed again brings some a second time."""
        if self.prompt_logprobs is None:
            self.prompt_logprobs = [None]
        known = len(self.prompt_logprobs)
        texts = token_texts(tokenizer)
        for position, entry in enumerate(found.entries, start=found.start):
            if position >= known:
                token_id = self.prompt_token_ids[position]
                self.prompt_logprobs.append(logprobs_at(token_id, entry, tokenizer, texts))

    def output(self) -> RequestOutput:
        """What the caller gets now. While requests stream this runs for each of them in every step."""
        finished, samples, metrics = self.finished, self.samples, self.metrics
        if finished and metrics.finished_time is None:
            metrics.finished_time = time.monotonic()
        first = samples[0].request
        metrics.num_cached_tokens = first.num_cached_tokens
        if len(samples) == 1:
            metrics.num_output_tokens = len(first.token_ids) - first.num_prompt_tokens
            metrics.num_preemptions = first.num_preemptions
            outputs = [self._completion(samples[0], 0)]
        else:
            metrics.num_output_tokens = max(s.request.num_output_tokens for s in samples)
            metrics.num_preemptions = sum(s.request.num_preemptions for s in samples)
            if self.params.best_of is not None and finished:
                ranked = sorted(samples, key=lambda sample: -sample.mean_logprob)
                samples = ranked[: self.params.n]
            outputs = [self._completion(sample, index) for index, sample in enumerate(samples)]
        return RequestOutput(  # by place, which is faster: request_id, prompt, its ids and logprobs, ...
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            self.prompt_logprobs,
            outputs,
            finished,
            metrics,
        )

    def _completion(self, sample: Sample, index: int) -> CompletionOutput:
        request = sample.request
        token_ids, begin = request.token_ids, request.num_prompt_tokens
        start = 0
        if self.kind == "delta":
            start, sample.sent_tokens = sample.sent_tokens, len(token_ids) - begin
            text, sample.new_text = sample.new_text, ""
        else:
            text = sample.detokenizer.text if sample.detokenizer is not None else ""
        logprobs = None
        if self.params.logprobs is not None:  # best_of may have made some for itself
            logprobs = sample.logprobs[start:] if sample.logprobs is not None else []
        reason = sample.finish_reason
        return CompletionOutput(
            index,
            text,
            token_ids[begin + start :],
            sample.cumulative_logprob,
            logprobs,
            reason.value if reason is not None else None,
            sample.stop_reason,
            sample.error,
        )


def token_texts(tokenizer: Tokenizer | None) -> dict[int, str]:
    """The texts of single tokens that have come up, shared by all requests of a tokenizer."""
    if tokenizer is None:
        return {}
    texts = _texts_of.get(tokenizer)
    if texts is None:
        texts = _texts_of.setdefault(tokenizer, {})
    return texts


def logprobs_at(
    token_id: int, entry: TokenLogprobs, tokenizer: Tokenizer | None, texts: dict[int, str]
) -> LogprobsAt:
    """One position in the shape of the outputs: the token itself first, then the top ones.

    `texts` are the tokenizer's `token_texts`; missing ones are added.
    """
    top_ids, top_logprobs = entry.top_ids, entry.top_logprobs
    if len(top_ids) != len(top_logprobs):
        raise ValueError(f"{len(top_ids)} top tokens with {len(top_logprobs)} log-probabilities cannot be")
    if tokenizer is not None:
        _learn_texts(tokenizer, texts, token_id, top_ids)
    own = Logprob(entry.logprob, entry.rank, texts.get(token_id))
    found = {token_id: own}
    if top_ids:
        found.update(
            zip(top_ids, map(Logprob, top_logprobs, count(1), map(texts.get, top_ids)), strict=False)
        )
        found[token_id] = own  # stays in front
    return found


def _learn_texts(tokenizer: Tokenizer, texts: dict[int, str], token_id: int, top_ids: list[int]) -> None:
    missing = [token for token in (token_id, *top_ids) if token not in texts]
    if missing and len(texts) + len(missing) > _MAX_TEXTS:
        texts.clear()
        missing = [token_id, *top_ids]
    for token in dict.fromkeys(missing):  # the token itself is often a top one too
        texts[token] = tokenizer.decode([token], skip_special_tokens=False)
