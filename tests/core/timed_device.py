"""A scheduler with a draft model on a device that does nothing but take its time, as one that was measured.

What `draft_simulation` leaves out is here: prompts in chunks, a pipeline one step deep, and a draft model
whose KV cache has to catch up. Tokens are accepted by chance, and mean nothing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.draft_budget import DraftBudget
from octavo.core.draft_kv import DraftKV
from octavo.core.draft_planner import BudgetPlanner
from octavo.core.messages import DraftPasses, Finish, ModelOutput, NewSlot, RowKind, Rows, SchedulerOutput
from octavo.core.request import Request
from octavo.core.scheduler import Scheduler
from octavo.sampling_params import SamplingParams
from tests.core.draft_simulation import Machine

STEP_ROWS, MAX_LEN, MAX_SEQS, BLOCK_SIZE = 8192, 4200, 256, 16
NUM_BLOCKS, NUM_DRAFT_BLOCKS = 40_310, 5_182


class _Slot:
    def __init__(self, new: NewSlot) -> None:
        self.known, self.limit = len(new.token_ids), new.limit
        self.drafts = 0
        self.coins = random.Random(new.seed)

    def verify(self, num_rows: int, rates: Sequence[float]) -> tuple[int, int]:
        """(drafts verified, accepted); `rates` are conditional, the last one holds for all that follow."""
        if self.known >= self.limit:
            return 0, -1  # it has ended, and emits nothing
        verified = min(self.drafts, num_rows - 1, self.limit - self.known - 1)
        accepted = 0
        while accepted < verified and self.coins.random() < rates[min(accepted, len(rates) - 1)]:
            accepted += 1
        return verified, accepted


@dataclass
class TimedStep:
    """What a step was, and what it took."""

    requests: int
    rows: int
    chunk_rows: int
    target_seconds: float
    passes: list[int]  # rows of each draft pass
    draft_seconds: float

    @property
    def seconds(self) -> float:
        return self.target_seconds + self.draft_seconds


@dataclass
class TimedDevice:
    machine: Machine
    rates: Sequence[float]
    noise: random.Random
    slots: dict[int, _Slot] = field(default_factory=dict)
    outputs: deque[ModelOutput] = field(default_factory=deque)
    steps: list[TimedStep] = field(default_factory=list)

    def launch(self, out: SchedulerOutput) -> None:
        for slot in out.freed_slots:
            self.slots.pop(slot, None)
        for new in out.new_slots:
            self.slots[new.slot] = _Slot(new)
        kv_tokens = sum(self.slots[rows.slot].known for rows in out.rows)
        results = [self._sample(rows) for rows in out.rows]
        step = TimedStep(
            len(out.rows),
            out.num_tokens,
            sum(rows.num_rows for rows in out.rows if rows.kind is RowKind.CHUNK),
            self.machine.target(out.num_tokens) + self.machine.kv_token * kv_tokens,
            [],
            0.0,
        )
        made, passes = self._draft(out, step)
        self.steps.append(step)
        nothing = [None] * len(results)
        self.outputs.append(
            ModelOutput(
                step_id=out.step_id,
                keys=list(out.row_keys),
                tokens=[[1] * (accepted + 1) for _, accepted, _ in results],
                num_drafts_valid=[verified for verified, _, _ in results],
                num_accepted=[max(0, accepted) for _, accepted, _ in results],
                finished=[finish for _, _, finish in results],
                logprobs=list(nothing),
                prompt_logprobs=list(nothing),
                num_drafted={slot: made.get(slot, 0) for slot, _ in out.propose} if out.propose else None,
                drafted_by_model=frozenset(made),
                target_seconds=self.machine.seen(step.target_seconds, self.noise),
                draft_seconds=self.machine.seen(step.draft_seconds, self.noise),
                draft_passes=passes,
            )
        )

    def _sample(self, rows: Rows) -> tuple[int, int, Finish]:
        """(drafts verified, accepted; -1: no token at all, finish)"""
        slot = self.slots[rows.slot]
        verified, accepted = 0, 0
        if rows.kind is RowKind.VERIFY:
            verified, accepted = slot.verify(rows.num_rows, self.rates)
        elif not rows.samples:
            accepted = -1
        slot.drafts = 0
        slot.known += accepted + 1
        ended = accepted >= 0 and slot.known >= slot.limit
        return verified, accepted, Finish.LENGTH if ended else Finish.NO

    def _draft(self, out: SchedulerOutput, step: TimedStep) -> tuple[dict[int, int], DraftPasses | None]:
        if out.draft is None or not out.draft.rows:
            return {}, None
        machine, made = self.machine, {}
        rows = out.draft.rows
        step.passes.append(sum(row.catch_up + 2 * (row.num_drafts > 0) for row in rows))
        for depth in range(1, max(row.num_drafts for row in rows)):
            step.passes.append(sum(row.num_drafts > depth for row in rows))
        kv_seconds = machine.draft_kv_token * sum(self.slots[row.slot].known for row in rows)
        seconds = [machine.draft_pass(count) + kv_seconds for count in step.passes]
        step.draft_seconds = sum(seconds)
        for row in rows:
            slot = self.slots[row.slot]
            if row.num_drafts and slot.known < slot.limit:
                slot.drafts = made[row.slot] = max(1, min(row.num_drafts, slot.limit - slot.known))
        return made, DraftPasses(list(step.passes), machine.seen(seconds[0], self.noise))


class TimedEngine:
    """The scheduler, its draft budget or a fixed number of drafts, and the device."""

    def __init__(
        self,
        machine: Machine,
        rates: Sequence[float],
        seed: int = 0,
        fixed: int | None = None,
        error: float = 0.0,
    ) -> None:
        """`error`: of what was measured at the start."""
        self.budget = DraftBudget(
            *machine.models(True, error, seed), max_num_batched_tokens=STEP_ROWS, catch_up_rows=STEP_ROWS
        )
        self.scheduler = Scheduler(
            SchedulerConfig(MAX_SEQS, STEP_ROWS, MAX_LEN, STEP_ROWS, 1, least_chunk_rows=STEP_ROWS // 8),
            CacheConfig(BLOCK_SIZE, NUM_BLOCKS, False),
            BudgetPlanner(self.budget, model="draft", fixed=fixed),
            DraftKV(NUM_DRAFT_BLOCKS, BLOCK_SIZE, MAX_LEN),
        )
        self.device = TimedDevice(machine, rates, random.Random(seed))
        self._arrived = 0

    def run(self, work: Sequence[tuple[int, int]], luck: int = 0) -> list[TimedStep]:
        """The steps of these requests, which arrive together: tokens of the prompt, and of the answer.

        With the same luck the same requests' drafts are right, as far as the same are made.
        """
        self.device.steps = []
        for index, (prompt, count) in enumerate(work):
            request = Request(
                f"r{self._arrived}", [1] * prompt, SamplingParams(temperature=0), seed=1000 * luck + index,
                limit=prompt + count, arrival=self._arrived, cache_namespace=None,
            )  # fmt: skip
            self.scheduler.add(request)
            self._arrived += 1
        while (out := self.scheduler.schedule()) is not None or self.device.outputs:
            if out is not None:
                self.device.launch(out)
            if out is None or self.scheduler.num_unread_steps > 1:
                self.scheduler.update(self.device.outputs.popleft())
        return self.device.steps
