"""Where a draft model stands with every slot, and what its next pass computes.

The draft model shares the token table with the target: its drafts are written behind the known
tokens, and its next pass reads them there. Block tables and counters are its own:

    tokens[slot]   t0 t1 ... tn-1 | d0 d1 .. | whatever was there
                   num_tokens = n   num_drafts so far, both the target's
                   num_computed: tokens and drafts whose draft KV is in the cache

The first pass of a step computes what was to be caught up, and for a slot that drafts all that is left
to its last known token, which gives the first draft. Each pass after it computes the draft before.
`TorchDraftPasses` is for every device: nothing in it waits, rows without work are masked, and shapes
depend on what the host asked for alone. `CpuDraftPasses` (cpu_draft_passes.py) is its form for a CPU,
where the host can look, and computes no row in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.backend import AttentionMetadata
from octavo.core.messages import DraftGroup, DraftRows
from octavo.speculation.proposer import DraftTables as SlotTables

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class PassInputs:
    """One forward pass of the draft model. T token rows, L rows of logits, one a drafting slot."""

    input_ids: torch.Tensor  # [T] int64
    metadata: AttentionMetadata | None  # None with `computed`
    logits_rows: torch.Tensor  # [L] int64, token rows
    logits_slots: IntArray  # [L], on the host
    draw_positions: torch.Tensor  # [L] int64, -1: this slot makes no draft after all
    computed: bool = False  # the pass was launched as a whole; what is left is to draw from `logits`
    logits: torch.Tensor | None = None  # [L, vocabulary] float32; None: drafts were drawn and taken as well


class DraftPasses(Protocol):
    """The arithmetic around the passes of a step, in the order of the calls.

    `masks_rows`: a pass may hold rows of slots that make no draft in it, with position -1.
    """

    masks_rows: bool

    def change(self, group: DraftGroup) -> None:
        """Slots leave and enter, block tables grow: before anything else of a step."""
        ...

    def settle(self, slots: IntArray) -> None:
        """These slots have verified drafts or drawn a token: forget the KV of drafts that were refused."""
        ...

    def first(self, rows: Sequence[DraftRows]) -> PassInputs | None:
        """The first pass; None: nothing is to be computed. Slots that hold drafts already catch up only."""
        ...

    def draft(self, inputs: PassInputs, drawn: torch.Tensor | None) -> None:
        """A pass was computed: take its drafts, drawn [L] int64; -1 where none could be drawn."""
        ...

    def next(self) -> PassInputs | None:
        """The next pass, for slots that want more drafts; None: there are none."""
        ...

    def time(self, num_rows: int) -> bool:
        """Launch a pass of so many rows that belong to nobody; False: the network's own forward does."""
        ...

    @property
    def from_model(self) -> torch.Tensor:
        """[slots] bool: the drafts in the slot are the draft model's"""
        ...


class BlockTables:
    """The draft model's block table, one row a slot. Free rows hold stale values that nothing reads."""

    def __init__(self, num_slots: int, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.table = torch.zeros(num_slots, num_blocks, dtype=torch.int32, device=device)
        self.filled = [0] * num_slots  # the host's

    def change(self, group: DraftGroup) -> None:
        """See DraftPasses; counters are the caller's."""
        for slot in group.left:
            self.filled[slot] = 0
        for slot, _, block_ids in group.entered:
            self.filled[slot] = 0
            self._append(slot, block_ids)
        for slot, block_ids in group.new_blocks:
            self._append(slot, block_ids)

    def _append(self, slot: int, block_ids: list[int]) -> None:
        start = self.filled[slot]
        self.filled[slot] = end = start + len(block_ids)
        if self.table.device.type == "cpu":  # torch takes ten times as long to read a list
            self.table.numpy()[slot, start:end] = block_ids
        else:
            ids = torch.tensor(block_ids, dtype=torch.int32).pin_memory()
            self.table[slot, start:end] = ids.to(self.table.device, non_blocking=True)


class TorchDraftPasses:
    """In torch, on any device."""

    masks_rows = True

    def __init__(self, slots: SlotTables, block_size: int) -> None:
        self._slots = slots
        self._device = slots.tokens.device
        num_slots, width = slots.tokens.shape
        self._blocks = BlockTables(num_slots, -(-width // block_size), block_size, self._device)
        self._num_computed = torch.zeros(num_slots, dtype=torch.int64, device=self._device)
        self._from_model = torch.zeros(num_slots, dtype=torch.bool, device=self._device)
        self._wanted: list[tuple[int, int]] = []  # of this step: slots that draft, and how many
        self._depth = 0
        self._pass_slots = torch.empty(0, dtype=torch.int64, device=self._device)
        self._pass_valid = torch.empty(0, dtype=torch.int64, device=self._device)
        self._pass_drafts = torch.empty(0, dtype=torch.bool, device=self._device)
        self._drafting: IntArray = np.empty(0, dtype=np.int64)  # rows of the pass that draft

    @property
    def from_model(self) -> torch.Tensor:
        """See DraftPasses."""
        return self._from_model

    def change(self, group: DraftGroup) -> None:
        """See DraftPasses."""
        self._blocks.change(group)
        for slot, num_computed, _ in group.entered:
            self._num_computed[slot] = num_computed

    def settle(self, slots: IntArray) -> None:
        """See DraftPasses."""
        rows = self._to_device(slots)
        last = self._slots.num_tokens[rows] - 1
        self._num_computed[rows] = torch.minimum(self._num_computed[rows], last)
        self._from_model[rows] = False

    def first(self, rows: Sequence[DraftRows]) -> PassInputs | None:
        """See DraftPasses."""
        self._wanted = [(slot, count) for slot, _, count in rows if count]
        self._depth = 0
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        wants = table[:, 2] > 0
        widths = table[:, 1] + 2 * wants
        slots, catch_up = self._to_device(table[:, 0]), self._to_device(table[:, 1])
        tables = self._slots
        behind = tables.num_tokens[slots] - self._num_computed[slots]
        drafts = self._to_device(wants) & ~tables.finished[slots] & (tables.num_drafts[slots] == 0)
        drafts &= behind <= catch_up + 2
        known = torch.minimum(catch_up, behind - 1)
        valid = torch.where(drafts, behind, known)
        return self._inputs(table[:, 0], slots, valid, drafts, widths, wants)

    def next(self) -> PassInputs | None:
        """See DraftPasses."""
        self._depth += 1
        chosen = [slot for slot, count in self._wanted if count > self._depth]
        if not chosen:
            return None
        array = np.array(chosen, dtype=np.int64)
        slots, tables = self._to_device(array), self._slots
        # Those that made every draft so far and may hold one more.
        drafts = self._from_model[slots] & (tables.num_drafts[slots] == self._depth)
        drafts &= tables.num_tokens[slots] + self._depth < tables.limit[slots]
        ones = np.ones(len(array), dtype=np.int64)
        return self._inputs(array, slots, drafts.to(torch.int64), drafts, ones, ones > 0)

    def draft(self, inputs: PassInputs, drawn: torch.Tensor | None) -> None:
        """See DraftPasses."""
        self._num_computed[self._pass_slots] += self._pass_valid
        if drawn is None:
            return
        rows = self._to_device(self._drafting)
        slots, tables = self._pass_slots[rows], self._slots
        made = self._pass_drafts[rows] & (drawn >= 0)
        place = tables.num_tokens[slots] + torch.where(made, self._depth, 0)
        old = tables.tokens[slots, place]
        tables.tokens[slots, place] = torch.where(made, drawn.to(torch.int32), old)
        tables.num_drafts[slots] += made
        if self._depth == 0:
            self._from_model[slots] = made

    def time(self, num_rows: int) -> bool:
        """See DraftPasses."""
        return False

    def _inputs(
        self,
        host_slots: IntArray,  # [S]
        slots: torch.Tensor,  # [S], the same on the device
        valid: torch.Tensor,  # [S] rows that are not padding
        drafts: torch.Tensor,  # [S] bool
        widths: IntArray,  # [S] rows, padding included
        wants: npt.NDArray[np.bool_],  # [S] slots with a row of logits
    ) -> PassInputs:
        block_size = self._blocks.block_size
        self._pass_slots, self._pass_valid, self._pass_drafts = slots, valid, drafts
        self._drafting = np.flatnonzero(wants)
        starts = np.zeros(len(widths) + 1, dtype=np.int64)
        np.cumsum(widths, out=starts[1:])
        request = self._to_device(np.repeat(np.arange(len(widths)), widths))
        offset = self._to_device(np.arange(starts[-1]) - np.repeat(starts[:-1], widths))
        start = self._num_computed[slots]
        is_valid = offset < valid[request]
        slot = slots[request]
        position = (start[request] + offset).masked_fill_(~is_valid, 0)
        block = self._blocks.table[slot, position // block_size].to(torch.int64)
        mapping = block * block_size + position % block_size
        max_blocks = max(1, *self._blocks.filled)
        metadata = AttentionMetadata(
            query_start_loc=self._to_device(starts).to(torch.int32),
            seq_lens=(start + valid).to(torch.int32),
            block_table=self._blocks.table[slots, :max_blocks],
            slot_mapping=mapping.masked_fill_(~is_valid, -1),
            positions=position.masked_fill(~is_valid, -1),
            num_reqs=len(widths),
            num_tokens=int(starts[-1]),
            max_query_len=int(widths.max()),
            max_seq_len=max_blocks * block_size,
        )
        drafting = self._to_device(self._drafting)
        last = self._to_device(starts[:-1])[drafting] + (valid[drafting] - 1).clamp(min=0)
        ends = start[drafting] + valid[drafting]
        return PassInputs(
            input_ids=self._slots.tokens[slot, position].to(torch.int64),
            metadata=metadata,
            logits_rows=last,
            logits_slots=host_slots[self._drafting],
            draw_positions=torch.where(drafts[drafting], ends, -1),
        )

    def _to_device(self, array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)
