"""A model driven by hand through its paged KV cache: requests in any order, chunks of any size.

What the model runner does on the device, here in a few plain lines, so that models and attention
backends can be tested without an engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from octavo.attention.backend import AttentionBackend, AttentionMetadata, ForwardContext
from octavo.models.decoder import CausalLM


class PagedRun:
    """Requests of one model. Block tables are shuffled: no request has its blocks in a row."""

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        num_requests: int,
        max_len: int,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.model = model
        per_request = -(-max_len // block_size)
        num_blocks = num_requests * per_request + 1
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        self.block_size = block_size
        self.block_table = order[: num_requests * per_request].view(num_requests, -1).int()
        self.num_computed = [0] * num_requests
        self.kv_caches = [
            # whatever was in a block before must not matter
            torch.full(backend.kv_cache_shape(num_blocks, block_size, spec), float("nan"), dtype=model.dtype)
            for spec in model.attention_specs
        ]

    def step(
        self,
        rows: Sequence[tuple[int, Sequence[int]]],
        padding: int = 0,
        wanted: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Compute the given tokens of the given requests: logits of every row [rows, vocab_size].

        `padding` appends that many padding rows to the last request's. `wanted`: only these rows' logits.
        """
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, seq_lens = [0], []
        for request, tokens in rows:
            for token in tokens:
                position = self.num_computed[request]
                block = int(self.block_table[request, position // self.block_size])
                ids.append(token)
                positions.append(position)
                slots.append(block * self.block_size + position % self.block_size)
                self.num_computed[request] += 1
            starts.append(len(ids))
            seq_lens.append(self.num_computed[request])
        num_rows = len(ids)
        ids += [0] * padding
        positions += [-1] * padding
        slots += [-1] * padding
        starts[-1] += padding
        position_tensor = torch.tensor(positions, dtype=torch.int64)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_table=self.block_table[[request for request, _ in rows]],
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            positions=position_tensor,
            num_reqs=len(rows),
            num_tokens=len(ids),
            max_query_len=max(end - start for start, end in itertools.pairwise(starts)),
            max_seq_len=max(seq_lens),
        )
        hidden = self.model.forward(
            torch.tensor(ids, dtype=torch.int64),
            position_tensor,
            ForwardContext(
                metadata,
                self.kv_caches,
                None if wanted is None else torch.tensor(wanted, dtype=torch.int64),
            ),
        )
        return self.model.logits(hidden[:num_rows] if wanted is None else hidden)

    def greedy(self, request: int, prompt: Sequence[int], num_tokens: int, chunk: int = 0) -> list[int]:
        """Prefill in chunks (0: whole), then decode: the tokens drawn."""
        size = chunk or len(prompt)
        logits = torch.empty(0)
        for start in range(0, len(prompt), size):
            logits = self.step([(request, prompt[start : start + size])])
        drawn = [int(logits[-1].argmax())]
        while len(drawn) < num_tokens:
            drawn.append(int(self.step([(request, drawn[-1:])])[-1].argmax()))
        return drawn
