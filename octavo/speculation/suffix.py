"""Drafts from earlier outputs: what followed, most often, where the last tokens occurred before.

Prompt lookup reads one text, the request's own. This drafter also remembers the outputs of requests
that have ended, because agents, templates and code say the same again and again. It lives on the host,
where all outputs pass by, so its guess is one step old: it proposes a *continuation*, like a predicted
output, and the device follows it for as long as the true tokens do (octavo/speculation/continued.py).
Matches within a request are the device's own, and fresher.

The memory is a ring of tokens of a fixed size. Every run of three tokens is linked to the place of the
same run before it, as LZ77 compressors do it: O(1) to add a token, no work to forget one, and a fixed 24
bytes a token. (A suffix tree finds the longest match in one walk, but takes some ten times the memory,
and old texts are hard to take out of it.) A search follows the links through at most 64 places, keeps
those with the longest match, and lets them vote, token by token, on what comes next: the most frequent
continuation is proposed, up to where fewer than a quarter of the places agree with all of it.

What one user wrote must not show in how fast another one is answered. So every request belongs to a
*space* (its cache salt, and whom the server serves), and a search sees the places of its own space only.
How long a text is remembered depends on how much the others write, and on nothing else about them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from octavo.core.messages import Continuation
from octavo.kernels.cpu.library import CpuLibraryError
from octavo.kernels.cpu.suffix import CHistory

RUN = 3  # tokens that are linked to their earlier places
MOST_PLACES = 64  # that a search looks at, the latest first
MIN_MATCH = 4  # tokens that must recur before anything is proposed
MAX_MATCH = 16  # a longer match counts as this long
LEAST_AGREEMENT = 0.25  # of the places, with the whole continuation
MAX_CONTINUATION = 64  # tokens
_REFILL = 24  # look again when no more of a continuation is left: a step's drafts, and one in flight
_MAX_SPACES = 4096  # that are known at a time
_CONTEXT = MAX_MATCH  # tokens of the prompt that are remembered in front of an output


class History(Protocol):
    """A bounded memory of token sequences."""

    def add(self, tokens: Sequence[int], space: int) -> None:
        """Remember one more sequence; the oldest tokens are forgotten."""
        ...

    def find(
        self, tail: Sequence[int], space: int, min_match: int, max_match: int, least: float, most: int
    ) -> tuple[int, list[int]]:
        """How many of the last tokens were found, and what followed there: up to `most` tokens.

        (0, []) where fewer than min_match (RUN or more) were found in this space.
        """
        ...


class PythonHistory:
    """The definition; octavo/kernels/cpu/src/suffix.c is the fast form."""

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1, "a history without room"
        assert not capacity & (capacity - 1), "the capacity is a power of two"
        self._capacity = capacity
        self._tokens = [-1] * capacity
        self._spaces = [0] * capacity
        self._earlier = [-1] * capacity
        self._latest = [-1] * capacity
        self._written = 0

    def add(self, tokens: Sequence[int], space: int) -> None:
        """See History."""
        self._write(-1, space)
        for index, token in enumerate(tokens):
            self._write(token, space)
            if index + 1 >= RUN:
                key = _hash(tokens[index + 1 - RUN : index + 1], space, self._capacity)
                place = self._written - 1
                self._earlier[place % self._capacity] = self._latest[key]
                self._latest[key] = place

    def find(
        self, tail: Sequence[int], space: int, min_match: int, max_match: int, least: float, most: int
    ) -> tuple[int, list[int]]:
        """See History."""
        if len(tail) < RUN:
            return 0, []
        place = self._latest[_hash(tail[-RUN:], space, self._capacity)]
        matches: list[tuple[int, int]] = []
        for _ in range(MOST_PLACES):
            if place < max(0, self._written - self._capacity):
                break
            matches.append((self._common(place, tail, space, max_match), place))
            place = self._earlier[place % self._capacity]
        best = max((length for length, _ in matches), default=0)
        if best < min_match:
            return 0, []
        places = [place + 1 for length, place in matches if length == best]
        found: list[int] = []
        agreement = 1.0
        while len(found) < most:
            nexts = [self._at(place) for place in places]
            votes = {token: nexts.count(token) for token in nexts if token >= 0}  # latest place first
            if not votes:
                break
            token = max(votes, key=lambda candidate: votes[candidate])  # the first of equals
            agreement *= votes[token] / len(places)
            if agreement < least:
                break
            found.append(token)
            places = [place + 1 for place, following in zip(places, nexts, strict=True) if following == token]
        return best, found

    def _write(self, token: int, space: int) -> None:
        at = self._written % self._capacity
        self._tokens[at], self._spaces[at], self._earlier[at] = token, space, -1
        self._written += 1

    def _at(self, place: int) -> int:
        return self._tokens[place % self._capacity] if place < self._written else -1

    def _common(self, place: int, tail: Sequence[int], space: int, most: int) -> int:
        oldest = max(0, self._written - self._capacity)
        count = 0
        while count < min(most, len(tail)) and place - count >= oldest:
            at = (place - count) % self._capacity
            if self._tokens[at] != tail[-1 - count] or self._spaces[at] != space:
                break
            count += 1
        return count


def _hash(run: Sequence[int], space: int, capacity: int) -> int:
    mixed = 0
    factors = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x9E3779B97F4A7C15)
    for value, factor in zip((*run, space), factors, strict=True):
        mixed = (mixed ^ (value & 0xFFFF_FFFF)) * factor & 0xFFFF_FFFF_FFFF_FFFF
    return (mixed ^ (mixed >> 29)) & (capacity - 1)


def make_history(num_tokens: int) -> History:
    """A memory of at least `num_tokens` tokens, in C where the kernels were built."""
    capacity = 1 << (num_tokens - 1).bit_length()
    try:
        return CHistory(capacity)
    except CpuLibraryError:
        return PythonHistory(capacity)


@dataclass(slots=True)
class _Follower:
    """What is known of one request's guesses."""

    num_read: int = 0  # tokens of the request, prompt included, taken into account
    start: int = 0  # the position of the continuation's first token
    tokens: Sequence[int] = ()  # the continuation; empty: none holds
    min_match: int = MIN_MATCH


class SuffixGuesser:
    """Proposes continuations for running requests, and remembers those that have ended.

    A request whose continuation holds is not looked up again before it runs out. One whose
    continuation was wrong from the start must show twice as long a match the next time.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._spaces: OrderedDict[Hashable, int] = OrderedDict()  # the longest unused first
        self._num_spaces = 0  # ever; a number is never given to another space
        self._followers: dict[str, _Follower] = {}

    def suggest(
        self, request_id: str, space: Hashable, slot: int, token_ids: Sequence[int], own_drafts_held: bool
    ) -> Continuation | None:
        """A new continuation for a request with these confirmed tokens; None: nothing new to say.

        own_drafts_held: the request's last drafts were all accepted. If they were not ours, whoever
        made them is left in peace.
        """
        follower = self._followers.get(request_id)
        if follower is None:
            follower = self._followers[request_id] = _Follower()
        known = len(token_ids)
        if follower.tokens:
            age = known - follower.start
            came = token_ids[follower.start :]
            if age < 0 or list(follower.tokens[:age]) != came[: len(follower.tokens)]:
                wrong_at_once = age > 0 and follower.tokens[0] != came[0]
                follower.min_match = min(2 * follower.min_match, MAX_MATCH) if wrong_at_once else MIN_MATCH
                follower.tokens = ()
            elif len(follower.tokens) - age >= _REFILL:
                return None
        elif own_drafts_held or known == follower.num_read:
            follower.num_read = known
            return None
        follower.num_read = known
        number = self._spaces.get(space)
        if number is None:
            return None
        tail = token_ids[-MAX_MATCH:]
        _, found = self._history.find(
            tail, number, follower.min_match, MAX_MATCH, LEAST_AGREEMENT, MAX_CONTINUATION
        )
        rest = len(follower.tokens) - (known - follower.start) if follower.tokens else 0
        if len(found) <= rest:
            return None  # what is there goes further
        follower.start, follower.tokens = known, found
        return Continuation(slot, known, found)

    def moved(self, request_id: str) -> None:
        """The request has left its slot, or entered one anew: the device knows no continuation."""
        follower = self._followers.get(request_id)
        if follower is not None:
            follower.tokens, follower.num_read = (), 0

    def finish(
        self, request_id: str, space: Hashable, token_ids: Sequence[int], num_prompt_tokens: int, keep: bool
    ) -> None:
        """A request has ended; with `keep`, its output is remembered."""
        self._followers.pop(request_id, None)
        if not keep or len(token_ids) - num_prompt_tokens < MIN_MATCH:
            return
        number = self._spaces.get(space)
        if number is None:
            number = self._spaces[space] = self._num_spaces
            self._num_spaces += 1
            if len(self._spaces) > _MAX_SPACES:
                self._spaces.popitem(last=False)
        self._spaces.move_to_end(space)
        self._history.add(token_ids[max(0, num_prompt_tokens - _CONTEXT) :], number)
