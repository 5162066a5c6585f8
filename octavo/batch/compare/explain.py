"""Why two texts part: the seed, the settings, or, where both are greedy, how near the two tokens were.

A greedy answer takes the token with the largest logit. Where two engines (or two precisions) take
different ones, the model itself is asked: one pass over the prompt and what the texts have in common
gives the logits of both tokens. A small gap is a near tie, which rounding decides; a large one means that
one side computes something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from octavo.batch.compare.check import Comparison, TextDifference
from octavo.batch.work import Workers, WorkItem
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import EngineDeadError, OctavoError
from octavo.sampling_params import SamplingParams

# Two ways to compute one logit in bfloat16 differ by about this much at most, in models of usual size.
NEAR_TIE = 0.5


@dataclass(frozen=True)
class Prompt:
    """What a text was made from."""

    token_ids: list[int]
    answer_prefix: str = ""  # text that stands before the generated one in the result (echo)


class Origins(Protocol):
    """Where the texts of a result come from."""

    def is_greedy(self, difference: TextDifference) -> bool | None:
        """Whether the most probable token was always taken; None if that is not known."""
        ...

    def prompt(self, difference: TextDifference) -> Prompt | None:
        """The prompt; None if it is not known. Raises OctavoError where it cannot be made again."""
        ...


@dataclass(frozen=True)
class Scorer:
    """A loaded model that gives logits."""

    workers: Workers
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Gap:
    """Logit of A's token less that of B's, where the texts part. None: they part inside of a token, or
    one was cut off."""

    value: float | None
    a: str = ""
    b: str = ""

    def describe(self) -> str:
        """For people."""
        if self.value is None:
            return "the next tokens cannot be told apart"
        return f"logit gap {self.value:+.4f} ({self.a} in A less {self.b} in B)"


async def explain(found: Comparison, origins: Origins | None, scorer: Scorer | None) -> None:
    """Fill in why the texts that are shown differ. `scorer` is asked where it is given."""
    for difference in found.shown:
        if difference.text is not None:
            difference.why = await _why(difference.text, found.settings, origins, scorer)


async def _why(
    difference: TextDifference, settings: list[str], origins: Origins | None, scorer: Scorer | None
) -> str:
    if settings:
        about = "settings differ (above)"
    else:
        about = "the recorded settings are the same, so the engine or its machine differs"
    greedy = origins.is_greedy(difference) if origins is not None else None
    how = {True: "greedy", False: "sampled with the same seed", None: "greedy or sampled, which is not known"}
    if scorer is None or origins is None:
        hint = " (--model NAME shows how near the two tokens were)" if greedy else ""
        return f"{how[greedy]}{hint}; {about}"
    try:
        prompt = origins.prompt(difference)
        if prompt is None:
            return f"{how[greedy]}; its prompt is not known; {about}"
        gap = await logit_gap(scorer, prompt, difference)
    except EngineDeadError:
        raise
    except OctavoError as error:
        return f"{how[greedy]}; cannot be scored: {error}"
    said = f"{how[greedy]}, {gap.describe()}"
    if greedy and gap.value is not None:
        if abs(gap.value) <= NEAR_TIE:
            said += ": a near tie, which rounding decides"
        else:
            said += ": more than rounding; one side computes something else"
    return f"{said}; {about}"


async def logit_gap(scorer: Scorer, prompt: Prompt, difference: TextDifference) -> Gap:
    """Score both next tokens behind what the texts have in common.

    The texts are tokenized again. Where the model wrote a text in other tokens than the tokenizer would,
    the gap is that of the tokenizer's.
    """
    tokenizer = scorer.tokenizer
    sides = (difference.a, difference.b)
    ids = [
        tokenizer.encode(side.text.removeprefix(prompt.answer_prefix), add_special_tokens=False)
        for side in sides
    ]
    at = 0
    while at < min(map(len, ids)) and ids[0][at] == ids[1][at]:
        at += 1
    tokens: list[int] = []
    for side, found in zip(sides, ids, strict=True):
        if at < len(found):
            tokens.append(found[at])
        elif side.finish_reason == "stop" and scorer.workers.info.eos_token_ids:
            tokens.append(scorer.workers.info.eos_token_ids[0])
        else:
            return Gap(None)
    if tokens[0] == tokens[1]:
        return Gap(None)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    scores = []
    for token in tokens:
        item = WorkItem(difference.key, [*prompt.token_ids, *ids[0][:at], token], params)
        output = await scorer.workers.run(item)
        last = (output.prompt_logprobs or [None])[-1]
        if last is None:
            raise OctavoError(output.error or "the engine gave no log-probability")
        scores.append(last[token].logprob)
    names = [repr(tokenizer.decode([token], skip_special_tokens=False)) for token in tokens]
    return Gap(scores[0] - scores[1], names[0], names[1])
