"""Steps that are one graph, under the scheduler's random operations: what lies around their forwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.attention.backend import ForwardContext  # noqa: E402
from octavo.core.messages import NewSlot, RowKind, Rows, SchedulerOutput, SlotKey  # noqa: E402
from octavo.kernels.triton import rules  # noqa: E402
from octavo.sampling.batch import SamplingSlots  # noqa: E402
from octavo.sampling.coins import CoinTable  # noqa: E402
from octavo.sampling.device_rules import DeviceRules  # noqa: E402
from octavo.sampling.gpu_draw import GpuDraw  # noqa: E402
from octavo.sampling.noise import Stream  # noqa: E402
from octavo.sampling.sampler import Sampler  # noqa: E402
from octavo.sampling_params import SamplingParams  # noqa: E402
from octavo.speculation.acceptance import SyntheticAcceptance  # noqa: E402
from octavo.worker.cuda_graph import StepBuffers  # noqa: E402
from octavo.worker.gpu_step import GpuStep  # noqa: E402
from octavo.worker.graph_sizes import GraphKey, GraphSizes  # noqa: E402
from octavo.worker.input_batch import DeviceState  # noqa: E402
from octavo.worker.model_runner import ModelRunner  # noqa: E402
from octavo.worker.whole_step import WholeSteps  # noqa: E402
from tests.worker.test_random_steps import RunnerSimulation  # noqa: E402

rules._PARTS, rules._BLOCK = 1, 64  # a program of the interpreter takes long
CPU = torch.device("cpu")
SIZES = GraphSizes.of([1, 2, 4, 8, 16, 32])


class Graphs:
    """What a graph holds, run launch by launch."""

    def __init__(self, model: Any, cache: torch.Tensor, buffers: StepBuffers, whole: WholeSteps) -> None:
        self.sizes, self.buffers = SIZES, buffers
        self._model, self._cache, self._whole = model, cache, whole
        self.keys: set[GraphKey] = set()

    def has(self, key: GraphKey) -> bool:
        return True

    def run(self, key: GraphKey) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.add(key)
        self._whole.before(key)
        step = self.buffers.metadata(key.rows, key.rows, 16, 4096)
        ids = self.buffers.input_ids[: key.rows]
        hidden = self._model.forward(ids, step.positions, ForwardContext(step, [self._cache]))
        return hidden, self._whole.behind(key, hidden)

    def replays(self, step: Any) -> bool:
        return self.sizes.padded(step.num_tokens, step.max_query_len) is not None

    def replay(self, input_ids: torch.Tensor, step: Any, wanted: torch.Tensor | None = None) -> torch.Tensor:
        context = ForwardContext(step, [self._cache])
        hidden: torch.Tensor = self._model.forward(input_ids, step.positions, context)
        return hidden if wanted is None else hidden[wanted]


def with_graphs(
    runner: ModelRunner, state: DeviceState, synthetic: SyntheticAcceptance | None = None
) -> Graphs:
    """Give a runner whole steps of up to 32 rows."""
    steps: Any = runner._steps
    whole = WholeSteps(steps, steps._buffers, runner.model, 32, synthetic)
    graphs = Graphs(runner.model, runner._kv_caches[0], steps._buffers, whole)
    runner.whole_steps, runner.graphs = whole, graphs  # type: ignore[assignment]
    return graphs


def gpu(state: DeviceState) -> Any:
    return GpuStep(state, StepBuffers.allocate(600, state.num_slots, state.block_table), SIZES)


@pytest.mark.parametrize("depth", [0, 1])
def test_under_the_scheduler(depth: int) -> None:
    simulation = RunnerSimulation(5, depth, gpu)
    device: Any = simulation.device
    graphs = with_graphs(device.runner, device.state)
    for _ in range(45):
        simulation.step()
    simulation.drain()
    assert sum(simulation.ended.values()) > 3
    assert simulation.accepted > 0
    assert len(graphs.keys) >= 2


VOCAB = 50


class Noisy:
    """Logits that depend on the row's input and position alone."""

    config = SimpleNamespace(vocab_size=VOCAB)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        hidden = torch.stack((input_ids, positions), dim=1)
        return hidden if ctx.wanted is None else hidden[ctx.wanted]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(VOCAB)
        return ((hidden[:, :1] * 37 + hidden[:, 1:] * 11 + ids * 29) % 83).float() / 20


PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, logprobs=2),
    SamplingParams(temperature=1.0, logit_bias={3: 2.0}),
    SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(temperature=1.0, min_tokens=5, bad_words=["ab"], allowed_token_ids=list(range(2, 30))),
    SamplingParams(temperature=0.0, frequency_penalty=1.0),
]
SEEDS = [1, 2**63 + 5, 3, 2**64 - 1, 77, 8, 21, 22, 23]


def life(chosen: list[int], whole: bool, rates: list[float] | None = None) -> tuple[Any, int]:
    """Some requests enter and decode, with drafts in the table; what every step brought.

    Without whole steps their rules are the host's to apply.
    """
    state = DeviceState(len(PARAMS), 64, 4, CPU)
    acceptance = None
    if rates is not None:
        coins = CoinTable(len(PARAMS), state.tokens.shape[1], Stream.SYNTHETIC, CPU)
        acceptance = SyntheticAcceptance(state, rates, coins)
    runner = ModelRunner(
        Noisy(), [torch.zeros(1)], state, gpu(state), Sampler(GpuDraw()),  # type: ignore[arg-type]
        sampling=SamplingSlots(len(PARAMS), DeviceRules(len(PARAMS), VOCAB, CPU) if whole else None),
        acceptance=acceptance,
    )  # fmt: skip
    graphs = with_graphs(runner, state, acceptance) if whole else None
    if graphs is None:
        runner._forward = lambda ids, step, wanted=None: runner.model.forward(  # type: ignore[method-assign,assignment]
            ids, step.positions, ForwardContext(step, [], wanted)
        )
    found: list[Any] = []
    keys = [SlotKey(slot, 0, str(slot)) for slot in chosen]
    news = [
        NewSlot(slot, 0, str(slot), [slot, 4, 9], 3, [slot * 16 + b for b in range(16)], 0, PARAMS[slot],
                SEEDS[slot], (7, 9), 40, bad_words_ids=((9, 12), (12,), (4, 9, 20)))
        for slot in chosen
    ]  # fmt: skip
    widths = [3 if whole_rows else 1 for whole_rows in (0, 1, 1, 0, 1, 1, 0)]
    steps = [[Rows(slot, 3, RowKind.CHUNK, True) for slot in chosen]]
    steps += [[Rows(slot, width, RowKind.VERIFY, True) for slot in chosen] for width in widths]
    for number, rows in enumerate(steps):
        for slot in chosen if number else ():  # drafts that are right by chance
            if not state.finished[slot]:
                known = int(state.num_tokens[slot])
                state.tokens[slot, known : known + 2] = torch.tensor([(number * 5 + slot) % VOCAB, 11])
                state.num_drafts[slot] = rows[0].num_rows - 1
        runner.forward(
            SchedulerOutput(number, new_slots=news if number == 0 else [], rows=rows, row_keys=keys)
        )
        output = runner.sample().read()
        found.append((output.tokens, output.num_drafts_valid, output.num_accepted, output.finished))
    found.append(state.tokens[chosen].tolist())
    return found, 0 if graphs is None else len(graphs.keys)


@pytest.mark.parametrize(
    ("chosen", "rates"),
    [
        ([0], None),
        ([0], [0.8, 0.5]),
        ([1, 2], None),
        ([1, 2], [0.8, 0.5]),
        ([1, 3, 5, 6], [0.8, 0.5]),
        (list(range(len(PARAMS))), None),
    ],
)
def test_as_step_by_step(chosen: list[int], rates: list[float] | None) -> None:
    """Greedy and drawn by temperature inside of the graph, the rest behind it: the same tokens."""
    expected, _ = life(chosen, False, rates)
    found, keys = life(chosen, True, rates)
    assert found == expected
    assert keys >= 2
    if rates is not None:
        accepted = sum(sum(step[2]) for step in found[:-1])
        drafts = sum(sum(step[1]) for step in found[:-1])
        assert 0 < accepted < drafts
