"""The comparison: every pair looked at once, and the first difference of each explained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.batch.compare.entries import Entry, ResultSet, Text

Kind = Literal["missing", "error", "seed", "text", "end", "other"]

CONTEXT_CHARACTERS = 40
_MISSING = object()


@dataclass(frozen=True, slots=True)
class TextDifference:
    """Where two texts part."""

    key: str
    part: str
    at: int  # characters they have in common
    a: Text
    b: Text


@dataclass(slots=True)
class Difference:
    """What is first found to differ in a pair, for people. `why` may be filled in later."""

    name: str
    kind: Kind
    what: str
    why: str = ""
    text: TextDifference | None = None


@dataclass
class Comparison:
    """The outcome. `shown` holds the first differences only."""

    num_pairs: int = 0
    num_equal: int = 0
    counts: Counter[Kind] = field(default_factory=Counter)
    shown: list[Difference] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)  # those that differ, one line each

    @property
    def is_same(self) -> bool:
        """True if every entry of one side is in the other, and equal."""
        return not self.counts

    @property
    def num_different(self) -> int:
        """Entries that are on one side only, or not equal."""
        return sum(self.counts.values())


def compare(a: ResultSet, b: ResultSet, *, max_shown: int = 20) -> Comparison:
    """Compare two results, whatever the order of theirs."""
    found = Comparison(settings=list(differing_settings(a.settings, b.settings)))
    for difference in _differences(a, b, found):
        found.counts[difference.kind] += 1
        if len(found.shown) < max_shown:
            found.shown.append(difference)
    return found


def differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """`name: x in A, y in B`, nested objects by their members."""
    for path, one, other in _leaves(a, b, ""):
        yield f"{path}: {_shown(one)} in A, {_shown(other)} in B"


def _differences(a: ResultSet, b: ResultSet, found: Comparison) -> Iterator[Difference]:
    for key in a.names():
        one, other = a.get(key), b.get(key)
        assert one is not None
        if other is None:
            yield Difference(one.name, "missing", "only in A")
            continue
        found.num_pairs += 1
        difference = first_difference(key, one, other)
        if difference is None:
            found.num_equal += 1
        else:
            yield difference
    for key in b.names():
        other = b.get(key)
        assert other is not None
        if a.get(key) is None:
            yield Difference(other.name, "missing", "only in B")


def first_difference(key: str, a: Entry, b: Entry) -> Difference | None:
    """What is first found to differ in two entries; None if they are equal."""
    if a.error != b.error:
        if a.error is not None and b.error is not None:
            return Difference(a.name, "error", f"A failed ({a.error}), B otherwise ({b.error})")
        side, error = ("A", a.error) if a.error is not None else ("B", b.error)
        return Difference(a.name, "error", f"{side} failed: {error}")
    if a.seed != b.seed:
        return Difference(
            a.name,
            "seed",
            f"seed {a.seed} in A, {b.seed} in B",
            "other seeds draw other texts where it is sampled",
        )
    if len(a.texts) != len(b.texts):
        return Difference(a.name, "other", f"{len(a.texts)} answers in A, {len(b.texts)} in B")
    for one, other in zip(a.texts, b.texts, strict=True):
        if one.text != other.text:
            at = _common_length(one.text, other.text)
            return Difference(
                a.name, "text", _where(one, other, at), text=TextDifference(key, one.part, at, one, other)
            )
        if one.finish_reason != other.finish_reason:
            return Difference(
                a.name, "end", f"the same text, ended by {one.finish_reason} in A, {other.finish_reason} in B"
            )
    for path, left, right in _leaves(a.rest, b.rest, ""):
        return Difference(
            a.name, "other", f"the same text; {path}: {_shown(left)} in A, {_shown(right)} in B"
        )
    return None


def _where(one: Text, other: Text, at: int) -> str:
    lead = f"{one.part}: " if one.part else ""
    before = one.text[max(0, at - CONTEXT_CHARACTERS) : at]
    rests = []
    for text in (one, other):
        rest = text.text[at : at + CONTEXT_CHARACTERS]
        rests.append(_quoted(rest) if rest else f"the end ({text.finish_reason})")
    return f"{lead}after {at} equal characters, … {_quoted(before)}: A goes on {rests[0]}, B {rests[1]}"


def _common_length(a: str, b: str) -> int:
    """Characters that two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _leaves(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two pieces of plain data differ: (path, of a, of b)."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in [*a, *(name for name in b if name not in a)]:
            inner = f"{path}.{name}" if path else str(name)
            yield from _leaves(a.get(name, _MISSING), b.get(name, _MISSING), inner)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _leaves(one, other, f"{path}[{number}]")
    elif a != b:
        yield path, a, b


def _shown(value: Any) -> str:
    text = "nothing" if value is _MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:119] + "…"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
