"""Coins: one uniform number for each request and position, the same whenever it is looked at.

Rejection sampling and synthetic acceptance toss one for a draft. Like all noise here a coin is a
function of (seed, position) and a stream of its own, so a step that is computed again tosses the
same. They are worked out once, when a request enters its slot: a step only looks them up.
"""

from __future__ import annotations

import torch

from octavo.sampling.noise import Stream, uniforms


class CoinTable:
    """The coins of all slots at all positions, on the device: [num_slots, width] float32."""

    def __init__(self, num_slots: int, width: int, stream: Stream, device: torch.device) -> None:
        self._stream = stream
        self.table = torch.zeros(num_slots, width, device=device)

    def put(self, slot: int, seed: int, start: int, stop: int) -> None:
        """A request with this seed enters a slot; it will draw the tokens at [start, stop)."""
        coins = uniforms(seed, torch.arange(start, stop), self._stream)
        self.table[slot, start:stop] = coins.to(self.table.device, non_blocking=True)

    def at(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float32 [n], for slots and positions [n] int64; position -1 (padding) gives any coin."""
        return self.table[slots, positions.clamp(min=0)]
