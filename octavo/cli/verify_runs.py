"""The runs behind `octavo verify`, and what their tokens say.

Every prompt is first answered alone, without speculation: that is the reference. Then come the same
prompts in batches, and with every drafter. A token that differs is looked at closely: how far apart
the model puts the two tokens. Where arithmetic depends on what else is in the batch, a near-tie may
fall the other way; anything else is a defect.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from octavo.core.mix import mix64

if TYPE_CHECKING:
    from octavo import LLM, RequestOutput, SamplingParams

BATCHES = (1, 8, 64)
MODES = ("greedy", "sampled")
TEMPERATURE = 0.8
NEAR_TIE = 1e-3  # score gap below which float32 arithmetic may fall either way
_PREDICTION_ERROR = 6  # every so many tokens of a prediction are wrong

Requirement = Literal["bits", "near-ties", "reported"]

_BASES = (
    "Copy this text, word for word.\n\nText: The ferry left the harbour at {n} past nine, with forty "
    "passengers, two dogs and a piano.\n\nCopy: The ferry left the harbour",
    "Write a short story about a lighthouse keeper and his {n} cats.\n\nOnce upon a time",
    "def total_{n}(values):\n    result = 0\n    for value in values:\n        result = result + value\n"
    "    return result\n\n\ndef product_{n}(values):\n    result = 1\n",
    "Question: What is the capital of France?\nAnswer: Paris.\n\n"
    "Question: How many days have {n} weeks?\nAnswer:",
    "Monday: bread, {n} eggs\nTuesday: milk, {n} apples\nWednesday: rice, {n} onions\nThursday:",
    'Make this JSON longer: [{{"id": {n}, "name": "Ada"}}, {{"id": 2, "name": "Alan"}},',
    "Summarise in one sentence: {n} years ago the mill by the river burned down. Nobody was hurt, and the "
    "village built it again within a year.\n\nSummary:",
    "Three good reasons to walk {n} miles a day:\n1.",
)


def bundled_prompts(count: int) -> list[str]:
    """Copying, prose, code, lists: some repeat themselves, some do not."""
    return [_BASES[i % len(_BASES)].format(n=3 + i) for i in range(count)]


@dataclass
class Difference:
    """The first token of one answer that is not the reference's."""

    prompt: int
    position: int  # in the output
    expected: int
    found: int
    logit_gap: float | None = None  # of the expected token over the other
    score_gap: float | None = None  # the same where it counts: after temperature, with the noise

    @property
    def size(self) -> float:
        """How far from a tie it is; infinite if that is not known."""
        gap = self.logit_gap if self.score_gap is None else self.score_gap
        return math.inf if gap is None or math.isnan(gap) else abs(gap)


@dataclass
class Run:
    """One drafter at one batch size, greedy or sampled."""

    drafter: str
    batch: int
    mode: str
    num_prompts: int
    num_tokens: int = 0  # compared, up to the first difference of each answer
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    differences: list[Difference] = field(default_factory=list)

    @property
    def flip_rate(self) -> float:
        """First differences for each token compared."""
        return len(self.differences) / self.num_tokens if self.num_tokens else 0.0


@dataclass
class Cost:
    """What deterministic=True costs plain decoding at one batch size."""

    batch: int
    plain: float  # tok/s
    deterministic: float  # tok/s

    @property
    def slowdown(self) -> float:
        """Share of the speed that is lost; negative if it was faster."""
        return 1.0 - self.deterministic / self.plain


@dataclass
class Verdict:
    """All runs, and whether what had to be equal was."""

    dtype: str
    deterministic: bool
    requirement: Requirement
    runs: list[Run]
    costs: list[Cost] = field(default_factory=list)

    @property
    def failures(self) -> list[tuple[Run, Difference]]:
        """Differences that must not be."""
        every = [(run, difference) for run in self.runs for difference in run.differences]
        if self.requirement == "reported":
            return []
        if self.requirement == "near-ties":
            return [(run, difference) for run, difference in every if difference.size > NEAR_TIE]
        return every

    @property
    def unproven(self) -> list[str]:
        """Drafters of which not one draft was accepted: equal texts prove nothing then."""
        drafters = dict.fromkeys(run.drafter for run in self.runs if run.drafter != "none")
        return [d for d in drafters if not any(run.accepted for run in self.runs if run.drafter == d)]


class Verifier:
    """Makes engines, runs prompts through them, compares.

    `make` builds an LLM from keyword arguments; `engine` are those all engines share.
    """

    def __init__(
        self,
        make: Callable[[dict[str, Any]], LLM],
        engine: dict[str, Any],
        prompts: Sequence[str],
        max_tokens: int,
        tell: Callable[[str], None],
    ) -> None:
        self._make = make
        self._engine = engine
        self._prompts = list(prompts)
        self._max_tokens = max_tokens
        self._tell = tell
        self._reference: dict[str, list[RequestOutput]] = {}
        self.runs: list[Run] = []
        self.dtype = ""
        self.row_invariant = False

    @property
    def requirement(self) -> Requirement:
        """What is required of this configuration; known after the first engine was made."""
        if self._engine.get("deterministic"):
            return "bits"
        if self.dtype == "float32":
            return "near-ties"
        return "bits" if self.row_invariant else "reported"

    def verify(self, drafters: Sequence[dict[str, Any]]) -> list[Run]:
        """Reference, batches, then every drafter (each a `speculative` option)."""
        with self._open(None) as llm:
            for mode in MODES:
                self._tell(f"reference, one at a time, {mode}")
                self._reference[mode] = self._answers(llm, mode, 1, len(self._prompts), None)[0]
            for batch in BATCHES[1:]:
                self._compare_all(llm, "none", batch)
        for speculative in drafters:
            with self._open(speculative) as llm:
                for batch in BATCHES:
                    self._compare_all(llm, speculative["method"], batch)
        if any(run.differences for run in self.runs):
            self._tell("looking at the differences")
            with self._open(None) as llm:
                for run in self.runs:
                    for difference in run.differences:
                        self._measure(llm, run.mode, difference)
        return self.runs

    def costs(self) -> list[Cost]:
        """Plain decoding without and with deterministic=True, the best of three runs each."""
        rates: dict[bool, dict[int, float]] = {}
        for deterministic in (False, True):
            with self._open(None, deterministic=deterministic) as llm:
                rates[deterministic] = {}
                for batch in BATCHES:
                    count = min(max(batch, 2), len(self._prompts))
                    self._tell(f"speed, deterministic={deterministic}, batch {batch}")
                    timed = [self._answers(llm, "greedy", batch, count, None)[1] for _ in range(3)]
                    rates[deterministic][batch] = count * self._max_tokens / min(timed)
        return [Cost(batch, rates[False][batch], rates[True][batch]) for batch in BATCHES]

    # ------------------------------------------------------------------ inside

    def _open(self, speculative: dict[str, Any] | None, **more: Any) -> LLM:
        options = {**self._engine, **more}
        options.setdefault("max_num_seqs", max(BATCHES))
        if speculative is not None:
            options["speculative"] = speculative
        llm = self._make(options)
        parts = llm._engine_parts()
        self.dtype, self.row_invariant = parts.config.dtype, parts.row_invariant
        return llm

    def _params(self, mode: str, index: int, prediction: Sequence[int] | None) -> SamplingParams:
        from octavo import SamplingParams

        temperature = TEMPERATURE if mode == "sampled" else 0.0
        return SamplingParams(
            temperature=temperature, seed=index, max_tokens=self._max_tokens, ignore_eos=True,
            prediction=prediction,
        )  # fmt: skip

    def _answers(
        self, llm: LLM, mode: str, batch: int, count: int, predictions: list[list[int]] | None
    ) -> tuple[list[RequestOutput], float]:
        """The first `count` prompts, `batch` at a time, and the seconds it took."""
        params = [
            self._params(mode, index, predictions[index] if predictions is not None else None)
            for index in range(count)
        ]
        outputs: list[RequestOutput] = []
        started = time.perf_counter()
        for start in range(0, count, batch):
            stop = min(start + batch, count)
            outputs += llm.generate(self._prompts[start:stop], params[start:stop], use_tqdm=False)
        seconds = time.perf_counter() - started
        for output in outputs:
            if output.error is not None:
                from octavo.errors import RequestError

                raise RequestError(f"a prompt of the check failed: {output.error}")
        return outputs, seconds

    def _compare_all(self, llm: LLM, drafter: str, batch: int) -> None:
        count = min(len(self._prompts), max(8, 2 * batch) if batch < max(BATCHES) else len(self._prompts))
        for mode in MODES:
            self._tell(f"{drafter}, batch {batch}, {mode}")
            predictions = None
            if drafter == "predicted":
                predictions = [_nearly(o.outputs[0].token_ids) for o in self._reference[mode]]
            outputs, seconds = self._answers(llm, mode, batch, count, predictions)
            self.runs.append(self._compare(drafter, batch, mode, outputs, seconds))

    def _compare(
        self, drafter: str, batch: int, mode: str, outputs: list[RequestOutput], seconds: float
    ) -> Run:
        run = Run(drafter, batch, mode, len(outputs), seconds=seconds)
        for index, (output, reference) in enumerate(zip(outputs, self._reference[mode], strict=False)):
            found, expected = output.outputs[0].token_ids, reference.outputs[0].token_ids
            same = 0
            while same < min(len(found), len(expected)) and found[same] == expected[same]:
                same += 1
            run.num_tokens += min(same + 1, len(expected))
            if same < len(expected):
                run.differences.append(Difference(index, same, expected[same], found[same]))
            if output.metrics is not None and output.metrics.speculation is not None:
                run.drafted += output.metrics.speculation.drafted
                run.accepted += output.metrics.speculation.accepted
        return run

    def _measure(self, llm: LLM, mode: str, difference: Difference) -> None:
        """The gap between the two tokens, with what comes before them computed as a prompt."""
        from octavo import SamplingParams

        reference = self._reference[mode][difference.prompt]
        before = reference.prompt_token_ids + reference.outputs[0].token_ids[: difference.position]
        tokens = (difference.expected, difference.found)
        if len(before) + 2 > llm._engine_parts().plan.max_model_len:
            return
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        prompts = [{"prompt_token_ids": [*before, token]} for token in tokens]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        logprobs = []
        for output, token in zip(outputs, tokens, strict=True):
            entry = output.prompt_logprobs[-1] if output.prompt_logprobs else None
            if entry is None:
                return
            logprobs.append(entry[token].logprob)
        difference.logit_gap = logprobs[0] - logprobs[1]
        if mode == "sampled":
            noise = _noise(difference.prompt, len(before), tokens)
            difference.score_gap = difference.logit_gap / TEMPERATURE + noise[0] - noise[1]


def _nearly(tokens: Sequence[int]) -> list[int]:
    """A prediction of them with a wrong token now and then."""
    return [tokens[0] if i % _PREDICTION_ERROR == 5 else token for i, token in enumerate(tokens)]


def _noise(seed: int, position: int, tokens: tuple[int, int]) -> list[float]:
    """What the draw adds to the scores of two tokens of a request with this seed."""
    import torch

    from octavo.sampling.noise import exponentials, noise_words

    return [
        -float(exponentials(noise_words(mix64(seed, 0), position, torch.tensor([token]))).log())
        for token in tokens
    ]
