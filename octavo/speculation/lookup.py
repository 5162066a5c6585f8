"""Drafts without a model: the text itself, or a predicted output, says how it goes on.

*Prompt lookup* finds the latest place where the last tokens of a request occurred before, the
longest match first, and proposes what followed there. *Predicted output* follows a text that the
caller expects (OpenAI's `prediction`), and finds its way back after a difference. A request with a
prediction is drafted from it; the others, if `prompt` is on, from their own text.

`prompt_lookup` and `Prediction` are the definition. `PythonLookup` runs them over the device tables;
octavo/speculation/cpu_lookup.py runs their C form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo.core.messages import NewSlot
from octavo.speculation.proposer import DraftTables

MIN_MATCH = 2  # tokens that must recur before anything is guessed
HYBRID_MIN_MATCH = 4  # the same where a draft model would guess otherwise
MAX_MATCH = 8  # a longer match counts as this long


def prompt_lookup(
    tokens: list[int], count: int, min_match: int = MIN_MATCH, max_match: int = MAX_MATCH
) -> list[int]:
    """Up to `count` drafts for what follows `tokens`; none where too few of the last ones recur.

    The longest match of the last tokens wins, up to max_match, and the latest of equally long ones.
    What followed there may run into the end of the text: then it repeats.
    """
    last = len(tokens) - 1
    best, start = min_match - 1, -1
    for place in range(last - 1, -1, -1):
        match = 0
        while match < max_match and match <= place and tokens[place - match] == tokens[last - match]:
            match += 1
        if match > best:
            best, start = match, place + 1
    if start < 0:
        return []
    text = list(tokens)
    for offset in range(count):
        text.append(text[start + offset])
    return text[len(tokens) :]


class Prediction:
    """A predicted output, and how far the real one has followed it."""

    def __init__(self, tokens: Sequence[int], min_match: int = MIN_MATCH) -> None:
        self.tokens = list(tokens)
        self.cursor = 0  # the predicted token expected next
        self.num_read = 0  # output tokens taken into account
        self._min_match = min_match
        self._tail: list[int] = []  # the last min_match output tokens

    def follow(self, new_tokens: Sequence[int]) -> None:
        """Move the cursor along output tokens that have come since the last call."""
        for token in new_tokens:
            self.num_read += 1
            self._tail = [*self._tail, token][-self._min_match :]
            if self.cursor < len(self.tokens) and self.tokens[self.cursor] == token:
                self.cursor += 1
                continue
            place = self._place()
            # Not found: take it that this one token was replaced by another.
            self.cursor = min(self.cursor + 1, len(self.tokens)) if place is None else place

    def drafts(self, count: int) -> list[int]:
        """The next predicted tokens."""
        return self.tokens[self.cursor : self.cursor + count]

    def _place(self) -> int | None:
        """Behind the tail's tokens: at the nearest place from the cursor on, then before it."""
        size = self._min_match
        if len(self._tail) < size:
            return None
        end: int
        ahead = range(self.cursor, len(self.tokens))
        behind = range(min(self.cursor, len(self.tokens)) - 1, -1, -1)
        for end in (*ahead, *behind):
            if end + 1 >= size and self.tokens[end + 1 - size : end + 1] == self._tail:
                return end + 1
        return None


class PythonLookup:
    """See Proposer. Works on every device, and waits for it."""

    def __init__(self, tables: DraftTables, *, prompt: bool = True, min_match: int = MIN_MATCH) -> None:
        self.name = "prompt_lookup" if prompt else "predicted"
        self._tables = tables
        self._prompt = prompt
        self._min_match = min_match
        self._predicted: dict[int, tuple[Prediction, int]] = {}  # slot -> prediction, prompt length

    def enter(self, new: NewSlot) -> None:
        """See Proposer."""
        self._predicted.pop(new.slot, None)
        if new.prediction_ids:
            self._predicted[new.slot] = Prediction(new.prediction_ids), new.num_prompt_tokens

    def leave(self, slot: int) -> None:
        """See Proposer."""
        self._predicted.pop(slot, None)

    def propose(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """See Proposer."""
        tables = self._tables
        for slot, count in zip(slots, counts, strict=True):
            known = int(tables.num_tokens[slot])
            drafts: list[int] = []
            if slot in self._predicted:
                prediction, start = self._predicted[slot]
                prediction.follow(tables.tokens[slot, start + prediction.num_read : known].tolist())
                drafts = prediction.drafts(count)
            elif self._prompt:
                drafts = prompt_lookup(tables.tokens[slot, :known].tolist(), count, self._min_match)
            drafts = drafts[: max(0, int(tables.limit[slot]) - known)]
            if tables.finished[slot]:
                drafts = []
            if drafts:
                tables.tokens[slot, known : known + len(drafts)] = torch.tensor(drafts, dtype=torch.int32)
            tables.num_drafts[slot] = len(drafts)
