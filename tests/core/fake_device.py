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
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.core.messages import (
    DraftGroup,
    DraftRows,
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
    draft_blocks: list[int] = field(default_factory=list)
    draft_computed: int = 0


class DraftModel:
    """The draft model's part: a cache of its own, which is checked as strictly as the target's.

    `match` is the chance that a lookup goes first and finds something; None: there is no lookup.
    """

    def __init__(self, num_blocks: int, block_size: int, max_len: int, match: float | None) -> None:
        self.block_size = block_size
        self.max_len = max_len
        self.match = match
        self.cache: list[list[tuple[int, ...] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.num_rounds = 0
        self.num_caught_up = 0

    def change(self, group: DraftGroup, slots: dict[int, _Slot]) -> None:
        for slot in group.left:
            assert slots[slot].draft_blocks, "left without having entered"
            slots[slot].draft_blocks = []
        for slot, num_computed, block_ids in group.entered:
            assert not slots[slot].draft_blocks, "entered twice"
            slots[slot].draft_blocks = list(block_ids)
            slots[slot].draft_computed = num_computed
        for slot, ids in group.new_blocks:
            slots[slot].draft_blocks += ids

    def run(
        self, rows: list[DraftRows], slots: dict[int, _Slot], matched: set[int], guess: Callable[[_Slot], int]
    ) -> dict[int, list[int]]:
        """Catch up, then draft; the drafts by slot."""
        work: list[tuple[_Slot, list[list[int]]]] = []
        drafting: dict[int, int] = {}
        for slot, catch_up, num_drafts in rows:
            state = slots[slot]
            known, computed = len(state.tokens), state.draft_computed
            assert computed < known
            end = min(computed + catch_up, known - 1)
            if num_drafts and not state.finished and slot not in matched:
                assert known - computed <= catch_up + 2, "drafts before the draft model has caught up"
                drafting[slot] = max(1, min(num_drafts, state.new.limit - known))
                assert known + drafting[slot] - 1 <= self.max_len, "beyond the draft model's context"
                end = known
            self.num_caught_up += end - computed
            work.append((state, [state.tokens[: i + 1] for i in range(computed, end)]))
            state.draft_computed = end
        self._pass(work)
        drafts: dict[int, list[int]] = {slot: [] for slot in drafting}
        for depth in range(max(drafting.values(), default=0)):
            self.num_rounds += depth == 0
            active = [slots[slot] for slot, count in drafting.items() if count > depth]
            if depth:
                texts = [s.tokens + drafts[s.new.slot] for s in active]
                self._pass([(s, [text]) for s, text in zip(active, texts, strict=True)])
                for state in active:
                    state.draft_computed += 1
            for state in active:
                text = state.tokens + drafts[state.new.slot]
                right = next_token(state.new.seed, text)
                token = guess(state)
                drafts[state.new.slot].append(right if token < 0 else token)
        return drafts

    def _pass(self, work: list[tuple[_Slot, list[list[int]]]]) -> None:
        for state, texts in work:
            for text in texts:
                block, offset = divmod(len(text) - 1, self.block_size)
                assert block < len(state.draft_blocks), "no draft block for this position"
                self.cache[state.draft_blocks[block]][offset] = tuple(text)
        for state, texts in work:
            for text in texts:
                for position in range(len(text)):
                    block, offset = divmod(position, self.block_size)
                    held = self.cache[state.draft_blocks[block]][offset]
                    assert held == tuple(text[: position + 1]), f"draft KV of another text at {position}"


class FakeDevice:
    """`launch` takes a step, `collect` returns the oldest one's output.

    With depth 0 the engine collects right after launching; with depth 1 it launches the next step
    first. The device computes at launch: what is late is the host's knowledge.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        seed: int = 0,
        draft_accuracy: float = 0.6,
        draft_model: DraftModel | None = None,
    ) -> None:
        self.block_size = block_size
        self.draft_model = draft_model
        # cache[block][offset] is the whole text up to that position, as the real KV depends on it.
        self.cache: list[list[tuple[int, ...] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.slots: dict[int, _Slot] = {}
        self.outputs: deque[ModelOutput] = deque()
        self.rng = random.Random(seed)
        self.draft_accuracy = draft_accuracy
        self.max_rows = 0
        self.tells = self.rng.random() < 0.5  # how many drafts were made

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
        if self.draft_model is not None and out.draft is not None:
            self.draft_model.change(out.draft, self.slots)
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
        for rows in out.rows:
            self.slots[rows.slot].drafts = []
        drafts, by_model = self._propose(out)
        for slot, made in drafts.items():
            self.slots[slot].drafts = made
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
                num_drafted={s: len(drafts.get(s, [])) for s, _ in out.propose} if self.tells else None,
                drafted_by_model=by_model,
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

    def _propose(self, out: SchedulerOutput) -> tuple[dict[int, list[int]], frozenset[int]]:
        """Drafts by slot, and the slots whose drafts the draft model made."""
        model, propose = self.draft_model, dict(out.propose)
        drafts: dict[int, list[int]] = {}
        alive = [slot for slot in propose if not self.slots[slot].finished]
        if model is None or model.match is not None:
            for slot in alive:
                if model is None or self.rng.random() < (model.match or 0.0):
                    drafts[slot] = self._draft(self.slots[slot], propose[slot])
        if model is None:
            return drafts, frozenset()
        for rows in out.rows:
            state = self.slots[rows.slot]
            state.draft_computed = min(state.draft_computed, len(state.tokens) - 1)
        if out.draft is None:
            return drafts, frozenset()
        found = {slot for slot, made in drafts.items() if made}
        made = model.run(out.draft.rows, self.slots, found, self._guess)
        for slot, tokens in made.items():
            assert len(tokens) <= propose[slot]
        return drafts | made, frozenset(made)

    def _guess(self, slot: _Slot) -> int:
        """-1: what the target would draw"""
        return -1 if self.rng.random() < self.draft_accuracy else self.rng.randrange(VOCAB)

    def _draft(self, slot: _Slot, count: int) -> list[int]:
        """Up to `count` drafts, each right with draft_accuracy; sometimes fewer than asked for."""
        text = list(slot.tokens)
        for _ in range(self.rng.randint(0, count) if self.rng.random() < 0.2 else count):
            right = self.rng.random() < self.draft_accuracy
            text.append(next_token(slot.new.seed, text) if right else self.rng.randrange(VOCAB))
        return text[len(slot.tokens) :]
