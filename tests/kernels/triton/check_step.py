"""A step's kernels against `TorchStep`, bit for bit, and under the scheduler's random operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.core.messages import NewSlot, RowKind, Rows, SchedulerOutput  # noqa: E402
from octavo.sampling_params import SamplingParams  # noqa: E402
from octavo.worker.cuda_graph import StepBuffers  # noqa: E402
from octavo.worker.gpu_step import GpuStep, RowTable  # noqa: E402
from octavo.worker.graph_sizes import GraphKey, GraphSizes  # noqa: E402
from octavo.worker.input_batch import DeviceState  # noqa: E402
from tests.kernels.random_life import BLOCK_SIZE, MAX_LEN, SLOTS, compare  # noqa: E402
from tests.worker.test_random_steps import RunnerSimulation  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("graphs", [False, True])
def test_as_plain_torch(graphs: bool) -> None:
    def make(state: DeviceState) -> GpuStep:
        if not graphs:
            return GpuStep(state)
        buffers = StepBuffers.allocate(4000, SLOTS, state.block_table)
        return GpuStep(state, buffers, GraphSizes.of([8, 64, 512]))

    assert compare(make, CPU, 1, 12) + compare(make, CPU, 2, 12) > 30


def test_the_step_is_padded_to_its_graph() -> None:
    state = DeviceState(SLOTS, MAX_LEN, BLOCK_SIZE, CPU)
    buffers = StepBuffers.allocate(600, SLOTS, state.block_table)
    for column in (buffers.positions, buffers.slot_mapping, buffers.query_start_loc, buffers.seq_lens):
        column.fill_(77)
    steps = GpuStep(state, buffers, GraphSizes.of([8, 512]))
    new = NewSlot(2, 1, "2", [5, 6, 7], 3, [9], 0, SamplingParams(), 0, (), 20)
    out = SchedulerOutput(0, new_slots=[new], rows=[Rows(2, 3, RowKind.CHUNK, True)])
    steps.change_slots(out)
    inputs = steps.prepare(out)
    assert inputs.metadata is not None
    assert buffers.holds(inputs.metadata)
    assert inputs.input_ids.tolist() == [5, 6, 7]
    assert buffers.positions[:9].tolist() == [0, 1, 2, -1, -1, -1, -1, -1, 77]
    assert buffers.slot_mapping[:9].tolist() == [144, 145, 146, -1, -1, -1, -1, -1, 77]
    assert buffers.query_start_loc.tolist() == [0, 3, 3, 3, 3, 3, 3]
    assert buffers.seq_lens.tolist() == [3, 0, 0, 0, 0, 0]
    assert inputs.logits_rows.tolist() == [2]
    assert inputs.draw_positions.tolist() == [3]


def test_whoever_asks_again_for_a_steps_graph_gets_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for shared prefixes takes the host some time: once a step."""
    steps = GpuStep(DeviceState(SLOTS, MAX_LEN, BLOCK_SIZE, CPU), sizes=GraphSizes.of([8, 32]))
    looked: list[int] = []
    find = steps._find_graph

    def look(rows: RowTable) -> GraphKey | None:
        looked.append(rows.num_tokens)
        return find(rows)

    monkeypatch.setattr(steps, "_find_graph", look)
    for count in (3, 9, 3):
        rows = steps.describe(SchedulerOutput(0, rows=[Rows(2, count, RowKind.VERIFY, True)]))
        answers = [steps.graph_of(rows) for _ in range(3)]
        assert answers == [GraphKey(8 if count == 3 else 32, False)] * 3
    assert looked == [3, 9, 3]


@pytest.mark.parametrize("depth", [0, 1])
def test_under_the_scheduler(depth: int) -> None:
    def gpu(state: DeviceState) -> Any:
        return GpuStep(state)

    simulation = RunnerSimulation(5, depth, gpu)
    for _ in range(45):
        simulation.step()
    simulation.drain()
    assert sum(simulation.ended.values()) > 3
