"""What a caller gets back: plain data, in the shapes that users of vLLM know.

A `RequestOutput` holds one prompt and its answers, each a `CompletionOutput`. While a request
streams, the same classes carry its state so far, with `finished` False. Times are seconds of one
monotonic clock, so only their differences mean anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


class Logprob(NamedTuple):
    """One token's log-probability under the raw logits; rank 1 is the most probable token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsAt = dict[int, Logprob]  # one position: the token itself and the top ones, by token id


@dataclass(slots=True)
class CompletionOutput:
    """One answer.

    `logprobs` has one dict a token (None if not asked for): the chosen token first, then the top
    ones, most probable first. `stop_reason` is the stop string or the stop token's id that ended
    the answer, None for an end-of-sequence token. `error` says why an answer with finish_reason
    "error" failed.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsAt] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """True once nothing will be added any more."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        parts = [
            f"index={self.index}",
            f"text={_short(self.text)}",
            f"{len(self.token_ids)} tokens",
            f"finish_reason={self.finish_reason!r}",
        ]
        if self.stop_reason is not None:
            parts.append(f"stop_reason={self.stop_reason!r}")
        if self.error is not None:
            parts.append(f"error={self.error!r}")
        return f"CompletionOutput({', '.join(parts)})"


@dataclass(slots=True)
class SpeculationStep:
    """One verification, recorded when a request asks for `trace=True`."""

    drafted_ids: list[int]
    num_accepted: int
    num_speculative_tokens: int  # K chosen for this step
    reason: str  # why this K
    start: int = 0  # tokens of the output before those this verification brought


@dataclass(slots=True)
class SpeculationMetrics:
    """What speculation did for one request (or, in the engine's totals, for all).

    `drafted_by_position[i]` counts the verifications that had a draft at position i,
    `reached_by_position[i]` those of them in which all drafts before it were accepted, and
    `accepted_by_position[i]` those in which it was accepted too. Drafts behind a request's end were
    neither accepted nor refused, and are not counted.
    """

    drafted: int = 0
    accepted: int = 0
    num_steps: int = 0  # verifications, those without a draft included
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    reached_by_position: list[int] = field(default_factory=list)
    # Device time of the steps that made and verified drafts: this request's part, by drafts and rows.
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    steps: list[SpeculationStep] | None = None  # only with trace=True
    # Drafts were accepted by coins (synthetic_acceptance_rates): the text means nothing.
    synthetic: bool = False
    num_cut: int = 0  # drafts of a fixed number that a limit (token budget, KV memory) did not allow
    # Time of plain decoding for the same tokens ÷ time taken, estimated; None before it can be.
    net_speedup: float | None = None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafts over all drafts; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens a verification brought, the target's own included; None before the first one."""
        return 1.0 + self.accepted / self.num_steps if self.num_steps else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """Of all drafts at each position, the share that was accepted."""
        return _ratios(self.accepted_by_position, self.drafted_by_position)

    @property
    def conditional_acceptance_by_position(self) -> list[float]:
        """Of the drafts at each position whose predecessors were all accepted, the share accepted."""
        return _ratios(self.accepted_by_position, self.reached_by_position)

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """Count one verification of `num_drafted` drafts, of which the first `num_accepted` held."""
        if not 0 <= num_accepted <= num_drafted:
            raise ValueError(f"{num_accepted} of {num_drafted} drafts accepted cannot be")
        self.num_steps += 1
        self.drafted += num_drafted
        self.accepted += num_accepted
        missing = num_drafted - len(self.drafted_by_position)
        self.drafted_by_position.extend([0] * missing)
        self.accepted_by_position.extend([0] * missing)
        self.reached_by_position.extend([0] * missing)
        for position in range(num_drafted):
            self.drafted_by_position[position] += 1
            self.accepted_by_position[position] += position < num_accepted
            self.reached_by_position[position] += position <= num_accepted


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request (seconds, monotonic clock) and what it cost.

    Derived figures are None until the moments they need have come. With several answers, the first
    token is the earliest of any, and `num_output_tokens` is the length of the longest answer.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    num_output_tokens: int = 0
    num_preemptions: int = 0
    speculation: SpeculationMetrics | None = None
    energy_joules: float | None = None  # its part of the hardware's, once it has ended; None: not measured

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to the first step the request was part of."""
        return _span(self.arrival_time, self.first_scheduled_time)

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from arrival."""
        return _span(self.arrival_time, self.first_token_time)

    @property
    def e2e(self) -> float | None:
        """End-to-end latency: seconds from arrival to the end."""
        return _span(self.arrival_time, self.finished_time)

    @property
    def tpot(self) -> float | None:
        """Time per output token, (e2e - ttft) / (n_out - 1); None for fewer than two tokens."""
        decoding = _span(self.first_token_time, self.finished_time)
        if decoding is None or self.num_output_tokens < 2:
            return None
        return decoding / (self.num_output_tokens - 1)

    @property
    def trace(self) -> list[SpeculationStep] | None:
        """One record a verification, if the request asked for `trace=True` and speculated."""
        return self.speculation.steps if self.speculation is not None else None

    def __repr__(self) -> str:
        parts = [
            f"{name}={seconds * 1000:.1f} ms"
            for name in ("queue_time", "ttft", "tpot", "e2e")
            if (seconds := getattr(self, name)) is not None
        ]
        parts.append(f"prompt={self.num_prompt_tokens} tokens")
        if self.num_cached_tokens:
            parts.append(f"cached={self.num_cached_tokens}")
        parts.append(f"output={self.num_output_tokens}")
        if self.num_preemptions:
            parts.append(f"preemptions={self.num_preemptions}")
        if self.speculation is not None:
            how = " (SYNTHETIC acceptance)" if self.speculation.synthetic else ""
            parts.append(f"accepted={self.speculation.accepted}/{self.speculation.drafted} drafts{how}")
        return f"RequestMetrics({', '.join(parts)})"


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its answers, best first if there was a `best_of`.

    `prompt` is None where token ids were given. `prompt_logprobs` has one entry a prompt token, the
    first always None, since nothing comes before it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsAt | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None

    @property
    def error(self) -> str | None:
        """The first error among the answers, or None if all went well."""
        return next((output.error for output in self.outputs if output.error is not None), None)

    def __iter__(self) -> Iterator[CompletionOutput]:
        return iter(self.outputs)

    def __repr__(self) -> str:
        prompt = _short(self.prompt) if self.prompt is not None else f"{len(self.prompt_token_ids)} token ids"
        state = "" if self.finished else ", unfinished"
        speculation = self.metrics.speculation if self.metrics is not None else None
        if speculation is not None and speculation.synthetic:
            state += ", SYNTHETIC acceptance: the text means nothing"
        return f"RequestOutput({self.request_id}, prompt={prompt}, outputs={self.outputs!r}{state})"


def _ratios(parts: list[int], wholes: list[int]) -> list[float]:
    """Up to the first position of which nothing is known."""
    known = wholes.index(0) if 0 in wholes else len(wholes)
    return [part / whole for part, whole in zip(parts[:known], wholes[:known], strict=True)]


def join_deltas(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """Two successive outputs that each hold what was new, as one. Both are used up."""
    for old, new in zip(earlier.outputs, later.outputs, strict=True):
        new.text = old.text + new.text
        old.token_ids += new.token_ids
        new.token_ids = old.token_ids
        if old.logprobs is not None:
            old.logprobs += new.logprobs or []
            new.logprobs = old.logprobs
    if later.prompt_logprobs is None:
        later.prompt_logprobs = earlier.prompt_logprobs
    return later


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _short(text: str, limit: int = 60) -> str:
    """A text as a repr shows it, cut in the middle so that both ends can be read."""
    if len(text) > limit:
        text = f"{text[: limit - 21]} … {text[-18:]}"
    return repr(text)
