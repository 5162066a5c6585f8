"""Did two runs say the same? Request by request, token by token, with the place where they part.

Equal work is paired by prompt: two lists that do not belong together are never compared as if they did.
Token ids decide where both runs have them; otherwise (a URL) the texts do. One gap is worth a thousand
differing tokens: behind the first one the texts are free to be anything, so only the first is looked at, and
how far apart the model puts the two tokens there says whether it is rounding or a defect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.bench.record import RequestRecord, RunResult

NEAR_TIE = 1e-3  # logit gap below which float32 arithmetic may fall either way
_CONTEXT = 48  # characters shown of each text around the place where they part

# (prompt_id, the tokens both said, the one expected, the other) -> logit gap, None if it is not known.
# A token that is None means that the answer had ended.
GapFunction = Callable[[str, Sequence[int], int, int], "float | None"]


@dataclass
class Difference:
    """The first place where one answer is not the reference's.

    `position` counts tokens, or characters where `unit` says so. `expected` and `found` are token ids, None
    where that answer had ended there (and always for characters). `logit_gap` is the model's logit of
    `expected` less that of `found`.
    """

    prompt_id: str
    position: int
    unit: str  # "tokens" | "characters"
    expected: int | None
    found: int | None
    expected_text: str = ""
    found_text: str = ""
    logit_gap: float | None = None
    gap_reason: str | None = None  # why the gap is not known

    @property
    def is_near_tie(self) -> bool:
        """True if float32 arithmetic alone explains it."""
        return self.logit_gap is not None and abs(self.logit_gap) <= NEAR_TIE


@dataclass
class Comparison:
    """One run against the reference."""

    reference: str
    label: str
    compared: int = 0
    equal: int = 0
    tokens: int = 0  # compared, up to the first difference of each answer; of texts: characters
    unit: str = "tokens"
    differences: list[Difference] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)  # why requests could not be compared
    unstable: int = 0  # requests whose own repetitions differ from their first one

    @property
    def all_equal(self) -> bool:
        """True if something was compared and nothing differed or was left out."""
        return self.compared > 0 and self.compared == self.equal and not self.skipped

    @property
    def verdict(self) -> str:
        """In a few words."""
        if not self.compared:
            return "nothing to compare"
        if self.compared == self.equal:
            rest = f", {sum(self.skipped.values())} not comparable" if self.skipped else ""
            return f"all {self.equal} equal{rest}"
        near = sum(difference.is_near_tie for difference in self.differences)
        ties = f" ({near} of them near-ties)" if near else ""
        return f"{self.compared - self.equal} of {self.compared} differ{ties}"


def compare_outputs(
    reference: RunResult, other: RunResult, names: tuple[str, str], gap: GapFunction | None = None
) -> Comparison:
    """Compare what two runs answered to the same prompts. `names` label the reference and the other run."""
    found = Comparison(*names)
    skipped: Counter[str] = Counter()
    theirs, ours = _first_answers(reference), _first_answers(other)
    for key, expected in theirs.items():
        record = ours.get(key)
        if record is None:
            skipped["missing in the other run"] += 1
        elif expected.error is not None or record.error is not None:
            skipped["failed in one of the runs"] += 1
        else:
            _compare(found, expected, record, skipped, gap)
    skipped["missing in the reference"] = len(ours.keys() - theirs.keys())
    found.skipped = {why: number for why, number in skipped.items() if number}
    found.unstable = unstable(other)
    return found


def unstable(result: RunResult) -> int:
    """Requests whose repetitions did not all say what the first one said."""
    first = {key: record.output_sha256 for key, record in _first_answers(result).items()}
    changed = set()
    for key, record in _answers(result):
        before = first.get(key)
        again = record.repeat > 0 and record.error is None and before is not None
        if again and record.output_sha256 != before:
            changed.add(key)
    return len(changed)


# ---------------------------------------------------------------------- inside


def _answers(result: RunResult) -> list[tuple[tuple[str, int], RequestRecord]]:
    """Every record under (prompt id, how often the prompt had come before in its repetition)."""
    seen: Counter[tuple[int, str]] = Counter()
    keyed = []
    for record in sorted(result.requests, key=lambda each: (each.repeat, each.index)):
        name = (record.repeat, record.prompt_id)
        keyed.append(((record.prompt_id, seen[name]), record))
        seen[name] += 1
    return keyed


def _first_answers(result: RunResult) -> dict[tuple[str, int], RequestRecord]:
    return {key: record for key, record in _answers(result) if record.repeat == 0}


def _compare(
    found: Comparison,
    expected: RequestRecord,
    record: RequestRecord,
    skipped: Counter[str],
    gap: GapFunction | None,
) -> None:
    ours, theirs = record.output_token_ids, expected.output_token_ids
    if ours is not None and theirs is not None:
        place = first_difference(theirs, ours)
        found.compared += 1
        if place is None:
            found.equal += 1
            found.tokens += len(ours)
            return
        found.tokens += place + 1
        found.differences.append(_token_difference(expected, record, place, gap))
    elif record.output_text is not None and expected.output_text is not None:
        place = first_difference(expected.output_text, record.output_text)
        found.compared += 1
        found.unit = "characters"
        if place is None:
            found.equal += 1
            found.tokens += len(record.output_text)
            return
        found.tokens += place + 1
        found.differences.append(
            Difference(
                record.prompt_id, place, "characters", None, None, *_contexts(expected, record, place),
                gap_reason="token ids are not known for one of the runs",
            )
        )  # fmt: skip
    else:
        skipped["no output was kept"] += 1


def _token_difference(
    expected: RequestRecord, record: RequestRecord, place: int, gap: GapFunction | None
) -> Difference:
    theirs, ours = expected.output_token_ids or [], record.output_token_ids or []
    at = [ids[place] if place < len(ids) else None for ids in (theirs, ours)]
    text_place = None
    if expected.output_text is not None and record.output_text is not None:
        text_place = first_difference(expected.output_text, record.output_text)
    contexts = ("", "")
    if text_place is not None:
        contexts = _contexts(expected, record, text_place)
    difference = Difference(record.prompt_id, place, "tokens", at[0], at[1], *contexts)
    if at[0] is None or at[1] is None:
        difference.gap_reason = "one answer had ended"
    elif gap is None:
        difference.gap_reason = "not measured"
    else:
        difference.logit_gap = gap(record.prompt_id, theirs[:place], at[0], at[1])
        if difference.logit_gap is None:
            difference.gap_reason = "the model could not be asked"
    return difference


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """The first index at which two sequences differ, one that has ended included; None if they are equal."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def _contexts(expected: RequestRecord, record: RequestRecord, place: int) -> tuple[str, str]:
    """What stands around the place in both texts."""
    begin = max(0, place - _CONTEXT)
    lead = "…" if begin else ""
    shown = []
    for text in (expected.output_text or "", record.output_text or ""):
        tail = "…" if len(text) > place + _CONTEXT else ""
        shown.append(f"{lead}{text[begin : place + _CONTEXT]}{tail}")
    return shown[0], shown[1]


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """For a file: plain data with the verdicts."""
    from dataclasses import asdict

    plain: list[dict[str, Any]] = []
    for comparison in comparisons:
        plain.append({**asdict(comparison), "all_equal": comparison.all_equal, "verdict": comparison.verdict})
    return plain


def from_json(plain: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """The other way round."""
    made = []
    for item in plain:
        fields = {key: value for key, value in item.items() if key not in ("all_equal", "verdict")}
        fields["differences"] = [Difference(**difference) for difference in item["differences"]]
        made.append(Comparison(**fields))
    return made
