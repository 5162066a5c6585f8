"""Draft passes that are one graph against the same passes launch by launch, through `DraftModel`."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.core.messages import DraftEntry, DraftGroup, DraftRows, Propose, RowKind, Rows, SchedulerOutput  # noqa: E402
from octavo.kernels.triton.step import SlotDraws  # noqa: E402
from octavo.sampling.batch import SamplingSlots, compile_params  # noqa: E402
from octavo.sampling.gpu_draw import GpuDraw  # noqa: E402
from octavo.sampling.sampler import Sampler  # noqa: E402
from octavo.sampling_params import SamplingParams  # noqa: E402
from octavo.speculation.draft_model import DraftModel  # noqa: E402
from octavo.worker.gpu_draft_passes import GpuDraftPasses  # noqa: E402
from octavo.worker.graph_sizes import GraphKey, GraphSizes  # noqa: E402
from octavo.worker.input_batch import DeviceState  # noqa: E402
from octavo.worker.whole_pass import WholePasses  # noqa: E402

CPU = torch.device("cpu")
SLOTS, LENGTH, BLOCK_SIZE, VOCAB = 6, 60, 16, 50
SIZES = GraphSizes.of([1, 2, 4, 8, 16, 32])


class Network:
    """Logits that depend on a row's input and position alone."""

    device = CPU
    config = SimpleNamespace(vocab_size=VOCAB)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: Any) -> torch.Tensor:
        hidden = torch.stack((input_ids, positions), dim=1)
        return hidden if ctx is None or ctx.wanted is None else hidden[ctx.wanted]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return ((hidden[:, :1] * 37 + hidden[:, 1:] * 11 + torch.arange(VOCAB) * 29) % 83).float() / 20


class Graphs:
    """What a graph holds, run launch by launch."""

    sizes = SIZES

    def __init__(self, passes: GpuDraftPasses, whole: WholePasses) -> None:
        self._passes, self._whole = passes, whole
        self.runs = 0
        self.long_runs = 0  # of one row
        self.captured = True

    def one_row(self, context: int) -> GraphKey:
        """Each slot has five blocks, and nobody else has more."""
        assert context in (1, 5 * BLOCK_SIZE)
        return GraphKey(1, False, is_long=context > 1)

    def has(self, key: GraphKey) -> bool:
        return self.captured

    def run(self, key: GraphKey) -> tuple[torch.Tensor, torch.Tensor]:
        self.runs += 1
        self.long_runs += key.is_long
        self._whole.before(key)
        buffers = self._passes.buffers
        hidden = Network().forward(buffers.input_ids[: key.rows], buffers.positions[: key.rows], None)
        return hidden, self._whole.behind(key, hidden)


def drafted(
    seed: int, params: list[SamplingParams], whole: bool, catch_up: int = 2, captured: bool = True
) -> tuple[list[Any], list[int]]:
    """Some steps' drafts, and how many passes of each were graphs. At first a slot is `catch_up` behind."""
    rng = random.Random(seed)
    state = DeviceState(SLOTS, LENGTH, BLOCK_SIZE, CPU)
    state.tokens.copy_(
        torch.randint(0, VOCAB, state.tokens.shape, generator=torch.Generator().manual_seed(seed))
    )
    sampling, draws = SamplingSlots(SLOTS), SlotDraws.allocate(SLOTS, CPU)
    blocks = -(-(LENGTH + 20) // BLOCK_SIZE)
    entered = []
    for slot in range(SLOTS):
        known = rng.randint(max(3, catch_up + 1), LENGTH - 12)
        state.num_tokens[slot], state.limit[slot] = known, known + (3 if slot == 1 else 9)
        state.finished[slot] = slot == 5
        param = params[slot % len(params)]
        compiled = compile_params(param, seed=slot * 7919, num_prompt_tokens=2, vocab_size=VOCAB)
        sampling.put(slot, compiled)
        draws.temperature[slot], draws.seed[slot] = compiled.temperature, compiled.seed
        computed = known - (catch_up + 1 if slot == 2 else rng.randint(1, 3))
        entered.append(DraftEntry(slot, computed, [slot * blocks + i for i in range(blocks)]))
    passes = GpuDraftPasses(state, SIZES, 64)
    graphs = None
    if whole:
        tail = WholePasses(passes.tables, draws, passes.buffers, Network(), 32)  # type: ignore[arg-type]
        tail.graphs = graphs = Graphs(passes, tail)  # type: ignore[assignment]
        graphs.captured = captured
        passes.use_graphs(tail, sampling, False)
    model = DraftModel(
        Network(), [], passes, state, Sampler(GpuDraw()), sampling, vocab_size=VOCAB, target_vocab_size=VOCAB
    )
    found: list[Any] = []
    runs: list[int] = []
    for step in range(3):
        order = rng.sample(range(SLOTS), SLOTS)
        rows = [DraftRows(slot, rng.randint(0, 2), rng.choice([0, 1, 3, 4])) for slot in order]
        if step == 0:
            rows = [DraftRows(2, catch_up, 3) if row.slot == 2 else row for row in rows]
        rows = [row for row in rows if row.catch_up or row.num_drafts]
        out = SchedulerOutput(
            step,
            rows=[Rows(slot, 1, RowKind.VERIFY, True) for slot in order],
            propose=[Propose(row[0], row[2]) for row in rows if row[2]],
            draft=DraftGroup(entered=entered if step == 0 else [], rows=rows),
        )
        model.change(out.draft)  # type: ignore[arg-type]
        made, before = model.start(out), 0 if graphs is None else sum(runs)
        model.go_on()
        runs.append(0 if graphs is None else graphs.runs - before)
        found.append(
            (list(made), state.tokens.tolist(), state.num_drafts.tolist(), model.from_model.tolist())
        )
        taken = torch.minimum(state.num_drafts, torch.tensor([rng.randint(0, 4) for _ in range(SLOTS)]))
        state.num_tokens += taken + 1
        state.num_tokens.clamp_(max=LENGTH - 6)
        state.limit.copy_(torch.maximum(state.limit, state.num_tokens + 5))
        state.num_drafts.zero_()
    return found, runs


PLAIN = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.8)]
FILTERED = [*PLAIN, SamplingParams(temperature=1.0, top_k=4)]


@pytest.mark.parametrize("params", [PLAIN, FILTERED])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_drafts(seed: int, params: list[SamplingParams]) -> None:
    expected, none = drafted(seed, params, False)
    found, runs = drafted(seed, params, True)
    assert found == expected
    assert sum(none) == 0
    assert sum(runs) > 6
    assert sum(sum(step[2]) for step in found) > 10


@pytest.mark.parametrize("catch_up", [2, 30])
def test_before_graphs_are_captured_there_are_none(catch_up: int) -> None:
    """As in the start's rehearsal, which compiles what they will hold."""
    expected, _ = drafted(2, PLAIN, False, catch_up)
    found, runs = drafted(2, PLAIN, True, catch_up, captured=False)
    assert found == expected
    assert sum(runs) == 0


@pytest.mark.parametrize("params", [PLAIN, FILTERED])
def test_passes_behind_a_long_catch_up_are_graphs(params: list[SamplingParams]) -> None:
    expected, _ = drafted(1, params, False, catch_up=30)
    found, runs = drafted(1, params, True, catch_up=30)
    assert found == expected
    passes, _, drafts, _ = found[0]
    assert passes[0] > 30
    assert len(passes) > 2
    assert runs[0] == len(passes) - 1
    assert drafts[2] == 3, "the slot that caught up drafts"
