"""The device's own memory of the running requests: one row of every table for each slot.

The host says only which slots get how many rows (octavo/core/messages.py); what those rows hold is
computed from these tables by a `StepMath` (octavo/worker/step_math.py). So the host can launch a step
before it knows what the last one brought.

Drafts lie in the token table right behind the confirmed tokens:

    tokens[slot]   t0 t1 ... tn-1 | d0 d1 .. dk-1 | whatever was there
                   num_tokens = n   num_drafts = k

so a row's input is always tokens[slot, position], and the draft that row checks is the token that
follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo.core.messages import NewSlot, SchedulerOutput
from octavo.sampling_params import MAX_SPECULATIVE_TOKENS

MAX_DRAFTS = MAX_SPECULATIVE_TOKENS  # a slot and step


class DeviceState:
    """Free slots hold stale values that nothing reads."""

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.block_size = block_size
        self.device = device
        width = max_model_len + MAX_DRAFTS + 1

        def column() -> torch.Tensor:
            return torch.zeros(num_slots, dtype=torch.int64, device=device)

        self.tokens = torch.zeros(num_slots, width, dtype=torch.int32, device=device)
        self.num_tokens = column()
        self.num_computed = column()
        self.num_drafts = column()
        self.limit = column()
        self.finished = torch.ones(num_slots, dtype=torch.bool, device=device)
        self.stop_ids = torch.full((num_slots, 8), -1, dtype=torch.int64, device=device)  # grows
        self.block_table = torch.zeros(num_slots, -(-width // block_size), dtype=torch.int32, device=device)
        self.num_blocks = [0] * num_slots  # the host's: how far each block table is filled

    def change(self, out: SchedulerOutput) -> None:
        """All that a step changes before its rows: requests leave, enter, grow."""
        for slot in out.freed_slots:
            self.remove(slot)
        for new in out.new_slots:
            self.put(new)
        for slot, block_ids in out.new_blocks:
            self.append_blocks(slot, block_ids)

    def put(self, new: NewSlot) -> None:
        """A request enters a slot."""
        slot = new.slot
        self._write(self.tokens, slot, 0, new.token_ids)
        self.num_tokens[slot] = len(new.token_ids)
        self.num_computed[slot] = new.num_computed_tokens
        self.num_drafts[slot] = 0
        self.limit[slot] = new.limit
        self.finished[slot] = False
        self.widen_stop_ids(len(new.stop_token_ids))
        self.stop_ids[slot] = -1
        self._write(self.stop_ids, slot, 0, new.stop_token_ids)
        self.num_blocks[slot] = 0
        self.append_blocks(slot, new.block_ids)

    def append_blocks(self, slot: int, block_ids: list[int]) -> None:
        """The block table of a slot grows."""
        self._write(self.block_table, slot, self.num_blocks[slot], block_ids)
        self.num_blocks[slot] += len(block_ids)

    def widen_stop_ids(self, count: int) -> None:
        """Room for so many stop ids a request; the table may be another one afterwards."""
        missing = count - self.stop_ids.shape[1]
        if missing > 0:
            more = self.stop_ids.new_full((self.num_slots, missing), -1)
            self.stop_ids = torch.cat((self.stop_ids, more), dim=1)

    def remove(self, slot: int) -> None:
        """The request of a slot has left."""
        self.finished[slot] = True

    def _write(self, table: torch.Tensor, slot: int, start: int, values: Sequence[int]) -> None:
        if not values:
            return
        if self.device.type == "cpu":  # torch takes ten times as long to read a list
            table.numpy()[slot, start : start + len(values)] = values
        else:
            table[slot, start : start + len(values)] = torch.tensor(values, dtype=table.dtype)
