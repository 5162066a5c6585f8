"""What `benchmarks.speculation` asks, and how it makes predictions wrong at a known rate.

Everything comes from fixed seeds and the model's own tokenizer, so two engines get the same work.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.workloads import REWRITE, SENTENCES
from octavo import LLM

QUESTIONS = (
    "Tell me a short story about {}.",
    "What should I know before I buy {}?",
    "Explain {} to a child of eight.",
    "Write a letter to a friend who is afraid of {}.",
)
SUBJECTS = (
    "a lighthouse", "bread", "volcanoes", "old maps", "chess", "the moon", "a violin", "bees", "glass",
    "rivers in winter", "a night train", "clocks", "salt", "wild horses", "snow", "a stone bridge",
)  # fmt: skip


class Texts:
    """Prompts as token ids, made from the model's own tokenizer and fixed seeds."""

    def __init__(self, llm: LLM) -> None:
        parts: Any = llm._engine_parts()
        self._tokenizer = parts.engine.tokenizer
        self._template = parts.chat_template(None)

    def plain(self, count: int, length: int = 32) -> list[list[int]]:
        """Different ordinary texts of `length` tokens."""
        found = []
        for index in range(count):
            rng = random.Random(index)
            text = f"{rng.randrange(10**6):06}. " + " ".join(rng.sample(SENTENCES, len(SENTENCES)))
            found.append(self._tokenizer.encode(text, add_special_tokens=False)[:length])
        return found

    def chat(self, count: int) -> list[list[int]]:
        """Questions with nothing to copy."""
        pairs = [(question, subject) for subject in SUBJECTS for question in QUESTIONS]
        found = []
        for index in range(count):
            question, subject = pairs[index % len(pairs)]
            again = f" Think of the year {1900 + index}." if index >= len(pairs) else ""
            found.append(self._turn(question.format(subject) + again))
        return found

    def copy(self, count: int) -> list[list[int]]:
        """Ten sentences to be written again with one name changed."""
        texts = (" ".join(random.Random(index).sample(SENTENCES, 10)) for index in range(count))
        return [self._turn(REWRITE + text) for text in texts]

    def _turn(self, text: str) -> list[int]:
        rendered = self._template.render([{"role": "user", "content": text}])
        found: list[int] = self._tokenizer.encode(rendered, add_special_tokens=False)
        return found


def spoilt(tokens: Sequence[int], wrong: Sequence[float], vocab_size: int, seed: int) -> list[int]:
    """The tokens, number i replaced by another one with probability wrong[i]."""
    rng = random.Random(seed)
    return [
        rng.randrange(vocab_size) if rng.random() < chance else token
        for token, chance in zip(tokens, wrong, strict=True)
    ]
