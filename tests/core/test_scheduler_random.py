"""Random operations on the brain, driven against the fake device, compared with the gold output.

Arrivals with common prefixes, aborts, host stops, preemptions (a cache that is far too small),
drafts of 0-4, dropped device state: after each operation the integrity of everything is checked,
and every request that ends by itself must have produced exactly its gold output.
"""

from __future__ import annotations

import random

import pytest

from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.draft_kv import DraftKV
from octavo.core.draft_planner import EachRequest
from octavo.core.request import FinishReason, Request, Status
from octavo.core.scheduler import Scheduler
from octavo.sampling_params import SamplingParams
from tests.core.fake_device import VOCAB, DraftModel, FakeDevice, gold_output

PARAMS = SamplingParams(temperature=0)


class Simulation:
    """One random life of a scheduler; `step` does one random operation."""

    def __init__(self, seed: int, depth: int, drafter: str = "") -> None:
        self.rng = rng = random.Random(seed)
        self.depth = depth
        self.block_size = rng.choice([1, 2, 4, 16])
        self.max_len = rng.choice([24, 48])
        least = -(-self.max_len // self.block_size)
        self.num_blocks = least + rng.choice([0, 1, least, 4 * least])
        config = SchedulerConfig(
            max_num_seqs=rng.choice([1, 3, 8]),
            max_num_batched_tokens=rng.choice([1, 2, 9, 64]),
            max_model_len=self.max_len,
            max_chunk_tokens=rng.choice([1, 3, 1000]),
            pipeline_depth=depth,
            watermark_blocks=rng.choice([0, 1]),
        )
        cache = CacheConfig(self.block_size, self.num_blocks, True)
        self.max_drafts = self.mood = rng.choice([0, 1, 4])
        draft_kv, draft_model = self.draft_pool(drafter, least) if drafter else (None, None)
        planner = EachRequest(lambda _: self.num_drafts())
        self.scheduler = Scheduler(config, cache, planner, draft_kv)
        self.device = FakeDevice(self.num_blocks, self.block_size, seed, draft_model=draft_model)
        self.prefixes = [[rng.randrange(VOCAB) for _ in range(self.max_len)] for _ in range(3)]
        self.open: dict[str, Request] = {}
        self.arrivals = 0
        self.ended = dict.fromkeys(FinishReason, 0)
        self.hits = 0

    def draft_pool(self, drafter: str, least: int) -> tuple[DraftKV, DraftModel]:
        """From one block to more than are ever needed."""
        rng, with_lookup = self.rng, drafter == "hybrid"
        self.max_drafts = rng.choice([1, 4, 9])
        num_blocks = rng.choice([1, 2, least, 2 * least, 8 * least])
        max_len = rng.choice([self.max_len, self.max_len, self.max_len // 2])
        match = rng.choice([0.0, 0.3, 0.8]) if with_lookup else None
        return (
            DraftKV(num_blocks, self.block_size, max_len, with_lookup=with_lookup),
            DraftModel(num_blocks, self.block_size, max_len, match),
        )

    def num_drafts(self) -> int:
        """Often the same number for a while, as the budget does it; sometimes none for long."""
        rng = self.rng
        if rng.random() < 0.05:
            self.mood = rng.choice([0, 1, self.max_drafts])
        return rng.randint(0, self.max_drafts) if rng.random() < 0.3 else self.mood

    def step(self) -> None:
        choice = self.rng.random()
        if choice < 0.12 and len(self.open) < 20:
            self.arrive()
        elif choice < 0.14 and self.open:
            self.abort(self.rng.choice(sorted(self.open)))
        elif choice < 0.145 and not self.scheduler.num_unread_steps:
            self.scheduler.drop_device_state()
        else:
            self.advance()
        self.scheduler.check_integrity()

    def arrive(self) -> None:
        rng = self.rng
        prompt = rng.choice(self.prefixes)[: rng.randint(1, self.max_len - 2)]
        if rng.random() < 0.5:
            prompt = [*prompt[:-1], rng.randrange(VOCAB)]
        request = Request(
            f"r{self.arrivals}",
            prompt,
            PARAMS,
            seed=self.next_seed(),
            limit=min(self.max_len, len(prompt) + rng.randint(1, self.max_len)),
            arrival=self.arrivals,
            stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 2]))),
            priority=rng.choice([0, 0, 0, -1, 1]),
            cache_namespace=rng.choice(["", "", "salt", None]),
            read_cache=rng.random() < 0.9,
        )
        self.arrivals += 1
        self.open[request.request_id] = request
        self.scheduler.add(request)

    def next_seed(self) -> int:
        return self.rng.randrange(3)

    def abort(self, request_id: str) -> None:
        request = self.open.pop(request_id)
        keep = request.num_output_tokens
        if keep and self.rng.random() < 0.5:  # a stop string: the tokens behind it vanish
            keep = self.rng.randint(1, keep)
            self.scheduler.finish(request_id, FinishReason.STOP, keep)
        else:
            self.scheduler.finish(request_id, FinishReason.ABORT)
        self.check_output(request, complete=False)
        assert request.num_output_tokens == keep

    def advance(self) -> bool:
        """Launch if something can run, and read as late as the depth demands."""
        out = self.scheduler.schedule()
        if out is not None:
            caught_up = sum(rows.catch_up for rows in out.draft.rows) if out.draft is not None else 0
            assert out.num_tokens + caught_up <= self.scheduler.config.max_num_batched_tokens
            self.device.launch(out)
        if self.scheduler.num_unread_steps > self.depth or (out is None and self.scheduler.num_unread_steps):
            self.read()
            return True
        return out is not None

    def read(self) -> None:
        for update in self.scheduler.update(self.device.collect()):
            request = update.request
            assert request.request_id in self.open
            assert update.num_accepted <= update.num_drafts
            if update.new_token_ids:
                assert request.token_ids[-len(update.new_token_ids) :] == update.new_token_ids
            if update.finish_reason is not None:
                assert request.status is Status.FINISHED
                del self.open[request.request_id]
                self.ended[update.finish_reason] += 1
                self.check_output(request, complete=True)

    def check_output(self, request: Request, complete: bool) -> None:
        prompt = request.token_ids[: request.num_prompt_tokens]
        gold = gold_output(prompt, request.seed, request.limit, request.stop_token_ids)
        output = request.output_token_ids
        assert output == (gold if complete else gold[: len(output)]), request

    def drain(self) -> None:
        idle = 0
        while self.scheduler.has_work():
            idle = 0 if self.advance() else idle + 1
            assert idle < 3, "the scheduler is stuck"
            self.scheduler.check_integrity()
        assert self.scheduler.kv.pool.num_used == 0
        if self.scheduler.draft_kv is not None:
            assert self.scheduler.draft_kv.kv.pool.num_used == 0
        assert not self.open


def run(seed: int, depth: int, operations: int, drafter: str = "") -> Simulation:
    simulation = Simulation(seed, depth, drafter)
    for _ in range(operations):
        simulation.step()
    simulation.drain()
    return simulation


def run_many(first_seed: int, lives: int, operations: int) -> None:
    preemptions = hits = stops = lengths = 0
    for seed in range(first_seed, first_seed + lives):
        for depth in (0, 1):
            simulation = run(seed, depth, operations)
            preemptions += simulation.scheduler.stats.num_preemptions
            hits += simulation.scheduler.kv.num_prefix_hits
            stops += simulation.ended[FinishReason.STOP]
            lengths += simulation.ended[FinishReason.LENGTH]
    # The test is worth something only if all of this really happened.
    assert preemptions > lives
    assert hits > lives
    assert stops > lives
    assert lengths > lives


def test_random_operations() -> None:
    run_many(0, lives=30, operations=250)


def run_many_with_a_draft_model(first_seed: int, lives: int, operations: int, drafter: str) -> None:
    evictions = hits = rounds = caught_up = left_early = 0
    for seed in range(first_seed, first_seed + lives):
        for depth in (0, 1):
            simulation = run(seed, depth, operations, drafter)
            draft_kv, model = simulation.scheduler.draft_kv, simulation.device.draft_model
            assert draft_kv is not None
            assert model is not None
            evictions += draft_kv.stats.num_evictions
            hits += draft_kv.kv.num_prefix_hits
            rounds += model.num_rounds
            caught_up += draft_kv.stats.num_catch_up_rows
            left_early += model.max_len < simulation.max_len
    assert evictions > lives / 2
    assert hits > lives
    assert rounds > 20 * lives
    assert caught_up > lives
    assert left_early > 0


@pytest.mark.parametrize("drafter", ["model", "hybrid"])
def test_random_operations_with_a_draft_model(drafter: str) -> None:
    run_many_with_a_draft_model(0, 30, 250, drafter)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["model", "hybrid"])
def test_many_random_operations_with_a_draft_model(drafter: str) -> None:
    run_many_with_a_draft_model(1000, 150, 400, drafter)


@pytest.mark.slow
def test_a_hundred_thousand_random_operations() -> None:
    run_many(1000, lives=150, operations=400)  # two depths: 120,000 operations


@pytest.mark.parametrize("seed", range(8))
def test_both_depths_give_the_same_tokens(seed: int) -> None:
    outputs: list[dict[str, list[int]]] = []
    for depth in (0, 1):
        simulation = Simulation(seed, depth)
        for _ in range(12):
            simulation.arrive()
        requests = list(simulation.open.values())
        simulation.drain()
        outputs.append({r.request_id: r.output_token_ids for r in requests})
    assert outputs[0] == outputs[1]
