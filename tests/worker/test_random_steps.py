"""The real model runner under the scheduler's random operations.

The model is a fake whose KV cache holds token ids: each row reads its whole text back through the
block table and "computes" logits whose greatest is `next_token` of it. So slots, positions, slot
mappings, verification, stop tokens and limits are all the runner's own, and any mistake in them
gives another text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.attention.backend import ForwardContext
from octavo.core.messages import ModelOutput, SchedulerOutput
from octavo.sampling.sampler import Sampler, TorchDraw
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
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden[:, 0].long(), VOCAB).float()


class RunnerDevice:
    """A model runner with the fake device's interface, and a drafter that is sometimes right."""

    def __init__(self, simulation: Simulation, seed: int, steps: Callable[[DeviceState], StepMath]) -> None:
        config = simulation.scheduler.config
        self.state = DeviceState(
            config.max_num_seqs, simulation.max_len, simulation.block_size, torch.device("cpu")
        )
        cache = torch.full((simulation.num_blocks, simulation.block_size), -9, dtype=torch.int64)
        model: Any = FakeModel()
        self.runner = ModelRunner(model, [cache], self.state, steps(self.state), Sampler(TorchDraw()))
        self.outputs: list[ModelOutput] = []
        self.rng = random.Random(seed)

    def launch(self, out: SchedulerOutput) -> None:
        self.runner.forward(out)
        self.outputs.append(self.runner.sample().read())
        for slot, count in out.propose:
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
    def __init__(self, seed: int, depth: int, steps: Callable[[DeviceState], StepMath]) -> None:
        super().__init__(seed, depth)
        self.device = RunnerDevice(self, seed, steps)  # type: ignore[assignment]

    def next_seed(self) -> int:
        return SEED


def run_many(first: int, lives: int, operations: int, steps: Callable[[DeviceState], StepMath]) -> None:
    preemptions = ends = 0
    for seed in range(first, first + lives):
        for depth in (0, 1):
            simulation = RunnerSimulation(seed, depth, steps)
            for _ in range(operations):
                simulation.step()
            simulation.drain()
            preemptions += simulation.scheduler.stats.num_preemptions
            ends += sum(simulation.ended.values())
    assert preemptions > 0
    assert ends > lives


@pytest.fixture(params=[TorchStep, CpuStep])
def steps(request: pytest.FixtureRequest) -> Callable[[DeviceState], StepMath]:
    chosen: Callable[[DeviceState], StepMath] = request.param
    return chosen


def test_random_steps(steps: Callable[[DeviceState], StepMath]) -> None:
    run_many(0, lives=6, operations=60, steps=steps)


@pytest.mark.slow
def test_many_random_steps(steps: Callable[[DeviceState], StepMath]) -> None:
    run_many(100, lives=60, operations=200, steps=steps)
