"""Random steps, and the comparison of two `StepMath`s on them: for the interpreter and for the card."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from octavo.core.messages import NewSlot, RowKind, Rows, SchedulerOutput, SlotBlocks, SlotKey
from octavo.sampling_params import SamplingParams
from octavo.worker.input_batch import DeviceState
from octavo.worker.step_math import StepInputs, StepMath, TorchStep, Verdict

SLOTS, MAX_LEN, BLOCK_SIZE = 6, 700, 16
TABLES = (
    "tokens", "num_tokens", "num_computed", "num_drafts", "limit", "finished", "stop_ids", "block_table",
)  # fmt: skip


@dataclass
class Life:
    """Random steps, as a scheduler might ask for them."""

    seed: int
    rng: random.Random = field(init=False)
    known: dict[int, tuple[int, int]] = field(default_factory=dict)  # slot -> tokens, computed of the prompt
    step_id: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def next(self) -> SchedulerOutput:
        """Some requests leave, some enter, some get blocks, all others rows."""
        rng = self.rng
        out = SchedulerOutput(self.step_id)
        self.step_id += 1
        for slot in list(self.known):
            if rng.random() < 0.15:
                del self.known[slot]
                out.freed_slots.append(slot)
        for slot in range(SLOTS):
            if slot in self.known or rng.random() < 0.4:
                continue
            count = rng.randint(1, 500)
            computed = rng.randint(0, count - 1)
            self.known[slot] = count, computed
            stops = tuple(rng.randrange(9) for _ in range(rng.choice([0, 1, 3, 11])))
            out.new_slots.append(
                NewSlot(
                    slot, 1, str(slot), [rng.randrange(9) for _ in range(count)], count,
                    rng.sample(range(1, 999), -(-count // BLOCK_SIZE)), computed, SamplingParams(), 0, stops,
                    count + rng.randint(1, 40),
                )
            )  # fmt: skip
        if not self.known:
            return self.next()
        for slot, (count, computed) in self.known.items():
            if computed < count:
                rows = rng.choice([count - computed, rng.randint(1, count - computed)])
                self.known[slot] = count, computed + rows
                out.rows.append(Rows(slot, rows, RowKind.CHUNK, computed + rows == count))
            else:
                out.rows.append(Rows(slot, rng.randint(1, 7), RowKind.VERIFY, True))
                if rng.random() < 0.3:
                    out.new_blocks.append(SlotBlocks(slot, [rng.randrange(999)]))
        rng.shuffle(out.rows)
        out.row_keys = [SlotKey(rows.slot, 1, str(rows.slot)) for rows in out.rows]
        return out


def draft(state: DeviceState, rng: random.Random, slots: list[int]) -> None:
    """Some drafts behind the known tokens."""
    for slot in slots:
        known = int(state.num_tokens[slot])
        count = 0 if state.finished[slot] else rng.randint(0, 6)
        state.tokens[slot, known : known + count] = torch.tensor(
            [rng.randrange(9) for _ in range(count)], dtype=torch.int32
        )
        state.num_drafts[slot] = count


def assert_same_inputs(ours: StepInputs, theirs: StepInputs, state: DeviceState) -> None:
    assert ours.metadata is not None
    assert theirs.metadata is not None
    rows = theirs.metadata.num_tokens  # ours may have more, which are padding
    assert torch.equal(ours.input_ids[:rows], theirs.input_ids)
    assert (ours.positions[rows:] == -1).all()
    assert (ours.metadata.slot_mapping[rows:] == -1).all()
    for name in ("num_valid", "logits_rows", "draw_positions"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.logits_slots.tolist() == theirs.logits_slots.tolist()
    mine, meta = ours.metadata, theirs.metadata
    for name in ("query_start_loc", "seq_lens"):
        assert torch.equal(getattr(mine, name), getattr(meta, name)), name
    for name in ("slot_mapping", "positions"):
        assert torch.equal(getattr(mine, name)[:rows], getattr(meta, name)), name
    assert mine.num_tokens == len(mine.positions) == len(ours.input_ids)
    for name in ("num_reqs", "max_query_len", "max_seq_len"):
        assert getattr(mine, name) == getattr(meta, name), name
    assert mine.table_rows is not None
    width = meta.block_table.shape[1]
    expected = meta.block_table if meta.table_rows is None else meta.block_table[meta.table_rows.long()]
    assert torch.equal(state.block_table[mine.table_rows.long(), :width], expected)


def compare(make: Callable[[DeviceState], StepMath], device: torch.device, seed: int, steps: int) -> int:
    """Run both through random steps; every tensor must be the same. Returns the number of tokens emitted."""
    emitted = 0
    states = [DeviceState(SLOTS, MAX_LEN, BLOCK_SIZE, device) for _ in range(2)]
    both: list[StepMath] = [make(states[0]), TorchStep(states[1])]
    life, rng = Life(seed), random.Random(seed)
    for _ in range(steps):
        out = life.next()
        inputs: list[StepInputs] = []
        for math in both:
            math.change_slots(out)
            inputs.append(math.prepare(out))
        assert_same_inputs(inputs[0], inputs[1], states[1])
        tokens, rows = inputs[0].input_ids.tolist(), inputs[0].logits_rows.tolist()
        drawn = [rng.randrange(-1, 9) for _ in rows]
        for index, row in enumerate(rows[:-1]):  # let many drafts be right
            if rng.random() < 0.7 and row + 1 < len(tokens):
                drawn[index] = tokens[row + 1]
        sent = torch.tensor(drawn, dtype=torch.int64, device=device) if drawn else None
        verdicts: list[Verdict | None] = [
            math.finish(out, mine, sent) for math, mine in zip(both, inputs, strict=True)
        ]
        assert (verdicts[0] is None) == (verdicts[1] is None)
        if verdicts[0] is not None and verdicts[1] is not None:
            assert torch.equal(verdicts[0].tokens, verdicts[1].tokens)
            assert torch.equal(verdicts[0].numbers, verdicts[1].numbers)
            emitted += int(verdicts[0].numbers[0].sum())
        for name in TABLES:
            assert torch.equal(getattr(states[0], name), getattr(states[1], name)), name
        assert states[0].num_blocks == states[1].num_blocks
        ready = [slot for slot, (count, computed) in life.known.items() if computed == count]
        for state in states:
            draft(state, random.Random(life.step_id), ready)
    return emitted
