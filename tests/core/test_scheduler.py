"""The scheduler's promises, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.draft_planner import EachRequest
from octavo.core.messages import RowKind, SchedulerOutput
from octavo.core.request import FinishReason, Request
from octavo.core.scheduler import RequestUpdate, Scheduler
from octavo.sampling_params import SamplingParams
from tests.core.fake_device import FakeDevice, gold_output

PARAMS = SamplingParams(temperature=0)
BLOCK = 4


class Bench:
    """A scheduler and a fake device, stepped by hand."""

    def __init__(self, depth: int = 0, blocks: int = 64, drafts: int = 0, **limits: int) -> None:
        values: dict[str, Any] = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "max_model_len": 128,
            "max_chunk_tokens": 1000,
            "pipeline_depth": depth,
        }
        self.config = SchedulerConfig(**{**values, **limits})
        self.scheduler = Scheduler(
            self.config, CacheConfig(BLOCK, blocks, True), EachRequest(lambda _: drafts)
        )
        self.device = FakeDevice(blocks, BLOCK, draft_accuracy=1.0)
        self.arrivals = 0

    def add(self, prompt: list[int], output: int = 8, **options: Any) -> Request:
        request = Request(
            f"r{self.arrivals}",
            prompt,
            PARAMS,
            seed=1,
            limit=len(prompt) + output,
            arrival=self.arrivals,
            **options,
        )
        self.arrivals += 1
        self.scheduler.add(request)
        return request

    def step(self) -> SchedulerOutput | None:
        out, _ = self.step_and_read()
        return out

    def step_and_read(self) -> tuple[SchedulerOutput | None, list[RequestUpdate]]:
        out = self.scheduler.schedule()
        updates: list[RequestUpdate] = []
        if out is not None:
            self.device.launch(out)
        if self.scheduler.num_unread_steps > (self.config.pipeline_depth if out is not None else 0):
            updates = self.scheduler.update(self.device.collect())
        self.scheduler.check_integrity()
        return out, updates

    def run(self) -> list[SchedulerOutput]:
        outs = []
        while self.scheduler.has_work():
            out = self.step()
            if out is not None:
                outs.append(out)
        return outs


def rows_of(out: SchedulerOutput | None) -> list[tuple[str, int, RowKind, bool]]:
    assert out is not None
    return [
        (key.request_id, rows.num_rows, rows.kind, rows.samples)
        for key, rows in zip(out.row_keys, out.rows, strict=True)
    ]


def test_decodes_go_before_chunks_and_chunks_before_new_requests() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add([1, 2, 3])
    bench.step()
    bench.add(list(range(20)))
    bench.add([9, 9])
    assert rows_of(bench.step()) == [("r0", 1, RowKind.VERIFY, True), ("r1", 7, RowKind.CHUNK, False)]
    assert rows_of(bench.step()) == [("r0", 1, RowKind.VERIFY, True), ("r1", 7, RowKind.CHUNK, False)]
    assert rows_of(bench.step()) == [
        ("r0", 1, RowKind.VERIFY, True),
        ("r1", 6, RowKind.CHUNK, True),
        ("r2", 1, RowKind.CHUNK, False),
    ]


@pytest.mark.parametrize("depth", [0, 1])
def test_no_row_is_wasted_without_drafts(depth: int) -> None:
    bench = Bench(depth)
    requests = [bench.add([index, 1, 2, 3, 4], output=5 + index) for index in range(3)]
    outs = bench.run()
    rows = sum(out.num_tokens for out in outs)
    # Each prompt token once, each output token but the last once.
    assert rows == sum(r.num_tokens - 1 for r in requests)
    for request in requests:
        assert request.finish_reason is FinishReason.LENGTH
        assert request.output_token_ids == gold_output(request.token_ids[:5], 1, request.limit, ())


def test_a_prefix_is_shared_in_the_step_that_computes_it() -> None:
    bench = Bench()
    prompt = list(range(10))
    first, second = bench.add(prompt), bench.add([*prompt, 77])
    assert rows_of(bench.step()) == [
        ("r0", 10, RowKind.CHUNK, True),
        ("r1", 3, RowKind.CHUNK, True),  # 8 of 11 tokens are in two full blocks
    ]
    assert second.num_cached_tokens == 8
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2] is not second.blocks[2]


def test_a_hit_never_covers_the_last_prompt_token() -> None:
    bench = Bench()
    bench.add(list(range(8)))
    bench.run()
    again = bench.add(list(range(8)))
    assert rows_of(bench.step()) == [("r1", 4, RowKind.CHUNK, True)]
    assert again.num_cached_tokens == 4


def test_generated_tokens_are_cached_too() -> None:
    bench = Bench()
    first = bench.add([1, 2, 3], output=10)
    bench.run()
    follow_up = bench.add([*first.token_ids, 5, 6])
    bench.step()
    assert follow_up.num_cached_tokens == 12  # 13 tokens, the last one's KV was never computed


@pytest.mark.parametrize(
    ("first", "second", "shared"), [("", "", 8), ("a", "a", 8), ("a", "b", 0), ("", "a", 0), (None, None, 0)]
)
def test_namespaces_do_not_share(first: str | None, second: str | None, shared: int) -> None:
    bench = Bench()
    bench.add(list(range(10)), cache_namespace=first)
    request = bench.add(list(range(10)), cache_namespace=second)
    bench.step()
    assert request.num_cached_tokens == shared


def test_a_request_that_does_not_read_the_cache_still_fills_it() -> None:
    bench = Bench()
    bench.add(list(range(10)))
    bench.add(list(range(10)), read_cache=False)
    assert [rows[1] for rows in rows_of(bench.step())] == [10, 10]
    bench = Bench()
    bench.add(list(range(10)), read_cache=False)
    bench.add(list(range(10)))
    assert [rows[1] for rows in rows_of(bench.step())] == [10, 2]


def test_drafts_get_rows_in_the_next_step_and_never_pass_the_limit() -> None:
    bench = Bench(drafts=4)
    request = bench.add([1, 2], output=7)
    first = bench.step()
    assert first is not None
    assert first.propose == [(0, 4)]
    assert rows_of(bench.step()) == [("r0", 5, RowKind.VERIFY, True)]
    assert request.num_output_tokens == 6  # all drafts were right, and one token came for free
    last = bench.step()
    assert rows_of(last) == [("r0", 1, RowKind.VERIFY, True)]
    assert last is not None
    assert last.propose == []
    assert request.finish_reason is FinishReason.LENGTH


def test_preemption_takes_the_last_arrival_and_gives_it_back_its_place() -> None:
    bench = Bench(blocks=8)
    requests = [bench.add([index] * 7, output=9) for index in range(3)]
    bench.step()
    assert bench.scheduler.num_running == 3
    bench.run()
    assert [r.num_preemptions for r in requests] == [0, 0, 1]
    for request in requests:
        assert request.output_token_ids == gold_output(request.token_ids[:7], 1, request.limit, ())


def test_priority_decides_before_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add([1], output=2)
    bench.step()
    bench.add([2], output=2)
    urgent = bench.add([3], output=2, priority=-5)
    bench.step()
    bench.step()
    assert bench.scheduler.running == [urgent]


def test_the_watermark_keeps_blocks_for_those_who_run() -> None:
    bench = Bench(blocks=4, watermark_blocks=1)
    bench.add([1] * 8)
    bench.step()
    bench.add([2] * 8)
    bench.step()
    assert bench.scheduler.num_running == 1  # 2 blocks are free, one of them is kept


@pytest.mark.parametrize("depth", [0, 1])
def test_an_abort_frees_everything_within_two_steps(depth: int) -> None:
    bench = Bench(depth)
    request, other = bench.add([1] * 9, output=50), bench.add([2] * 9, output=50)
    for _ in range(4):
        bench.step()
    bench.scheduler.finish(request.request_id, FinishReason.ABORT)
    bench.step()
    bench.step()
    assert bench.scheduler.kv.pool.num_used == len(other.blocks)
    assert not request.blocks
    assert sorted(bench.scheduler._slots._free) == [0, 2, 3]


def test_what_two_unread_steps_hold_is_kept_until_the_second_was_read() -> None:
    bench = Bench(1)
    request = bench.add([1] * 9, output=50)
    for _ in range(2):
        out = bench.scheduler.schedule()
        assert out is not None
        bench.device.launch(out)
    bench.scheduler.finish(request.request_id, FinishReason.ABORT)
    assert bench.scheduler.update(bench.device.collect()) == []
    assert request.is_zombie
    assert request.blocks
    bench.scheduler.check_integrity()
    assert bench.scheduler.update(bench.device.collect()) == []
    assert not request.blocks
    assert sorted(bench.scheduler._slots._free) == [0, 1, 2, 3]


def test_a_stop_string_makes_later_tokens_vanish() -> None:
    bench = Bench(1)
    request = bench.add([1, 2, 3], output=30)
    for _ in range(6):
        bench.step()
    assert request.num_output_tokens > 3
    bench.scheduler.finish(request.request_id, FinishReason.STOP, 3)
    assert request.output_token_ids == gold_output([1, 2, 3], 1, 33, ())[:3]
    while bench.scheduler.has_work():
        _, updates = bench.step_and_read()
        assert updates == []
    assert request.num_output_tokens == 3


def test_a_generation_tells_the_users_of_a_slot_apart() -> None:
    bench = Bench(max_num_seqs=1)
    first, second = bench.add([1], output=1), bench.add([2], output=1)
    bench.run()
    assert first.key[:2] == (0, 1)
    assert second.key[:2] == (0, 2)


def test_dropped_device_state_is_sent_again() -> None:
    bench = Bench(drafts=2)
    request = bench.add([1, 2, 3], output=20)
    bench.step()
    bench.step()
    bench.scheduler.drop_device_state()
    out = bench.step()
    assert out is not None
    assert out.freed_slots == [0]
    (new,) = out.new_slots
    assert new.generation == 2
    assert new.num_computed_tokens == len(new.token_ids) - 1
    assert rows_of(out) == [("r0", 1, RowKind.VERIFY, True)]
    bench.run()
    assert request.output_token_ids == gold_output([1, 2, 3], 1, 23, ())


def test_a_blocked_head_is_seldom_looked_at_and_enters_when_it_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(blocks=40, max_num_seqs=12, max_model_len=160)
    small = [bench.add([index, 5, 6, 7, 8, 9], output=2 + 3 * index) for index in range(8)]
    bench.step()
    head = bench.add(list(range(100, 220)), output=4)  # 30 blocks
    pool, looks = bench.scheduler.kv.pool, []
    find = bench.scheduler.kv.find_prefix

    def noted(request: Request) -> Any:
        looks.append(request)
        return find(request)

    monkeypatch.setattr(bench.scheduler.kv, "find_prefix", noted)
    while head.slot < 0:
        free, num_steps = pool.num_free, bench.scheduler.stats.num_steps
        bench.step()
        assert head.slot >= 0 or free < 30, f"it would have fitted in step {num_steps}"
    assert any(request.finish_reason is None for request in small), "it waited until it was alone"
    assert sum(request.finish_reason is not None for request in small) >= 2
    assert len(looks) == 2  # when it came, and when it fitted
    bench.run()
    assert head.output_token_ids == gold_output(head.token_ids[:120], 1, 124, ())


def test_chunks_are_bounded() -> None:
    bench = Bench(max_chunk_tokens=3)
    bench.add(list(range(8)))
    assert [rows_of(bench.step())[0][1] for _ in range(3)] == [3, 3, 2]


def test_no_sliver_of_a_prompt() -> None:
    """A prompt that would only begin in what a step has left waits for the next, and nobody starves."""
    bench = Bench(max_num_batched_tokens=32, least_chunk_rows=8, blocks=60)
    for first in (0, 100, 200):
        bench.add(list(range(first, first + 14)))
    bench.add(list(range(300, 303)))
    rows = [
        [(row.slot, row.num_rows) for row in out.rows if row.kind is RowKind.CHUNK] for out in bench.run()
    ]
    assert [len(step) for step in rows[:2]] == [2, 2]  # 4 rows were left; then 14 and 3
    assert [count for _, count in rows[0] + rows[1]] == [14, 14, 14, 3]
    alone = Bench(max_num_batched_tokens=5, least_chunk_rows=8)  # no step has room for so many
    alone.add(list(range(14)))
    alone.add(list(range(20, 34)))
    alone.run()


def test_a_finished_id_can_be_aborted_harmlessly() -> None:
    bench = Bench()
    bench.add([1], output=1)
    bench.run()
    bench.scheduler.finish("r0", FinishReason.ABORT)
    bench.scheduler.finish("never seen", FinishReason.ABORT)
    bench.scheduler.check_integrity()
