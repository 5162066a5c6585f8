"""A device in plain Python: slots, counters, a paged cache, one step late.

It checks what a real device cannot: every row verifies that the cache holds exactly the KV of the
tokens before it, so a block that is shared wrongly, reused too early or never filled is caught at
the first read. The "model" draws the next token as a pure function of (seed, tokens so far), so
the output of a request is known in advance: `gold_output`.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import dataclass, field

from octavo.core.messages import (
    Finish,
    ModelOutput,
    NewSlot,
    RowKind,
    Rows,
    SchedulerOutput,
)

VOCAB = 50


def next_token(seed: int, tokens: list[int]) -> int:
    """The token the model draws after `tokens`."""
    return zlib.crc32(repr((seed, tokens)).encode()) % VOCAB


def gold_output(prompt: list[int], seed: int, limit: int, stop: tuple[int, ...]) -> list[int]:
    """What a request must produce, however it is scheduled."""
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(seed, tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


@dataclass
class _Slot:
    new: NewSlot
    tokens: list[int]
    blocks: list[int]
    num_computed: int
    drafts: list[int] = field(default_factory=list)
    finished: bool = False


class FakeDevice:
    """`launch` takes a step, `collect` returns the oldest one's output.

    With depth 0 the engine collects right after launching; with depth 1 it launches the next step
    first. The device computes at launch: what is late is the host's knowledge.
    """

    def __init__(self, num_blocks: int, block_size: int, seed: int = 0, draft_accuracy: float = 0.6) -> None:
        self.block_size = block_size
        # cache[block][offset] is the whole text up to that position, as the real KV depends on it.
        self.cache: list[list[tuple[int, ...] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.slots: dict[int, _Slot] = {}
        self.outputs: deque[ModelOutput] = deque()
        self.rng = random.Random(seed)
        self.draft_accuracy = draft_accuracy
        self.max_rows = 0

    def launch(self, out: SchedulerOutput) -> None:
        for slot in out.freed_slots:
            self.slots.pop(slot, None)
        for new in out.new_slots:
            assert new.slot not in self.slots, f"slot {new.slot} is taken"
            self.slots[new.slot] = _Slot(
                new, list(new.token_ids), list(new.block_ids), new.num_computed_tokens
            )
        for slot, ids in out.new_blocks:
            self.slots[slot].blocks += ids
        assert len({rows.slot for rows in out.rows}) == len(out.rows), "a slot has rows twice"
        self.max_rows = max(self.max_rows, out.num_tokens)

        work = [self._inputs(rows, key) for rows, key in zip(out.rows, out.row_keys, strict=True)]
        for state, texts, _ in work:  # every row stores before any row reads
            for text in texts:
                self._store(state, text)
        for state, texts, _ in work:
            for text in texts:
                self._check(state, text)
        results = [self._sample(rows, *item) for rows, item in zip(out.rows, work, strict=True)]
        propose = dict(out.propose)
        drafts: dict[int, list[int]] = {}
        for rows in out.rows:
            state = self.slots[rows.slot]
            state.drafts = []
            if rows.slot in propose and not state.finished:
                state.drafts = drafts[rows.slot] = self._draft(state, propose[rows.slot])
        self.outputs.append(
            ModelOutput(
                step_id=out.step_id,
                keys=list(out.row_keys),
                tokens=[r[0] for r in results],
                num_drafts_valid=[r[1] for r in results],
                num_accepted=[r[2] for r in results],
                finished=[r[3] for r in results],
                logprobs=[None] * len(results),
                prompt_logprobs=[None] * len(results),
                drafts=drafts,
            )
        )

    def collect(self) -> ModelOutput:
        return self.outputs.popleft()

    # ------------------------------------------------------------------ one step

    def _inputs(self, rows: Rows, key: tuple[int, int, str]) -> tuple[_Slot, list[list[int]], int]:
        slot = self.slots[rows.slot]
        assert key == (rows.slot, slot.new.generation, slot.new.request_id), "rows of another request"
        if slot.finished:
            return slot, [], 0
        start = slot.num_computed
        if rows.kind is RowKind.CHUNK:
            end = start + rows.num_rows
            assert end <= len(slot.tokens), "a chunk beyond the known tokens"
            assert rows.samples == (end == len(slot.tokens)), "samples is wrong"
            return slot, [slot.tokens[: i + 1] for i in range(start, end)], 0
        assert rows.samples
        assert start == len(slot.tokens) - 1, "a verify whose last token is not the next to compute"
        # Drafts past the limit would be KV nobody may hold.
        room = slot.new.limit - len(slot.tokens) - 1
        used = slot.drafts[: max(0, min(rows.num_rows - 1, room))]
        text = slot.tokens + used
        return slot, [text[: i + 1] for i in range(start, len(text))], len(used)

    def _store(self, slot: _Slot, text: list[int]) -> None:
        block, offset = divmod(len(text) - 1, self.block_size)
        assert block < len(slot.blocks), "no block for this position"
        self.cache[slot.blocks[block]][offset] = tuple(text)

    def _check(self, slot: _Slot, text: list[int]) -> None:
        for position in range(len(text)):
            block, offset = divmod(position, self.block_size)
            held = self.cache[slot.blocks[block]][offset]
            assert held == tuple(text[: position + 1]), f"position {position} holds the KV of another text"

    def _sample(
        self, rows: Rows, slot: _Slot, texts: list[list[int]], num_drafts: int
    ) -> tuple[list[int], int, int, Finish]:
        if not texts:
            return [], 0, 0, Finish.NO
        if not rows.samples:
            slot.num_computed += len(texts)
            return [], 0, 0, Finish.NO
        new = slot.new
        rows_out = texts if rows.kind is RowKind.VERIFY else texts[-1:]
        emitted: list[int] = []
        finish = Finish.NO
        accepted = 0
        for index, text in enumerate(rows_out):
            if index > 0:
                if text[-1] != emitted[-1]:
                    break
                accepted += 1
            emitted.append(next_token(new.seed, text))
            if emitted[-1] in new.stop_token_ids:
                finish = Finish.STOP
            elif len(text) + 1 >= new.limit:
                finish = Finish.LENGTH
            if finish is not Finish.NO:
                break
        slot.num_computed += len(emitted) if rows.kind is RowKind.VERIFY else len(texts)
        slot.tokens += emitted
        slot.finished = finish is not Finish.NO
        return emitted, num_drafts, accepted, finish

    def _draft(self, slot: _Slot, count: int) -> list[int]:
        """Up to `count` drafts, each right with draft_accuracy; sometimes fewer than asked for."""
        text = list(slot.tokens)
        for _ in range(self.rng.randint(0, count) if self.rng.random() < 0.2 else count):
            right = self.rng.random() < self.draft_accuracy
            text.append(next_token(slot.new.seed, text) if right else self.rng.randrange(VOCAB))
        return text[len(slot.tokens) :]
