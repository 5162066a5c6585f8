"""The draft group's promises, one by one; test_scheduler_random.py holds them against chance."""

from __future__ import annotations

import pytest

from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.draft_kv import DraftKV
from octavo.core.draft_planner import EachRequest
from octavo.core.messages import DraftRows, SchedulerOutput
from octavo.core.request import Request
from octavo.core.scheduler import Scheduler
from octavo.sampling_params import SamplingParams
from tests.core.fake_device import DraftModel, FakeDevice, gold_output

BLOCK = 4


class Bench:
    """A scheduler with a draft model, stepped by hand; all drafts are right."""

    def __init__(self, draft_blocks: int = 64, depth: int = 0, budget: int = 64, max_len: int = 128) -> None:
        self.wanted = 2
        config = SchedulerConfig(4, budget, 128, 1000, depth)
        self.drafts = DraftKV(draft_blocks, BLOCK, max_len)
        planner = EachRequest(lambda _: self.wanted)
        self.scheduler = Scheduler(config, CacheConfig(BLOCK, 128, True), planner, self.drafts)
        model = DraftModel(draft_blocks, BLOCK, max_len, None)
        self.device = FakeDevice(128, BLOCK, draft_accuracy=1.0, draft_model=model)
        self.arrivals = 0

    def add(self, prompt: list[int], output: int = 40) -> Request:
        name, limit = f"r{self.arrivals}", len(prompt) + output
        params = SamplingParams(temperature=0)
        request = Request(name, prompt, params, seed=1, limit=limit, arrival=self.arrivals)
        self.arrivals += 1
        self.scheduler.add(request)
        return request

    def step(self) -> SchedulerOutput:
        out = self.scheduler.schedule()
        assert out is not None
        self.device.launch(out)
        if self.scheduler.num_unread_steps > self.scheduler.config.pipeline_depth:
            self.scheduler.update(self.device.collect())
        self.scheduler.check_integrity()
        return out

    def rows(self) -> list[DraftRows]:
        out = self.step()
        assert out.draft is not None
        return out.draft.rows


def test_a_prompt_is_caught_up_within_the_token_budget() -> None:
    bench = Bench(budget=12)
    bench.add(list(range(30)))
    assert [bench.step().num_tokens for _ in range(3)] == [12, 12, 6]
    # The third step has 6 rows left. 29 are owed: the first pass does two itself.
    assert bench.drafts.stats.num_catch_up_rows == 6
    assert [row.catch_up for row in bench.rows()] == [11]
    assert [row.catch_up for row in bench.rows()] == [11]
    assert bench.rows() == [DraftRows(0, 4, 2)]  # the rest, and three tokens that came meanwhile
    assert bench.rows() == [DraftRows(0, 0, 2)]


def test_a_prefix_of_the_draft_cache_is_not_computed_again() -> None:
    bench = Bench()
    prompt = list(range(20))
    bench.add(prompt)
    assert bench.rows() == [DraftRows(0, 19, 2)]
    bench.add([*prompt, 77, 78, 79])
    out = bench.step()
    assert out.draft is not None
    assert [entry.num_computed_tokens for entry in out.draft.entered] == [20]
    assert DraftRows(1, 2, 2) in out.draft.rows  # 24 tokens known, 20 found, two in the first pass


@pytest.mark.parametrize("depth", [0, 1])
def test_one_row_or_two_are_enough_from_then_on(depth: int) -> None:
    bench = Bench(depth=depth)
    request = bench.add(list(range(9)))
    bench.step()
    rows = [row for _ in range(8) for row in bench.rows()]
    assert {row.catch_up for row in rows} == {0}
    while request.finish_reason is None:
        bench.step()
    assert request.output_token_ids == gold_output(list(range(9)), 1, request.limit, ())


def test_who_stops_drafting_gives_its_blocks_back() -> None:
    bench = Bench()
    bench.add([1, 2, 3], output=60)
    bench.step()
    bench.wanted = 0
    bench.step()
    assert bench.drafts.kv.pool.num_used > 0
    for _ in range(16):
        bench.step()
    assert bench.drafts.kv.pool.num_used == 0
    bench.wanted = 2
    out = bench.step()  # it comes back: what was registered is found again
    assert out.draft is not None
    assert out.draft.entered[0].num_computed_tokens >= BLOCK


def test_the_last_in_order_is_evicted_and_goes_on() -> None:
    bench = Bench(draft_blocks=8)
    first, second = bench.add([1, 2, 3], output=28), bench.add([9, 8, 7], output=28)
    evicted: list[int] = []
    while bench.scheduler.has_work():
        out = bench.step()
        evicted += out.draft.left if out.draft is not None else []
    assert evicted == [1]  # the second one's slot
    for request in (first, second):
        prompt = request.token_ids[:3]
        assert request.output_token_ids == gold_output(prompt, 1, request.limit, ())


def test_beyond_the_draft_models_context_it_is_said_why() -> None:
    bench = Bench(max_len=10)
    request = bench.add(list(range(20)))
    out = bench.step()
    assert out.draft is not None
    assert out.propose == []
    assert not out.draft.entered
    owed, blocked = bench.drafts.survey([request], [out.rows[0]])
    assert owed
    assert blocked == {0: "beyond the draft model's context of 10 tokens"}


def test_nobody_enters_a_pool_that_cannot_hold_it() -> None:
    bench = Bench(draft_blocks=4)
    bench.add(list(range(20)))
    out = bench.step()
    assert out.draft is not None
    assert not out.draft.rows
    assert bench.drafts.stats.num_evictions == 0
