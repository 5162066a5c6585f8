"""The work that every engine is given: token ids made from the model's own tokenizer and fixed seeds.

    single    128 tokens in, 128 out
    batch     64 requests, 32 to 256 in (evenly spread, shuffled), 128 out each
    prefix    32 requests that share their first 512 tokens, 32 of their own, 64 out each
    rewrite   a chat turn that asks for a text again with one name changed, 192 out

Sampling is greedy and runs past the end token, so that every engine makes the same number of
tokens. Each workload brings a warm-up of the same shape from other tokens: what it leaves in a
prefix cache is of no use to the measured run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines.job import Request
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.tokenizer import Tokenizer

SENTENCES = (
    "The market opened at six, an hour before the first train came through the valley.",
    "Nobody could say who had planted the row of pear trees behind the station.",
    "Clara kept a ledger of every parcel, its weight, its sender and the weather that day.",
    "On Tuesdays the baker sent two loaves and a folded note about the price of flour.",
    "A bridge that looks simple has usually been drawn a hundred times by someone patient.",
    "The surveyor measured the slope twice, because the first number had been too convenient.",
    "By the end of spring the river had moved its bank by the width of a wagon.",
    "They agreed to build in stone, although wood would have been ready before the winter.",
    "Clara wrote down the cost of each arch and underlined the one that worried her.",
    "Rain fell for nine days, and on the tenth the children counted fourteen kinds of mud.",
    "An old clock in the waiting room ran four minutes fast, which suited everyone but the trains.",
    "The committee met in the school, on chairs that were made for smaller people.",
    "One member asked what the bridge was for, and the question took the whole evening.",
    "It is for the mill, said the miller; it is for the doctor, said everybody else.",
    "When the scaffold came down, a heron was the first to cross.",
    "Clara framed the earliest drawing and hung it where the light would not reach it.",
    "Years later a student found an error of three degrees in the plan and none in the bridge.",
    "She published it in a short paper with a long title and received a single letter.",
    "The letter said that the mason had noticed too, and had trusted his eye.",
    "In the ledger, beside that week, there is only the weight of a parcel of nails.",
)
REWRITE = (
    "Write the following text again, word for word, but change the name Clara to Helen. "
    "Answer with the text only.\n\n"
)


@dataclass(frozen=True)
class Sizes:
    """How large each workload is. The defaults are the ones to quote."""

    single_in: int = 128
    single_out: int = 128
    batch_count: int = 64
    batch_in: tuple[int, int] = (32, 256)
    batch_out: int = 128
    prefix_count: int = 32
    prefix_shared: int = 512
    prefix_own: int = 32
    prefix_out: int = 64
    rewrite_sentences: int = 10
    rewrite_out: int = 192
    foreign_out: int = 64
    brain_running: int = 256
    brain_contexts: tuple[int, ...] = (64, 1024, 4096)
    brain_steps: int = 100


# Shows that everything runs; its figures mean nothing.
QUICK = Sizes(
    single_in=16,
    single_out=4,
    batch_count=4,
    batch_in=(4, 16),
    batch_out=4,
    prefix_count=4,
    prefix_shared=32,
    prefix_own=4,
    prefix_out=4,
    rewrite_sentences=1,
    rewrite_out=4,
    foreign_out=4,
    brain_running=4,
    brain_contexts=(16, 64),
    brain_steps=4,
)


@dataclass(frozen=True)
class Work:
    """Requests to measure, and requests to warm up with."""

    requests: list[Request]
    warmup: list[Request]


class Workloads:
    """Makes the workloads of one model folder."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer is None:
            raise SystemExit(f"benchmark: {folder} has no tokenizer, which the prompts are made with")
        self._tokenizer = tokenizer
        self.sizes = sizes

    def single(self, new_tokens: int | None = None) -> Work:
        """One request, for the time to the first token and the decode rate."""
        new_tokens = new_tokens or self.sizes.single_out
        prompts = [self._tokens(self.sizes.single_in, random.Random(seed)) for seed in (1, 101)]
        return Work([Request(prompts[0], new_tokens)], [Request(prompts[1], min(16, new_tokens))])

    def batch(self, share: int = 1) -> Work:
        """Many requests at once; `share` 4 gives a quarter of them with the same spread of lengths."""
        count, (shortest, longest) = self.sizes.batch_count // share, self.sizes.batch_in

        def prompts(seed: int, count: int) -> list[list[int]]:
            rng = random.Random(seed)
            span = (longest - shortest) / max(1, count - 1)
            lengths = [shortest + round(index * span) for index in range(count)]
            rng.shuffle(lengths)
            return [self._tokens(length, rng) for length in lengths]

        work = [Request(prompt, self.sizes.batch_out) for prompt in prompts(2, count)]
        return Work(work, [Request(prompt, 4) for prompt in prompts(102, min(4, count))])

    def prefix(self) -> Work:
        """Requests that begin alike, as under one system prompt."""

        def prompts(seed: int, count: int) -> list[list[int]]:
            rng = random.Random(seed)
            shared = self._tokens(self.sizes.prefix_shared, rng)
            return [shared + self._tokens(self.sizes.prefix_own, rng) for _ in range(count)]

        work = [Request(prompt, self.sizes.prefix_out) for prompt in prompts(3, self.sizes.prefix_count)]
        return Work(work, [Request(prompt, 4) for prompt in prompts(103, 2)])

    def rewrite(self) -> Work:
        """A text to copy with one word changed: most of the answer is in the prompt."""
        text = REWRITE + " ".join(SENTENCES[: self.sizes.rewrite_sentences])
        templated = self._tokenizer.chat_template is not None
        if templated:
            template = ChatTemplate.for_tokenizer(self._tokenizer)
            text = template.render([{"role": "user", "content": text}])
        prompt = self._tokenizer.encode(text, add_special_tokens=not templated)
        warmup = self._tokens(len(prompt), random.Random(104))
        return Work([Request(prompt, self.sizes.rewrite_out)], [Request(warmup, 4)])

    def _tokens(self, length: int, rng: random.Random) -> list[int]:
        """Exactly `length` tokens: a number, so that no two texts begin alike, and shuffled sentences."""
        ids = self._tokenizer.encode(f"{rng.randrange(10**6):06}. ", add_special_tokens=False)
        while len(ids) < length:
            text = " ".join(rng.sample(SENTENCES, len(SENTENCES))) + " "
            ids += self._tokenizer.encode(text, add_special_tokens=False)
        return ids[:length]
