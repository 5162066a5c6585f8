"""The protocol of drafters, and the adapter for a user's own one.

A drafter writes its guesses behind the confirmed tokens of the token table and says how many there
are; the next step verifies them. A guess can cost time but never change the text: a draft is
accepted only if it is the token that the target draws itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from octavo.core.messages import NewSlot
from octavo.errors import ConfigError


class DraftTables(Protocol):
    """The device tables a drafter reads and writes; one row a slot."""

    tokens: torch.Tensor  # [slots, width] int32: confirmed tokens, then drafts
    num_tokens: torch.Tensor  # [slots] int64
    num_drafts: torch.Tensor  # [slots] int64
    limit: torch.Tensor  # [slots] int64, the most tokens a request may hold
    finished: torch.Tensor  # [slots] bool


class Proposer(Protocol):
    """One way to guess. Slots come and go with `enter` and `leave`."""

    name: str

    def enter(self, new: NewSlot) -> None:
        """A request enters a slot."""
        ...

    def leave(self, slot: int) -> None:
        """The request of a slot has left."""
        ...

    def propose(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Write up to counts[i] drafts for slots[i] and set num_drafts, 0 included.

        Never beyond the request's limit, and nothing for a finished slot.
        """
        ...


class CustomDrafter(Protocol):
    """What `method="package.module:Class"` names: a class without constructor arguments.

    `propose` gets all tokens of a request, prompt and output, and returns up to `count` guesses of
    the tokens that follow. `observe`, which may be left out, hears how the last guess fared.
    """

    def propose(self, request_id: str, token_ids: list[int], count: int) -> list[int]: ...


class CustomProposer:
    """Runs a user's drafter, one request at a time."""

    def __init__(self, tables: DraftTables, drafter: CustomDrafter, name: str) -> None:
        self.name = name
        self._tables = tables
        self._drafter = drafter
        self._request_ids: dict[int, str] = {}
        self._guesses: dict[int, tuple[int, list[int]]] = {}  # slot -> tokens known then, the guess

    def enter(self, new: NewSlot) -> None:
        """See Proposer."""
        self._request_ids[new.slot] = new.request_id
        self._guesses.pop(new.slot, None)

    def leave(self, slot: int) -> None:
        """See Proposer."""
        self._request_ids.pop(slot, None)
        self._guesses.pop(slot, None)

    def propose(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """See Proposer. Raises ConfigError if the drafter returns something else than token ids."""
        tables = self._tables
        for slot, count in zip(slots, counts, strict=True):
            tables.num_drafts[slot] = 0
            if tables.finished[slot]:
                continue
            known = int(tables.num_tokens[slot])
            text = tables.tokens[slot, :known].tolist()
            self._tell(slot, text)
            guess = self._drafter.propose(self._request_ids[slot], text, count)
            drafts = guess[: min(count, int(tables.limit[slot]) - known)]
            if not all(map(_is_token, drafts)):
                raise ConfigError(
                    f"drafter {self.name}: propose must return a list of token ids, not {guess!r}"
                )
            if drafts:
                tables.tokens[slot, known : known + len(drafts)] = torch.tensor(drafts, dtype=torch.int32)
                tables.num_drafts[slot] = len(drafts)
            self._guesses[slot] = (known, drafts)

    def _tell(self, slot: int, text: list[int]) -> None:
        observe = getattr(self._drafter, "observe", None)
        if observe is None or slot not in self._guesses:
            return
        known, drafts = self._guesses.pop(slot)
        came = text[known:]
        accepted = 0
        while accepted < min(len(drafts), len(came)) and drafts[accepted] == came[accepted]:
            accepted += 1
        observe(self._request_ids[slot], drafts, accepted)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


def load_drafter(name: str) -> CustomDrafter:
    """Import "package.module:Class" and make one. Raises ConfigError saying what is wrong."""
    module_name, _, class_name = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"speculative method {name!r} cannot be imported: {error}") from error
    drafter = found()
    if not callable(getattr(drafter, "propose", None)):
        raise ConfigError(f"speculative method {name!r}: the class has no method propose")
    return drafter  # type: ignore[no-any-return]
