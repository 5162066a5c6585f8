"""The rows of one `generate()` of transformers: what is told of each, and when each ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.bench.target import Answer, TargetRequest


@dataclass
class Row:
    """One request of a batch, and what has come for it."""

    request: TargetRequest
    answer: Answer
    done: asyncio.Future[None]
    loop: asyncio.AbstractEventLoop
    eos: frozenset[int] = frozenset()
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False

    @property
    def over(self) -> bool:
        return self.finish_reason is not None or self.cancelled

    def add(self, ids: Sequence[int]) -> None:
        """Tokens of one step; those behind the end are padding."""
        new = 0
        for token in ids:
            if self.over:
                break
            self.ids.append(token)
            new += 1
            if token in self.eos:
                self.finish_reason = "stop"
            elif len(self.ids) >= self.request.max_tokens:
                self.finish_reason = "length"
        if new:
            self.answer.arrived(new)

    def tell(self, error: Exception | None) -> None:
        """The caller's future, from the engine's thread."""

        def put() -> None:
            if self.done.done():
                return
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(put)


def length(row: Row) -> int:
    """Tokens of the prompt."""
    return len(row.request.prompt_token_ids or ())


def padded(prompts: Sequence[list[int]], device: Any) -> tuple[Any, Any]:
    """(ids, mask), both [rows, longest prompt], padded on the left."""
    import torch

    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Streamer:
    """What generate() calls with the prompt once and then with every step's tokens."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._saw_prompt = False

    def put(self, value: Any) -> None:
        """value: [rows, prompt] at first, then [rows], or [1, tokens] of one row."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        steps = value.reshape(len(self._rows), -1).tolist()
        for row, ids in zip(self._rows, steps, strict=True):
            row.add(ids)

    def end(self) -> None:
        """Nothing is left to be said."""


class Stopping:
    """Ends each row at its own limit, and those whose caller has gone."""

    def __init__(self, rows: Sequence[Row], prompt_length: int) -> None:
        self._rows = rows
        self._prompt_length = prompt_length

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        """ids: [rows, prompt + new tokens]; the streamer may not have seen the newest ones yet."""
        import torch

        new = ids.shape[1] - self._prompt_length
        over = [row.over or new >= row.request.max_tokens for row in self._rows]
        return torch.tensor(over, device=ids.device)


def listen(generator: Any, answer: Answer) -> Any:
    """A candidate generator that tells the answer what was drafted and what of it held."""
    propose, update = generator.get_candidates, generator.update_candidate_strategy
    drafted = 0

    def get_candidates(ids: Any, *positional: Any, **named: Any) -> Any:
        nonlocal drafted
        candidates = propose(ids, *positional, **named)
        drafted = int(candidates[0].shape[1] - ids.shape[1])
        return candidates

    def update_candidate_strategy(ids: Any, scores: Any, num_matches: Any) -> Any:
        answer.verified(drafted, min(int(num_matches), drafted))
        return update(ids, scores, num_matches)

    generator.get_candidates, generator.update_candidate_strategy = get_candidates, update_candidate_strategy
    return generator
