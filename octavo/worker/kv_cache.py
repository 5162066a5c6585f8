"""The memory plan: what will be allocated, before anything is.

`plan_memory` adds up weights, activations, slots and KV blocks and says what fits. What does not
fit is an error that names the options that would help, with values. `allocate_kv_caches` then
does what the plan says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.errors import ConfigError, InsufficientMemoryError

if TYPE_CHECKING:
    import torch

    from octavo.attention.backend import AttentionBackend, AttentionSpec

GIB = 1 << 30
MIB = 1 << 20
CPU_KV_SHARE = 0.25  # of the free memory
CPU_KV_MOST = 4 * GIB


@dataclass(frozen=True)
class DraftMemory:
    """What a draft model needs beside its KV cache, and how large that is. Sizes in bytes."""

    weights: int
    activations: int
    block_bytes: int  # one block, all its layers; as many tokens as one of the target's
    kv_share: float  # of the bytes of the target's KV cache


@dataclass(frozen=True)
class MemoryRequest:
    """What the plan is made from. Sizes in bytes."""

    device: str
    budget: int  # what Octavo may use: free RAM, or a share of the card
    budget_name: str  # how the budget is called in messages
    weights: int
    activations: int
    slots: int
    block_bytes: int  # one block, all layers, keys and values
    block_size: int
    model_max_len: int  # what the model was made for
    max_model_len: int | None  # what the user asked for
    max_num_seqs: int
    kv_cache_memory: int | None  # what the user asked for
    draft: DraftMemory | None = None

    @property
    def fixed(self) -> int:
        """All that does not depend on the size of the KV caches."""
        draft = 0 if self.draft is None else self.draft.weights + self.draft.activations
        return self.weights + self.activations + self.slots + draft


@dataclass(frozen=True)
class MemoryPlan:
    """What will be allocated. Sizes in bytes."""

    request: MemoryRequest
    num_blocks: int
    max_model_len: int
    num_draft_blocks: int = 0

    @property
    def kv(self) -> int:
        """The KV cache."""
        return self.num_blocks * self.request.block_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache holds."""
        return self.num_blocks * self.request.block_size

    @property
    def total(self) -> int:
        """Everything together."""
        return self.request.fixed + self.kv + self.draft_kv

    @property
    def draft_kv(self) -> int:
        """The draft model's KV cache."""
        draft = self.request.draft
        return 0 if draft is None else self.num_draft_blocks * draft.block_bytes

    def concurrency(self, num_tokens: int) -> int:
        """Requests of `num_tokens` tokens that fit at the same time."""
        blocks = -(-num_tokens // self.request.block_size)
        return min(self.request.max_num_seqs, self.num_blocks // blocks)

    def describe(self) -> str:
        """The plan as a small table."""
        asked = self.request
        rows = [
            ("weights", _size(asked.weights)),
            (
                "KV cache",
                f"{_size(self.kv)}  ({self.num_blocks:,} blocks of {asked.block_size}, "
                f"{self.kv_tokens:,} tokens, {_size(asked.block_bytes / asked.block_size)} each)",
            ),
            *self._draft_rows(),
            ("activations", _size(asked.activations + (asked.draft.activations if asked.draft else 0))),
            ("slots", f"{_size(asked.slots)}  ({asked.max_num_seqs} requests at a time)"),
            ("together", f"{_size(self.total)} of {_size(asked.budget)} {asked.budget_name}"),
            ("longest context", f"{self.max_model_len:,} tokens"),
        ]
        lengths = sorted({min(1024, self.max_model_len), self.max_model_len})
        fits = ", ".join(f"{self.concurrency(n):,} of {n:,} tokens" for n in lengths)
        rows.append(("fits together", fits))
        return "\n".join(
            [f"memory plan ({asked.device})", *(f"  {name:<16} {value}" for name, value in rows)]
        )

    def _draft_rows(self) -> list[tuple[str, str]]:
        draft, block_size = self.request.draft, self.request.block_size
        if draft is None:
            return []
        blocks = self.num_draft_blocks
        return [
            ("draft model", _size(draft.weights)),
            (
                "draft KV cache",
                f"{_size(self.draft_kv)}  ({blocks:,} blocks of {block_size}, "
                f"{blocks * block_size:,} tokens, {_size(draft.block_bytes / block_size)} each)",
            ),
        ]


def plan_memory(asked: MemoryRequest) -> MemoryPlan:
    """Plan, or raise InsufficientMemoryError with the options that would help.

    A given kv_cache_memory is taken as it is. Otherwise the KV cache gets what the budget leaves,
    on a CPU at most a quarter of it and 4 GiB. max_model_len, if it was not given, is what the
    model allows and the KV cache holds. A draft model's KV cache comes on top, so that speculating
    leaves plain decoding the memory it had: a share of the target's, and where all requests at their
    longest leave room of the target's, as much of that room as all of them can draft in.
    """
    if asked.max_model_len is not None and asked.max_model_len > asked.model_max_len:
        raise ConfigError(
            f"max_model_len={asked.max_model_len} is more than the {asked.model_max_len} tokens this "
            f"model was made for; set max_model_len to at most {asked.model_max_len}"
        )
    fixed = asked.fixed
    left = asked.budget - fixed
    if left < asked.block_bytes:
        raise InsufficientMemoryError(
            f"the model does not fit: weights {_size(asked.weights)}, activations {_size(asked.activations)} "
            f"and slots {_size(asked.slots)} need {_size(fixed)}, and there are {_size(asked.budget)} "
            f"{asked.budget_name}.\n{_fixed_hint(asked)}"
        )
    if asked.kv_cache_memory is not None:
        kv = asked.kv_cache_memory
        if kv > left:
            raise InsufficientMemoryError(
                f"kv_cache_memory={_size(kv)} does not fit: beside weights, activations and slots "
                f"({_size(fixed)}) {_size(left)} are left of {_size(asked.budget)} {asked.budget_name}.\n"
                f"Set kv_cache_memory to at most {left // MIB}MB, or lower max_num_seqs "
                f"({asked.max_num_seqs})."
            )
        draft_kv = _draft_bytes(asked, kv)
        if kv + draft_kv > left:
            raise InsufficientMemoryError(
                f"a draft KV cache of {_size(draft_kv)} beside kv_cache_memory={_size(kv)} does not fit: "
                f"{_size(left)} are left of {_size(asked.budget)} {asked.budget_name}.\nSet kv_cache_memory "
                f"to at most {int((left - asked.block_bytes) / (kv + draft_kv) * kv) // MIB}MB, or lower "
                "draft_kv_share."
            )
    else:
        if asked.draft is not None:
            left = int(left / (1.0 + asked.draft.kv_share))
        kv = left
        if asked.device == "cpu":
            kv = min(int(asked.budget * CPU_KV_SHARE), CPU_KV_MOST, left)
    if kv < asked.block_bytes:
        raise InsufficientMemoryError(
            f"kv_cache_memory={_size(kv)} holds not even one block of {asked.block_size} tokens; set "
            f"kv_cache_memory to at least {math.ceil(2 * asked.block_bytes / MIB)}MB (each 1,024 tokens take "
            f"{_size(1024 * asked.block_bytes / asked.block_size)})."
        )
    num_blocks = kv // asked.block_bytes
    if asked.kv_cache_memory is None:  # more than all requests at their longest is never used
        longest = asked.max_model_len if asked.max_model_len is not None else asked.model_max_len
        num_blocks = min(num_blocks, asked.max_num_seqs * -(-longest // asked.block_size))
    kv_tokens = num_blocks * asked.block_size
    wanted = asked.max_model_len if asked.max_model_len is not None else min(asked.model_max_len, kv_tokens)
    if wanted > kv_tokens or wanted < 2:
        least = math.ceil(max(wanted, 2) / asked.block_size) * asked.block_bytes
        raise InsufficientMemoryError(
            f"the KV cache of {_size(kv)} holds {kv_tokens:,} tokens, less than one request of "
            f"{wanted:,}.\nSet kv_cache_memory to at least {math.ceil(least / MIB)}MB, or max_model_len to "
            f"at most {kv_tokens}."
        )
    if asked.draft is None:
        return MemoryPlan(asked, num_blocks, wanted)
    draft_kv = _draft_bytes(asked, num_blocks * asked.block_bytes)
    if asked.kv_cache_memory is None:  # what the target can never use is the draft model's to take
        draft_kv = max(draft_kv, int(kv * (1.0 + asked.draft.kv_share)) - num_blocks * asked.block_bytes)
    # It never needs more tokens than the target's holds.
    return MemoryPlan(asked, num_blocks, wanted, min(num_blocks, draft_kv // asked.draft.block_bytes))


def _draft_bytes(asked: MemoryRequest, kv: int) -> int:
    """Whole blocks for the share of `kv` that the draft model's KV cache gets, at least one."""
    if asked.draft is None:
        return 0
    return max(1, int(kv * asked.draft.kv_share) // asked.draft.block_bytes) * asked.draft.block_bytes


def allocate_kv_caches(
    backend: AttentionBackend,
    specs: list[AttentionSpec],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[torch.Tensor]:
    """One KV cache a layer, zeros. On a CPU a page takes memory only once it is used."""
    import numpy as np
    import torch

    caches = []
    for spec in specs:
        shape = backend.kv_cache_shape(num_blocks, block_size, spec)
        if device.type == "cpu":  # torch.zeros writes every page; numpy gets untouched ones from the system
            raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
            caches.append(torch.from_numpy(raw).view(dtype).view(shape))
        else:
            caches.append(torch.zeros(shape, dtype=dtype, device=device))
    return caches


def kv_block_bytes(
    backend: AttentionBackend, specs: list[AttentionSpec], block_size: int, itemsize: int
) -> int:
    """Bytes of one block in all layers, as this backend lays it out."""
    return sum(math.prod(backend.kv_cache_shape(1, block_size, spec)) for spec in specs) * itemsize


def _fixed_hint(asked: MemoryRequest) -> str:
    if asked.device == "cpu":
        return (
            f"Free some memory, choose a smaller model, or lower max_num_seqs ({asked.max_num_seqs}), which "
            "takes two rows of logits each, or max_num_batched_tokens."
        )
    return (
        "Raise gpu_memory_utilization, lower max_num_seqs or max_num_batched_tokens, or choose a smaller "
        "model (tensor_parallel_size and quantization are not in this version)."
    )


def _size(num_bytes: float) -> str:
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    if num_bytes >= MIB:
        return f"{num_bytes / MIB:.1f} MiB"
    return f"{num_bytes / 1024:.1f} KiB"
