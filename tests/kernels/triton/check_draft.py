"""The draft passes' kernels against `TorchDraftPasses`, pass by pass, from random slots."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.triton import interpreter

interpreter.enable()

from octavo.core.messages import DraftEntry, DraftGroup, DraftRows  # noqa: E402
from octavo.speculation.draft_passes import TorchDraftPasses  # noqa: E402
from octavo.worker.gpu_draft_passes import GpuDraftPasses  # noqa: E402
from octavo.worker.graph_sizes import GraphSizes  # noqa: E402
from octavo.worker.input_batch import DeviceState  # noqa: E402

SLOTS, LENGTH, BLOCK_SIZE = 7, 60, 16
TABLES = ("tokens", "num_tokens", "num_drafts")


@dataclass
class Side:
    """One implementation, with slot tables of its own."""

    state: DeviceState
    passes: Any


def sides(rng: random.Random, sizes: GraphSizes | None) -> tuple[Side, Side]:
    made = []
    for gpu in (False, True):
        state = DeviceState(SLOTS, LENGTH, BLOCK_SIZE, torch.device("cpu"))
        passes = GpuDraftPasses(state, sizes, 64) if gpu else TorchDraftPasses(state, BLOCK_SIZE)
        made.append(Side(state, passes))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    tokens = torch.randint(0, 900, made[0].state.tokens.shape, generator=generator, dtype=torch.int32)
    for slot in range(SLOTS):
        known = rng.randint(2, LENGTH - 10)
        for side in made:
            side.state.tokens.copy_(tokens)
            side.state.num_tokens[slot] = known
            side.state.num_drafts[slot] = slot == 3  # a lookup was there first
            side.state.finished[slot] = slot == 5
            side.state.limit[slot] = known + (2 if slot == 1 else 9)
    return made[0], made[1]


def group(rng: random.Random, state: DeviceState, rows: list[DraftRows]) -> DraftGroup:
    known = state.num_tokens.tolist()
    blocks = -(-(LENGTH + 20) // BLOCK_SIZE)
    entered = [
        DraftEntry(slot, max(0, known[slot] - rng.randint(1, 4)), [slot * blocks + i for i in range(blocks)])
        for slot in range(SLOTS)
    ]
    return DraftGroup(entered=entered, rows=rows)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_as_plain_torch(seed: int, graphs: bool) -> None:
    rng = random.Random(seed)
    theirs, ours = sides(rng, GraphSizes.of([4, 8, 32]) if graphs else None)
    order = rng.sample(range(SLOTS), SLOTS)
    rows = [DraftRows(slot, rng.randint(0, 2), rng.choice([0, 1, 3, 4])) for slot in order]
    rows = [row for row in rows if row[1] or row[2]]
    change = group(rng, theirs.state, rows)
    drafts = 0
    for _ in range(2):  # the second round begins where the first one's drafts were all refused
        for side in (theirs, ours):
            side.passes.change(change)
            side.passes.settle(np.array(order[:5], dtype=np.int64))
        wanted, found = theirs.passes.first(rows), ours.passes.first(rows)
        while wanted is not None and found is not None:
            if len(wanted.logits_slots) and sorted(wanted.logits_slots) == sorted(found.logits_slots):
                place = {int(slot): row for row, slot in enumerate(found.logits_slots)}
                same = torch.tensor([place[int(slot)] for slot in wanted.logits_slots])
            else:
                same = torch.empty(0, dtype=torch.int64)
            compare(wanted, found, same)
            drawn = torch.tensor([rng.randint(-1, 899) for _ in wanted.logits_slots], dtype=torch.int64)
            mine = torch.empty_like(drawn)
            mine[same] = drawn
            drafts += int((drawn >= 0).sum())
            theirs.passes.draft(wanted, drawn if len(drawn) else None)
            ours.passes.draft(found, mine if len(drawn) else None)
            for name in TABLES:
                assert torch.equal(getattr(theirs.state, name), getattr(ours.state, name)), name
            assert torch.equal(theirs.passes.from_model, ours.passes.from_model)
            wanted, found = theirs.passes.next(), ours.passes.next()
        assert wanted is None
        assert found is None
        for side in (theirs, ours):
            side.state.num_tokens += 1
            side.state.num_drafts.zero_()
        change = DraftGroup()
    assert drafts > 8


def compare(wanted: Any, found: Any, same: torch.Tensor) -> None:
    """Each slot's rows, in whatever order a later pass has its slots."""
    assert torch.equal(wanted.draw_positions, found.draw_positions[same])
    for place, (theirs, ours) in enumerate(
        zip(wanted.logits_rows.tolist(), found.logits_rows[same].tolist(), strict=True)
    ):
        if wanted.draw_positions[place] < 0:
            continue
        assert wanted.input_ids[theirs] == found.input_ids[ours]
        for name in ("positions", "slot_mapping"):
            assert getattr(wanted.metadata, name)[theirs] == getattr(found.metadata, name)[ours], name
    assert sorted(wanted.metadata.positions.tolist()) == sorted(found.metadata.positions.tolist())
    assert sorted(wanted.metadata.slot_mapping.tolist()) == sorted(found.metadata.slot_mapping.tolist())
    assert sorted(wanted.metadata.seq_lens.tolist()) == sorted(found.metadata.seq_lens.tolist())
