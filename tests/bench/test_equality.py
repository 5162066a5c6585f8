"""Where do two runs part, and are they compared with the right answers?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from octavo.bench.equality import as_json, compare_outputs, first_difference, from_json
from octavo.bench.record import RunResult, output_hash
from tests.bench.fake_results import fake_result

NAMES = ("a", "b")


def test_equal_runs_are_equal_whatever_the_order() -> None:
    one, other = fake_result(), fake_result("transformers", tpot=0.05)
    other.requests.reverse()
    found = compare_outputs(one, other, NAMES)
    assert found.all_equal
    assert (found.compared, found.equal) == (12, 12)
    assert found.tokens == sum(record.generated_tokens for record in one.requests)
    assert found.verdict == "all 12 equal"


def test_the_first_difference_is_found_with_both_texts() -> None:
    one, other = fake_result(), fake_result(differ=(3, 5))
    asked = []

    def gap(prompt_id: str, before: Sequence[int], expected: int, found: int) -> float:
        asked.append((prompt_id, len(before), expected, found))
        return 2e-4 if prompt_id == one.requests[3].prompt_id else 1.5

    found = compare_outputs(one, other, NAMES, gap)
    assert not found.all_equal
    assert found.equal == 10
    first, second = found.differences
    tokens = one.requests[3].output_token_ids or []
    assert first.prompt_id == one.requests[3].prompt_id
    assert (first.position, first.expected, first.found) == (len(tokens) // 2, tokens[len(tokens) // 2], 7)
    assert first.unit == "tokens"
    assert "另一个 ending" in first.found_text
    assert "另一个 ending" not in first.expected_text
    assert asked[0] == (first.prompt_id, first.position, first.expected, 7)
    assert first.is_near_tie
    assert not second.is_near_tie
    assert found.verdict == "2 of 12 differ (1 of them near-ties)"
    assert from_json(as_json([found])) == [found]


def test_an_answer_that_ends_earlier_differs_at_its_end() -> None:
    one, other = fake_result(), fake_result()
    ids = other.requests[0].output_token_ids or []
    other.requests[0].output_token_ids = ids[:-3]
    difference = compare_outputs(one, other, NAMES, lambda *_: 0.0).differences[0]
    assert (difference.position, difference.found) == (len(ids) - 3, None)
    assert difference.gap_reason == "one answer had ended"
    assert difference.logit_gap is None


def test_texts_decide_where_a_run_has_no_token_ids() -> None:
    one, other = fake_result(), fake_result(differ=(2,))
    for record in other.requests:
        record.output_token_ids = None
    found = compare_outputs(one, other, NAMES)
    assert found.unit == "characters"
    assert found.equal == 11
    assert found.differences[0].unit == "characters"
    assert "token ids are not known" in (found.differences[0].gap_reason or "")


def test_what_cannot_be_compared_is_counted_and_spoils_the_verdict() -> None:
    one, other = fake_result(), fake_result(fail=(0,))
    del other.requests[-1]
    other.requests[1].prompt_id = "another"
    other.requests[2].output_token_ids = other.requests[2].output_text = None
    found = compare_outputs(one, other, NAMES)
    assert found.skipped == {
        "failed in one of the runs": 1,
        "missing in the other run": 2,
        "missing in the reference": 1,
        "no output was kept": 1,
    }
    assert found.compared == found.equal == 8
    assert not found.all_equal
    assert "5 not comparable" in found.verdict


def test_a_prompt_that_comes_twice_is_paired_by_its_turn() -> None:
    def doubled(result: RunResult) -> RunResult:
        for record in result.requests[6:]:
            record.prompt_id = result.requests[record.index - 6].prompt_id
        return result

    same = compare_outputs(doubled(fake_result()), doubled(fake_result()), NAMES)
    assert same.all_equal
    assert same.compared == 12
    other = doubled(fake_result(differ=(8,)))
    assert [d.prompt_id for d in compare_outputs(doubled(fake_result()), other, NAMES).differences] == [
        other.requests[2].prompt_id
    ]


def test_a_run_that_contradicts_itself_is_seen() -> None:
    other = fake_result(repeats=3)
    again = next(record for record in other.requests if record.repeat == 2 and record.index == 4)
    again.output_token_ids = [1, 2, 3]
    again.output_sha256 = output_hash([1, 2, 3], None)
    found = compare_outputs(fake_result(), other, NAMES)
    assert found.unstable == 1
    assert found.compared == 12


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([], [], None), ([1], [1], None), ([1], [], 0), ([1, 2], [1, 3], 1), ("ab", "abc", 2), ([2], [1], 0)],
)
def test_first_difference(one: Sequence[object], other: Sequence[object], place: int | None) -> None:
    assert first_difference(one, other) == place
