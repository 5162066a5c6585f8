"""The parts of the draft budget by themselves: costs, acceptance, the choice of drafts."""

from __future__ import annotations

import itertools
import random

import pytest

from octavo.core.acceptance import MAX_DRAFTS, RequestAcceptance, SharedAcceptance
from octavo.core.cost_model import CostModel
from octavo.core.draft_choice import NOTHING, Curve, Economy, choose, expected

TABLE = [(1, 10.0), (4, 11.0), (8, 15.0), (16, 31.0)]


# ---------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 10.0), (2.5, 10.5), (4, 11.0), (6, 13.0), (16, 31.0), (32, 63.0), (0.5, 10.0)]
)
def test_costs_are_interpolated_and_go_straight_on(rows: float, seconds: float) -> None:
    assert CostModel(TABLE).seconds(rows) == pytest.approx(seconds)
    assert CostModel(TABLE, 0.5).seconds(rows, 100) == pytest.approx(seconds + 50.0)


def test_more_rows_are_never_measured_faster() -> None:
    model = CostModel([(1, 10.0), (2, 9.0), (4, 12.0)])
    assert model.seconds(2) == 10.0


def test_a_padded_pass_costs_what_its_size_costs() -> None:
    model = CostModel(TABLE, padded_sizes=(4, 8))
    assert model.seconds(1) == model.seconds(4) == pytest.approx(11.0)
    assert model.seconds(5) == model.seconds(8) == pytest.approx(15.0)
    assert model.seconds(12) == pytest.approx(23.0)  # above the sizes there is no padding


def test_one_entry_goes_through_the_origin() -> None:
    assert CostModel([(2, 10.0)]).seconds(4) == pytest.approx(20.0)


def test_costs_follow_the_middle_of_what_is_seen_and_not_the_outliers() -> None:
    rng = random.Random(0)
    model = CostModel(TABLE)
    for step in range(600):
        rows = rng.choice([1, 4, 8])
        true = {1: 8.0, 4: 13.2, 8: 15.0}[rows]  # two entries were measured wrong by 20%
        model.observe(rows, 0, true * (5.0 if step % 40 == 0 else rng.lognormvariate(0.0, 0.05)))
    assert model.seconds(1) == pytest.approx(8.0, rel=0.05)
    assert model.seconds(4) == pytest.approx(13.2, rel=0.05)
    assert model.seconds(8) == pytest.approx(15.0, rel=0.05)


def test_a_slower_machine_is_slower_at_every_size() -> None:
    model = CostModel(TABLE)
    for _ in range(200):
        model.observe(4, 0, 11.0 * 1.5)
    assert model.seconds(4) == pytest.approx(16.5, rel=0.02)
    assert model.seconds(16) > 1.15 * 31.0  # a part of it may belong to this size, or to every step


def test_a_size_measured_wrong_is_corrected_there_and_hardly_elsewhere() -> None:
    model = CostModel([(64, 50e-3), (128, 90e-3)])
    for _ in range(200):
        model.observe(64, 0, 50e-3)
    for _ in range(20):
        model.observe(128, 0, 100e-3)
    assert model.seconds(128) == pytest.approx(100e-3, rel=0.05)
    assert model.seconds(64) == pytest.approx(50e-3, rel=0.02)


def test_the_cost_of_kv_is_corrected_by_steps_with_long_contexts() -> None:
    model = CostModel(TABLE, 0.01)
    for _ in range(400):
        model.observe(4, 0, 11.0)
        model.observe(4, 5000, 11.0 + 5000 * 0.015)
    assert model.seconds(4, 5000) == pytest.approx(86.0, rel=0.05)
    assert model.seconds(4) == pytest.approx(11.0, rel=0.05)


# ---------------------------------------------------------------------- acceptance


def feed(acceptance: RequestAcceptance, rates: list[float], steps: int, asked: int, seed: int = 0) -> None:
    """`steps` verified steps of a drafter with these conditional rates; the seed numbers the stretch."""
    rng = random.Random(seed)
    for step in range(10_000 * seed, 10_000 * seed + steps):
        accepted = 0
        while accepted < asked and rng.random() < rates[accepted]:
            accepted += 1
        acceptance.record(asked, asked, accepted)
        if step % 4 == 3:
            acceptance.fold(step)
            acceptance.shared.refresh()


def test_chances_are_products_of_conditional_rates() -> None:
    rates = [0.9, 0.5, 0.8]
    acceptance = RequestAcceptance(SharedAcceptance())
    feed(acceptance, rates, 2000, asked=3)
    chances = acceptance.chances()[:3]
    assert chances == pytest.approx([0.9, 0.45, 0.36], abs=0.08)


def test_positions_never_tried_are_expected_to_be_like_the_last_one() -> None:
    acceptance = RequestAcceptance(SharedAcceptance())
    feed(acceptance, [0.9, 0.9], 400, asked=2)
    assert len(acceptance.chances()) > 5


def test_few_refusals_of_a_deeper_draft_do_not_count_for_much() -> None:
    """Where they do, it is not tried again, and nobody ever sees that it was bad luck."""
    shared = SharedAcceptance()
    acceptance = RequestAcceptance(shared)
    feed(acceptance, [0.8] * 3, 200, asked=3)
    for step in range(3):
        acceptance.record(4, 4, 3)  # the fourth was refused
        acceptance.fold(200 + step)
        shared.refresh()
    assert shared.rates[2] == pytest.approx(0.8, abs=0.08)
    assert shared.rates[3] > 0.5
    for step in range(60):
        acceptance.record(4, 4, 3)
        acceptance.fold(203 + step)
        shared.refresh()
    assert shared.rates[3] < 0.15


def test_a_new_request_starts_as_the_others_were() -> None:
    shared = SharedAcceptance()
    for index in range(20):
        feed(RequestAcceptance(shared), [0.2] * 4, 40, asked=4, seed=index)
    new = RequestAcceptance(shared)
    assert new.chances()[0] == pytest.approx(0.2, abs=0.06)


def test_requests_that_differ_are_told_apart_within_a_few_steps() -> None:
    shared = SharedAcceptance()
    good, bad = RequestAcceptance(shared), RequestAcceptance(shared)
    for step in range(60):
        good.record(3, 3, 3 if step % 4 else 2)
        bad.record(3, 3, 0)
        if step % 4 == 3:
            for acceptance in (good, bad):
                acceptance.fold(step)
            shared.refresh()
    assert good.chances()[0] > 0.85
    assert not bad.chances() or bad.chances()[0] < 0.15


def test_luck_is_not_taken_for_a_difference() -> None:
    shared = SharedAcceptance()
    requests = [RequestAcceptance(shared) for _ in range(30)]
    rng = random.Random(1)
    for step in range(120):
        for acceptance in requests:
            acceptance.record(1, 1, int(rng.random() < 0.5))
            if step % 4 == 3:
                acceptance.fold(step)
        shared.refresh()
    chances = [acceptance.chances()[0] for acceptance in requests]
    assert max(chances) - min(chances) < 0.25  # the counts of 16 steps alone would differ by 0.5
    assert sum(chances) / 30 == pytest.approx(0.5, abs=0.05)


def test_a_text_that_changes_is_followed() -> None:
    acceptance = RequestAcceptance(SharedAcceptance())
    for stretch in range(6):  # learns that texts change and stay changed
        feed(acceptance, [0.9 if stretch % 2 else 0.1] * 4, 80, asked=4, seed=stretch)
    before = acceptance.chances()[0]
    feed(acceptance, [0.1] * 4, 12, asked=4, seed=6)
    assert before > 0.75
    assert acceptance.chances()[0] < 0.35


def test_a_lookup_without_a_match_lowers_the_match_and_not_the_rates() -> None:
    acceptance = RequestAcceptance(SharedAcceptance())
    for step in range(200):
        found = 4 if step % 4 == 0 else 0
        acceptance.record(4, found, found)
        if step % 4 == 3:
            acceptance.fold(step)
            acceptance.shared.refresh()
    assert acceptance.match == pytest.approx(0.25, abs=0.08)
    assert acceptance.chances()[0] > 0.9


def test_drafts_that_were_not_made_count_as_refused() -> None:
    acceptance = RequestAcceptance(SharedAcceptance())
    for step in range(100):
        acceptance.record(4, 2, 2)  # two of four were made, both accepted
        if step % 4 == 3:
            acceptance.fold(step)
            acceptance.shared.refresh()
    chances = acceptance.chances()
    assert chances[1] > 0.9
    assert len(chances) < 3 or chances[2] < 0.2


# ---------------------------------------------------------------------- the choice


class Request:
    def __init__(self, free: Curve, passed: Curve | None = None) -> None:
        self.free = free
        self.passed = passed or free


def economy(
    table: list[tuple[int, float]],
    batch: int,
    *,
    pass_seconds: float = 0.0,
    chunk_rows: int = 0,
    max_rows: int = 1000,
    sizes: tuple[int, ...] = (),
) -> Economy:
    return Economy(
        CostModel(table, padded_sizes=sizes),
        batch=batch,
        kv_tokens=0,
        chunk_rows=chunk_rows,
        max_rows=max_rows,
        pass_seconds=pass_seconds,
        drafting_seconds=0.0,
        trust=1.0,
    )


def random_curve(rng: random.Random) -> Curve:
    chances, chance = [], 1.0
    for _ in range(rng.randint(1, 4)):
        chance *= rng.uniform(0.2, 1.0)
        chances.append(chance)
    return Curve(chances)


def rate_of(requests: list[Request], counts: tuple[int, ...], passes: int, costs: Economy) -> float:
    tokens = rows = 0.0
    for request, count in zip(requests, counts, strict=True):
        more_tokens, more_rows = expected(request, count, passes)
        tokens, rows = tokens + more_tokens, rows + more_rows
    return costs.rate(tokens, rows, passes)


@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_as_good_as_trying_everything(seed: int) -> None:
    rng = random.Random(seed)
    requests: list[Request] = []
    kind = rng.choice(["free", "model", "both"])
    for _ in range(rng.choice([1, 2, 3])):
        free = NOTHING if kind == "model" else random_curve(rng)
        if kind == "free":
            requests.append(Request(free))
            continue
        passed = [max(0.0, *values) for values in itertools.zip_longest(
            [b - a for a, b in itertools.pairwise(free.gains)],
            [b - a for a, b in itertools.pairwise(random_curve(rng).gains)],
            fillvalue=0.0,
        )]  # fmt: skip
        requests.append(Request(free, Curve(passed)))
    table, seconds = [], 10.0
    for rows in (1, 3, 6, 9, 20):
        seconds += rng.choice([0.1, 1.0, 8.0])
        table.append((rows, seconds))
    sizes = rng.choice([(), (2, 6, 12, 20)])
    costs = economy(
        table,
        len(requests),
        pass_seconds=rng.choice([0.3, 2.0]),
        max_rows=rng.choice([2, 100]),
        sizes=sizes,
    )
    # passes 0 to 4 are all tried with 3 in force
    choice = choose(requests, costs, passes_now=3)
    counts = tuple(choice.drafts(requests))
    assert sum(counts) <= costs.max_rows
    found = rate_of(requests, counts, choice.passes, costs)
    best = max(
        rate_of(requests, tried, passes, costs)
        for tried in itertools.product(range(5), repeat=len(requests))
        if sum(tried) <= costs.max_rows
        for passes in range(5)
        if kind != "model" or max(tried) <= passes
    )
    assert found > 0.98 * best  # chances are rounded to 1/40


def test_a_part_of_equal_requests_may_draft_up_to_the_edge_of_the_cheap_rows() -> None:
    requests = [Request(Curve([0.5])) for _ in range(100)]
    costs = economy([(1, 8.0), (128, 8.5), (256, 20.0)], 100)
    counts = choose(requests, costs).drafts(requests)
    assert sum(counts) == 28


def test_a_walk_goes_on_where_a_larger_size_must_be_filled_to_pay() -> None:
    # The first draft opens a larger size and does not pay alone; three more share it.
    requests = [Request(Curve([0.9])), *(Request(Curve([0.8])) for _ in range(3))]
    costs = economy([(4, 10.0), (8, 13.0)], 4, sizes=(4, 8))
    assert choose(requests, costs).drafts(requests) == [1, 1, 1, 1]


def test_a_chunk_fills_the_cheap_rows_and_makes_drafts_dear() -> None:
    requests = [Request(Curve([0.4])) for _ in range(8)]
    table = [(1, 8.0), (128, 8.5), (512, 28.0)]
    assert sum(choose(requests, economy(table, 8)).drafts(requests)) == 8
    assert sum(choose(requests, economy(table, 8, chunk_rows=400)).drafts(requests)) == 8  # 0.05 s a row
    dear = [(1, 8.0), (16, 8.5), (512, 400.0)]
    assert sum(choose(requests, economy(dear, 8)).drafts(requests)) == 8
    assert sum(choose(requests, economy(dear, 8, chunk_rows=400)).drafts(requests)) == 0


def test_rows_that_are_only_computed_with_a_match_are_cheaper() -> None:
    dear = [(1, 10.0), (17, 74.0)]  # 4 a row
    half_matched = [0.5 * chance for chance in (0.7, 0.6)]
    reserved = [Request(Curve(half_matched)) for _ in range(2)]
    not_reserved = [Request(Curve([0.7, 0.6], rows=0.5)) for _ in range(2)]
    assert choose(reserved, economy(dear, 2)).drafts(reserved) == [0, 0]
    assert sum(choose(not_reserved, economy(dear, 2)).drafts(not_reserved)) > 0


def test_no_curve_is_longer_than_the_most_drafts() -> None:
    shared = SharedAcceptance(rate=0.99)
    assert len(RequestAcceptance(shared).chances()) == MAX_DRAFTS


def test_a_disturbed_measurement_is_bounded_by_its_neighbour() -> None:
    model = CostModel([(1, 1e-3), (2, 7e-3), (4, 1.5e-3), (8, 3e-3)])
    assert model.seconds(2) == pytest.approx(2.2e-3)  # a little more than two passes of one row
    assert model.seconds(4) == pytest.approx(2.2e-3)  # never faster than fewer rows
    assert model.seconds(8) == pytest.approx(3e-3)
