"""The rules of requests that change logits, kept where the logits are.

A request that enters a slot with penalties, a bias, bad words, min_tokens or allowed tokens has them
written into the slot's record, once; a step then sends nothing but which rows belong to such slots.
octavo/kernels/triton/rules.py says what a record holds and reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.sampling.batch import IntArray, SlotSampling

_LEAST_WIDTH = 64  # words of a record


class DeviceRules:
    """Rules of all slots. Nothing here waits for the device."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        from octavo.kernels.triton import rules as kernels

        self.kernels = kernels
        self._device = device
        self._vocab_size = vocab_size
        self.records = torch.zeros(num_slots, _LEAST_WIDTH, dtype=torch.int32, device=device)  # grows
        self.counters = torch.zeros(kernels.COUNTED_ROWS, vocab_size, dtype=torch.int32, device=device)
        self.masks = torch.zeros(0, -(-vocab_size // 32), dtype=torch.int32, device=device)

    def put(self, slot: int, sampling: SlotSampling) -> None:
        """A request with rules enters a slot."""
        record = self._record(sampling)
        if len(record) > self.records.shape[1]:
            width = 1 << (len(record) - 1).bit_length()
            wider = self.records.new_zeros(len(self.records), width)
            wider[:, : self.records.shape[1]] = self.records
            self.records = wider
        self.records[slot, : len(record)] = self.send(record)
        if sampling.allowed_words is not None:
            if not len(self.masks):
                self.masks = self.masks.new_zeros(len(self.records), self.masks.shape[1])
            self.masks[slot] = self.send(sampling.allowed_words)

    def rows(
        self,
        row_slots: IntArray,
        is_special: npt.NDArray[np.bool_],
        of_slot: Mapping[int, SlotSampling],
        tokens: torch.Tensor,
    ) -> RuleRows:
        """What `apply` needs of a step. row_slots, is_special: [rows]; of_slot has the special slots'."""
        rows = np.flatnonzero(is_special)
        slots = row_slots[rows]
        known = {slot: of_slot[slot] for slot in set(slots.tolist())}
        penalized = np.array([known[slot].has_penalties for slot in slots.tolist()], dtype=np.bool_)
        masked = np.array([known[slot].allowed_words is not None for slot in slots.tolist()], dtype=np.bool_)
        pairs = np.stack((rows, slots), axis=1)
        order = np.argsort(~penalized, kind="stable")
        return RuleRows(self, pairs[order], int(penalized.sum()), pairs[masked], tokens)

    def _record(self, sampling: SlotSampling) -> npt.NDArray[np.int32]:
        at = self.kernels
        header = np.zeros(at.HEADER, dtype=np.int32)
        floats = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        header[at.REPETITION : at.FREQUENCY + 1] = np.array(floats, dtype=np.float32).view(np.int32)
        header[at.NUM_PROMPT], header[at.MIN_TOKENS] = sampling.num_prompt_tokens, sampling.min_tokens
        header[at.HAS_PENALTIES] = sampling.has_penalties
        parts = [header]

        def end() -> int:
            return sum(len(part) for part in parts)

        header[at.NUM_STOPS], header[at.STOPS] = len(sampling.stop_ids), end()
        parts.append(np.array(sampling.stop_ids, dtype=np.int32))
        if sampling.bias_ids is not None and sampling.bias_values is not None:
            header[at.NUM_BIAS], header[at.BIAS] = len(sampling.bias_ids), end()
            parts += (sampling.bias_ids.astype(np.int32), sampling.bias_values.view(np.int32))
        if sampling.bad_words:
            words = sampling.bad_words
            longest = max(len(word) for word in words)
            backwards = np.full((longest, len(words)), -1, dtype=np.int32)
            for index, word in enumerate(words):
                backwards[: len(word), index] = word[::-1]
            header[at.NUM_WORDS], header[at.LONGEST], header[at.WORDS] = len(words), longest, end()
            parts.append(backwards.reshape(-1))
        return np.concatenate(parts)

    def send(self, values: npt.NDArray[np.int32]) -> torch.Tensor:
        """Numbers of the host on the device."""
        sent = torch.from_numpy(values)
        if self._device.type == "cpu":
            return sent
        return sent.pin_memory().to(self._device, non_blocking=True)


@dataclass(slots=True)
class RuleRows:
    """The rows of a step whose slots have rules."""

    rules: DeviceRules
    rows: IntArray  # [n, 2] row of logits and slot; those with penalties first
    num_penalized: int
    masked: IntArray  # [m, 2] the same of those with allowed tokens
    tokens: torch.Tensor  # [slots, max_len] int32, the text of each slot

    def apply(self, logits: torch.Tensor, positions: torch.Tensor) -> None:
        """Write masks, bias, bans and penalties of these rows into logits [rows, vocab_size].

        positions: [rows] int64 on the device, where each row draws.
        """
        rules = self.rules
        entries = rules.send(np.concatenate((self.masked, self.rows)).astype(np.int32))
        count = len(self.masked)
        rules.kernels.mask_rows(logits, entries[:count], rules.masks)
        rules.kernels.apply(
            logits, entries[count:], self.num_penalized, positions, rules.records, self.tokens, rules.counters
        )
