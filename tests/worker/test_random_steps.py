"""The real model runner under the scheduler's random operations.

The model is a fake whose KV cache holds token ids: each row reads its whole text back through the
block table and "computes" logits whose greatest is `next_token` of it. So slots, positions, slot
mappings, verification, stop tokens and limits are all the runner's own, and any mistake in them
gives another text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.attention.backend import ForwardContext
from octavo.core.messages import ModelOutput, NewSlot, SchedulerOutput
from octavo.sampling.batch import SamplingSlots
from octavo.sampling.sampler import Sampler, TorchDraw
from octavo.speculation.cpu_draft_passes import CpuDraftPasses
from octavo.speculation.draft_model import DraftModel
from octavo.speculation.draft_passes import TorchDraftPasses
from octavo.worker.cpu_step import CpuStep
from octavo.worker.input_batch import DeviceState
from octavo.worker.model_runner import ModelRunner
from octavo.worker.step_math import StepMath, TorchStep
from tests.core.fake_device import VOCAB, next_token
from tests.core.test_scheduler_random import Simulation

SEED = 7  # a greedy model knows no seeds: all requests share this one


class FakeModel:
    """Hidden states are (row's next token); logits are one-hot of it."""

    config = SimpleNamespace(vocab_size=VOCAB)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        meta, cache = ctx.attention, ctx.kv_caches[0]
        block_size = cache.shape[1]
        for row in range(meta.num_tokens):
            if (where := int(meta.slot_mapping[row])) >= 0:
                cache.view(-1)[where] = input_ids[row]
        hidden = torch.zeros(meta.num_tokens, 1)
        for request in range(meta.num_reqs):
            where = request if meta.table_rows is None else int(meta.table_rows[request])
            table = meta.block_table[where].tolist()
            for row in range(int(meta.query_start_loc[request]), int(meta.query_start_loc[request + 1])):
                position = int(positions[row])
                if position >= 0:
                    assert position < int(meta.seq_lens[request])
                    text = [int(cache[table[p // block_size], p % block_size]) for p in range(position + 1)]
                    hidden[row] = next_token(SEED, text)
        return self._wanted(hidden, ctx)

    def _wanted(self, hidden: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return hidden if ctx.wanted is None else hidden[ctx.wanted]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden[:, 0].long(), VOCAB).float()


class FakeDraftNetwork(FakeModel):
    """Reads its text back from the draft cache as well, and guesses wrong at some texts.

    Each text must be the beginning of what some slot holds: its tokens, and the drafts behind them.
    """

    device = torch.device("cpu")

    def __init__(self, state: DeviceState) -> None:
        self._state = state

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        hidden = super().forward(input_ids, positions, replace(ctx, wanted=None))
        meta, cache = ctx.attention, ctx.kv_caches[0]
        held = [row.tolist() for row in self._state.tokens]
        for request in range(meta.num_reqs):
            table = meta.block_table[request].tolist()
            for row in range(int(meta.query_start_loc[request]), int(meta.query_start_loc[request + 1])):
                if (position := int(positions[row])) < 0:
                    continue
                size = cache.shape[1]
                text = [int(cache[table[p // size], p % size]) for p in range(position + 1)]
                assert any(tokens[: position + 1] == text for tokens in held), "draft KV of another text"
                if sum(text) % 3 == 0:
                    hidden[row] = (hidden[row] + 1) % VOCAB
        return self._wanted(hidden, ctx)


class RandomLookup:
    """Finds something now and then, right or wrong."""

    name = "random"

    def __init__(self, state: DeviceState, rng: random.Random, match: float) -> None:
        self._state, self._rng, self._match = state, rng, match

    def enter(self, new: NewSlot) -> None:
        """Nothing to know."""

    def leave(self, slot: int) -> None:
        """Nothing to forget."""

    def propose(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        state = self._state
        for slot, count in zip(slots, counts, strict=True):
            known = int(state.num_tokens[slot])
            if state.finished[slot] or self._rng.random() > self._match:
                continue
            text = state.tokens[slot, :known].tolist()
            for _ in range(min(count, int(state.limit[slot]) - known)):
                text.append(next_token(SEED, text) if self._rng.random() < 0.7 else 3)
            state.tokens[slot, known : len(text)] = torch.tensor(text[known:], dtype=torch.int32)
            state.num_drafts[slot] = len(text) - known


class RunnerDevice:
    """A model runner with the fake device's interface, and a drafter that is sometimes right."""

    def __init__(self, simulation: Simulation, seed: int, steps: Callable[[DeviceState], StepMath]) -> None:
        config = simulation.scheduler.config
        self.state = DeviceState(
            config.max_num_seqs, simulation.max_len, simulation.block_size, torch.device("cpu")
        )
        cache = torch.full((simulation.num_blocks, simulation.block_size), -9, dtype=torch.int64)
        model: Any = FakeModel()
        self.outputs: list[ModelOutput] = []
        self.rng = random.Random(seed)
        sampler, sampling = Sampler(TorchDraw()), SamplingSlots(config.max_num_seqs)
        draft_model, lookup = None, None
        self.drafts_itself = simulation.scheduler.draft_kv is None
        if simulation.scheduler.draft_kv is not None:
            pool = simulation.scheduler.draft_kv
            draft_cache = torch.full((len(pool.kv.pool.blocks), simulation.block_size), -9)
            passes = TorchDraftPasses if steps is TorchStep else CpuDraftPasses
            draft_model = DraftModel(
                FakeDraftNetwork(self.state),
                [draft_cache],
                passes(self.state, simulation.block_size),
                self.state,
                sampler,
                sampling,
                vocab_size=VOCAB,
                target_vocab_size=VOCAB,
            )
            if pool.with_lookup:
                lookup = RandomLookup(self.state, self.rng, 0.4)
        self.runner = ModelRunner(
            model, [cache], self.state, steps(self.state), sampler, lookup,
            sampling=sampling, draft_model=draft_model,
        )  # fmt: skip

    def launch(self, out: SchedulerOutput) -> None:
        self.runner.forward(out)
        self.outputs.append(self.runner.sample().read())
        for slot, _ in out.propose:  # a draft behind the limit would be KV without a block
            room = self.state.limit[slot] - self.state.num_tokens[slot]
            assert 0 <= self.state.num_drafts[slot] <= room
        for slot, count in out.propose if self.drafts_itself else ():
            if self.state.finished[slot]:
                continue
            known = int(self.state.num_tokens[slot])
            text = self.state.tokens[slot, :known].tolist()
            for _ in range(self.rng.randint(0, count)):
                right = self.rng.random() < 0.6
                text.append(next_token(SEED, text) if right else self.rng.randrange(VOCAB))
            drafts = text[known:]
            self.state.tokens[slot, known : len(text)] = torch.tensor(drafts, dtype=torch.int32)
            self.state.num_drafts[slot] = len(drafts)

    def collect(self) -> ModelOutput:
        return self.outputs.pop(0)


class RunnerSimulation(Simulation):
    def __init__(
        self, seed: int, depth: int, steps: Callable[[DeviceState], StepMath], drafter: str = ""
    ) -> None:
        super().__init__(seed, depth, drafter)
        self.accepted = self.drafted = 0
        self.device = RunnerDevice(self, seed, steps)  # type: ignore[assignment]

    def next_seed(self) -> int:
        return SEED

    def read(self) -> None:
        output = self.device.outputs[0]
        self.drafted += sum(output.num_drafts_valid)
        self.accepted += sum(output.num_accepted)
        super().read()


def run_many(
    first: int, lives: int, operations: int, steps: Callable[[DeviceState], StepMath], drafter: str = ""
) -> None:
    preemptions = ends = drafted = accepted = 0
    for seed in range(first, first + lives):
        for depth in (0, 1):
            simulation = RunnerSimulation(seed, depth, steps, drafter)
            for _ in range(operations):
                simulation.step()
            simulation.drain()
            preemptions += simulation.scheduler.stats.num_preemptions
            ends += sum(simulation.ended.values())
            drafted, accepted = drafted + simulation.drafted, accepted + simulation.accepted
    assert preemptions > 0
    assert ends > lives
    if drafter == "model":  # refused at one text of three, whatever block its KV lies in
        assert 0.4 < accepted / drafted < 0.75
    assert accepted > 10


@pytest.fixture(params=[TorchStep, CpuStep])
def steps(request: pytest.FixtureRequest) -> Callable[[DeviceState], StepMath]:
    chosen: Callable[[DeviceState], StepMath] = request.param
    return chosen


def test_random_steps(steps: Callable[[DeviceState], StepMath]) -> None:
    run_many(0, lives=6, operations=60, steps=steps)


@pytest.mark.parametrize("drafter", ["model", "hybrid"])
def test_random_steps_with_a_draft_model(steps: Callable[[DeviceState], StepMath], drafter: str) -> None:
    run_many(0, lives=6, operations=60, steps=steps, drafter=drafter)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["", "model", "hybrid"])
def test_many_random_steps(steps: Callable[[DeviceState], StepMath], drafter: str) -> None:
    run_many(100, lives=60, operations=200, steps=steps, drafter=drafter)
