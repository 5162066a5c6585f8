"""What speculation should bring, against figures worked out by hand."""

from __future__ import annotations

import pytest

from octavo.core.cost_model import CostModel
from octavo.core.outlook import ACCEPTANCES, prospects

FREE_ROWS = CostModel([(1, 0.010), (64, 0.010)])
EACH_ROW = CostModel([(1, 0.010), (64, 0.640)])
SECOND_ROW = CostModel([(1, 0.010), (2, 0.015), (3, 0.100), (64, 10.0)])


def test_where_rows_are_free_every_draft_pays() -> None:
    (one,) = prospects(FREE_ROWS, None, 100, 1000, batches=[1])
    assert one.plain_seconds == 0.010
    assert one.pass_seconds == 0.0
    assert one.break_even == pytest.approx(0.0, abs=1e-6)
    for acceptance, (gain, count) in zip(ACCEPTANCES, one.gains, strict=True):
        assert count == 16
        assert gain == pytest.approx((1 - acceptance**17) / (1 - acceptance))


def test_where_rows_cost_their_full_price_none_does() -> None:
    (one,) = prospects(EACH_ROW, None, 0, 1000, batches=[1])
    assert one.break_even is None
    assert one.gains == ((1.0, 0),) * 4


def test_the_break_even_is_where_a_draft_earns_its_row() -> None:
    (one,) = prospects(SECOND_ROW, None, 0, 1000, batches=[1])
    assert one.break_even == pytest.approx(0.5)  # a half more time, a half more tokens
    assert one.gains[0] == (1.0, 0)
    gain, count = one.gains[3]
    assert gain == pytest.approx(1.9 / 1.5)
    assert count == 1


def test_draft_passes_are_paid_for() -> None:
    passes = CostModel([(1, 0.002), (64, 0.002)])
    (one,) = prospects(FREE_ROWS, passes, 0, 1000, batches=[1])
    assert one.break_even == pytest.approx(0.2)
    best = max((1 - 0.7 ** (k + 1)) / 0.3 / (1 + 0.2 * k) for k in range(17))
    assert one.gains[2][0] == pytest.approx(best)


def test_a_fixed_number_is_taken_as_it_is() -> None:
    (one,) = prospects(SECOND_ROW, None, 0, 1000, fixed=1, batches=[1])
    gain, count = one.gains[0]
    assert gain == pytest.approx(1.3 / 1.5)  # a loss is shown as one
    assert count == 1
    assert one.break_even == pytest.approx(0.5)
    (none,) = prospects(SECOND_ROW, None, 0, 1000, fixed=0, batches=[1])
    assert none.break_even is None


def test_contexts_and_the_token_budget_count() -> None:
    reading = CostModel([(1, 0.010), (2, 0.015), (64, 0.325)], 1e-5)
    short, long = (prospects(reading, None, context, 1000, batches=[1])[0] for context in (0, 1000))
    assert long.plain_seconds == pytest.approx(0.020)
    assert short.break_even is not None
    assert long.break_even is not None
    assert long.break_even < short.break_even  # the KV is read once for all rows
    found = prospects(FREE_ROWS, None, 0, 24)
    assert [one.batch for one in found] == [1, 8]
    assert found[1].gains[3][1] == 2  # 24 rows are three for each
