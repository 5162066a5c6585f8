"""Drafters for tests: one that cheats, one that is always wrong, one that misbehaves."""

from __future__ import annotations

import random


class Noisy:
    """Guesses the tokens it was shown (`Noisy.known`: whole texts), each wrong with some probability."""

    known: list[list[int]] = []  # noqa: RUF012 - tests fill it
    wrong = 0.3

    def __init__(self) -> None:
        self.rng = random.Random(1)
        self.observed: list[tuple[int, int]] = []

    def propose(self, request_id: str, token_ids: list[int], count: int) -> list[int]:
        for text in self.known:
            if text[: len(token_ids)] == token_ids:
                guess = text[len(token_ids) : len(token_ids) + count]
                return [5 if self.rng.random() < self.wrong else token for token in guess]
        return []

    def observe(self, request_id: str, drafts: list[int], num_accepted: int) -> None:
        self.observed.append((len(drafts), num_accepted))


class Wrong:
    """Always guesses the same nonsense."""

    def propose(self, request_id: str, token_ids: list[int], count: int) -> list[int]:
        return [7] * count


class Broken:
    """Returns what is no list of token ids."""

    def propose(self, request_id: str, token_ids: list[int], count: int) -> list[int]:
        return ["a"] * count  # type: ignore[list-item]


class NoPropose:
    """Not a drafter at all."""
