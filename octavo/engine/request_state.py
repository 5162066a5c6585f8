"""A caller's request inside the engine: its samples, their texts, and the output they become.

The scheduler knows only single sequences; a request with n (or best_of) samples is several of
them, its *samples*. Here they meet again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

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
    sent_tokens: int = 0  # with deltas: what the caller has
    new_text: str = ""  # with deltas: what the caller does not have

    def add_logprobs(
        self, entries: list[TokenLogprobs], token_ids: list[int], tokenizer: Tokenizer | None
    ) -> None:
        """Log-probabilities of the tokens of one step."""
        if self.logprobs is None:
            self.logprobs, self.cumulative_logprob = [], 0.0
        assert self.cumulative_logprob is not None
        for token_id, entry in zip(token_ids, entries, strict=True):
            self.logprobs.append(logprobs_at(token_id, entry, tokenizer))
            self.cumulative_logprob += entry.logprob

    @property
    def mean_logprob(self) -> float:
        """What best_of ranks by."""
        count = self.request.num_output_tokens
        return (self.cumulative_logprob or 0.0) / count if count else float("-inf")


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
        return all(sample.finish_reason is not None for sample in self.samples)

    def add_prompt_logprobs(self, found: PromptLogprobs, tokenizer: Tokenizer | None) -> None:
        """Of a chunk of the prompt. A prompt that is computed again brings some a second time."""
        if self.prompt_logprobs is None:
            self.prompt_logprobs = [None]
        known = len(self.prompt_logprobs)
        for position, entry in enumerate(found.entries, start=found.start):
            if position >= known:
                self.prompt_logprobs.append(logprobs_at(self.prompt_token_ids[position], entry, tokenizer))

    def output(self) -> RequestOutput:
        """What the caller gets now."""
        if self.finished and self.metrics.finished_time is None:
            self.metrics.finished_time = time.monotonic()
        self.metrics.num_output_tokens = max(s.request.num_output_tokens for s in self.samples)
        self.metrics.num_preemptions = sum(s.request.num_preemptions for s in self.samples)
        self.metrics.num_cached_tokens = self.samples[0].request.num_cached_tokens
        samples = self.samples
        if self.params.best_of is not None and self.finished:
            ranked = sorted(samples, key=lambda sample: -sample.mean_logprob)
            samples = ranked[: self.params.n]
        outputs = [self._completion(sample, index) for index, sample in enumerate(samples)]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=outputs,
            finished=self.finished,
            metrics=self.metrics,
        )

    def _completion(self, sample: Sample, index: int) -> CompletionOutput:
        request = sample.request
        start = 0
        text = sample.detokenizer.text if sample.detokenizer is not None else ""
        if self.kind == "delta":
            start, sample.sent_tokens = sample.sent_tokens, request.num_output_tokens
            text, sample.new_text = sample.new_text, ""
        logprobs = sample.logprobs
        if self.params.logprobs is None:
            logprobs = None  # best_of made them for itself
        elif logprobs is None:
            logprobs = []
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=request.token_ids[request.num_prompt_tokens + start :],
            cumulative_logprob=sample.cumulative_logprob,
            logprobs=logprobs[start:] if logprobs is not None else None,
            finish_reason=sample.finish_reason.value if sample.finish_reason is not None else None,
            stop_reason=sample.stop_reason,
            error=sample.error,
        )


def logprobs_at(token_id: int, entry: TokenLogprobs, tokenizer: Tokenizer | None) -> LogprobsAt:
    """One position in the shape of the outputs: the token itself first, then the top ones."""

    def text(token: int) -> str | None:
        return tokenizer.decode([token], skip_special_tokens=False) if tokenizer is not None else None

    found = {token_id: Logprob(entry.logprob, entry.rank, text(token_id))}
    for rank, (top_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
        if top_id not in found:
            found[top_id] = Logprob(logprob, rank, text(top_id))
    return found
