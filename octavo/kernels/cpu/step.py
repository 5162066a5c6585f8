"""Launchers of the step's bookkeeping (src/step.c): two calls around a forward pass.

The caller owns every array; nothing is checked per call beyond what is cheap, because these are the
only two calls of a step whose cost is Python's. `SlotTables` checks the tables once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from octavo.kernels.cpu.library import shared_function


class SlotsView(ctypes.Structure):
    """`oc_slots`"""

    _fields_ = (
        ("tokens", ctypes.c_void_p),
        ("tokens_stride", ctypes.c_int64),
        ("num_tokens", ctypes.c_void_p),
        ("num_computed", ctypes.c_void_p),
        ("num_drafts", ctypes.c_void_p),
        ("limit", ctypes.c_void_p),
        ("finished", ctypes.c_void_p),
        ("stop_ids", ctypes.c_void_p),
        ("num_stop", ctypes.c_int64),
        ("block_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    )


class _Inputs(ctypes.Structure):
    """`oc_inputs`"""

    _fields_ = (
        ("input_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("query_start_loc", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("max_blocks", ctypes.c_int64),
        ("num_valid", ctypes.c_void_p),
        ("logits_rows", ctypes.c_void_p),
        ("logits_slots", ctypes.c_void_p),
        ("draw_positions", ctypes.c_void_p),
    )


class _Result(ctypes.Structure):
    """`oc_result`"""

    _fields_ = (
        ("tokens", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("num_emitted", ctypes.c_void_p),
        ("num_drafts", ctypes.c_void_p),
        ("num_accepted", ctypes.c_void_p),
        ("finished", ctypes.c_void_p),
    )


@cache
def _functions() -> tuple[Any, Any]:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    return (
        shared_function(
            "oc_prepare_step", [ctypes.POINTER(SlotsView), pointer, size, ctypes.POINTER(_Inputs)]
        ),
        shared_function(
            "oc_finish_step",
            [ctypes.POINTER(SlotsView), pointer, size, pointer, pointer, ctypes.POINTER(_Result)],
        ),
    )


class SlotTables:
    """The tables of all slots as C sees them; keeps the tensors alive."""

    def __init__(
        self,
        tokens: torch.Tensor,  # [slots, width] int32
        num_tokens: torch.Tensor,  # [slots] int64, and so are the next three
        num_computed: torch.Tensor,
        num_drafts: torch.Tensor,
        limit: torch.Tensor,
        finished: torch.Tensor,  # [slots] bool
        stop_ids: torch.Tensor,  # [slots, any] int64, padded with -1
        block_table: torch.Tensor,  # [slots, blocks] int32
        block_size: int,
    ) -> None:
        wanted = [
            ("tokens", tokens, torch.int32),
            ("num_tokens", num_tokens, torch.int64),
            ("num_computed", num_computed, torch.int64),
            ("num_drafts", num_drafts, torch.int64),
            ("limit", limit, torch.int64),
            ("finished", finished, torch.bool),
            ("stop_ids", stop_ids, torch.int64),
            ("block_table", block_table, torch.int32),
        ]
        for name, tensor, dtype in wanted:
            on_cpu = tensor.device.type == "cpu" and tensor.is_contiguous()
            if tensor.dtype != dtype or not on_cpu or len(tensor) != len(tokens):
                raise ValueError(f"{name} must be a contiguous {dtype} tensor on the CPU, one row a slot")
        self.num_slots = len(tokens)
        self._tensors = [tensor for _, tensor, _ in wanted]
        self.view = SlotsView(
            tokens.data_ptr(),
            tokens.shape[1],
            num_tokens.data_ptr(),
            num_computed.data_ptr(),
            num_drafts.data_ptr(),
            limit.data_ptr(),
            finished.data_ptr(),
            stop_ids.data_ptr(),
            stop_ids.shape[1],
            block_table.data_ptr(),
            block_table.shape[1],
            block_size,
        )


@dataclass(slots=True)
class PreparedStep:
    """What `prepare` computes; R requests, T token rows, L rows of logits."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slot_mapping: torch.Tensor  # [T] int64
    query_start_loc: torch.Tensor  # [R + 1] int32
    seq_lens: torch.Tensor  # [R] int32
    block_table: torch.Tensor  # [R, max_blocks] int32
    num_valid: torch.Tensor  # [R] int64
    logits_rows: torch.Tensor  # [L] int64
    logits_slots: torch.Tensor  # [L] int64
    draw_positions: torch.Tensor  # [L] int64


def prepare(
    tables: SlotTables,
    rows: torch.Tensor,  # [R, 4] int64: slot, num_rows, kind, samples
    num_tokens: int,
    num_logits: int,
    max_blocks: int,
) -> PreparedStep:
    """Inputs of a forward pass. The sums of `rows` must be num_tokens and num_logits."""
    requests = len(rows)
    # One allocation for all that is int64, cut into views.
    wide = torch.empty(3 * num_tokens + requests + 3 * num_logits, dtype=torch.int64)
    ids, positions, mapping, valid, logits_rows, slots, draws = torch.split(
        wide, [num_tokens, num_tokens, num_tokens, requests, num_logits, num_logits, num_logits]
    )
    starts = torch.empty(requests + 1, dtype=torch.int32)
    lens = torch.empty(requests, dtype=torch.int32)
    table = torch.empty(requests, max_blocks, dtype=torch.int32)
    step = PreparedStep(ids, positions, mapping, starts, lens, table, valid, logits_rows, slots, draws)
    inputs = _Inputs(
        ids.data_ptr(),
        positions.data_ptr(),
        mapping.data_ptr(),
        starts.data_ptr(),
        lens.data_ptr(),
        table.data_ptr(),
        max_blocks,
        valid.data_ptr(),
        logits_rows.data_ptr(),
        slots.data_ptr(),
        draws.data_ptr(),
    )
    _functions()[0](tables.view, rows.data_ptr(), requests, inputs)
    return step


def finish(
    tables: SlotTables,
    rows: torch.Tensor,  # [R, 4] int64
    num_valid: torch.Tensor,  # [R] int64, as `prepare` gave it
    drawn: torch.Tensor,  # [L] int64
    num_sampled: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Verify, cut, move the counters: tokens [num_sampled, width] and four numbers a request.

    The second tensor is [4, num_sampled] int64: emitted, drafts, accepted, finished.
    """
    if drawn.dtype != torch.int64 or not drawn.is_contiguous():
        raise ValueError("drawn must be contiguous int64")
    tokens = torch.empty(num_sampled, width, dtype=torch.int64)
    numbers = torch.empty(4, num_sampled, dtype=torch.int64)
    first, stride = numbers.data_ptr(), 8 * num_sampled
    result = _Result(tokens.data_ptr(), width, first, first + stride, first + 2 * stride, first + 3 * stride)
    _functions()[1](tables.view, rows.data_ptr(), len(rows), num_valid.data_ptr(), drawn.data_ptr(), result)
    return tokens, numbers
