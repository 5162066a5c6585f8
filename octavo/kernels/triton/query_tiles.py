"""Which launches the attention of a step takes, and how each of them cuts the rows.

Requests of few rows go into narrow query tiles, chunks into wide ones, long chunks into a kernel of their own
(see prompt). A step may hold all three.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.triton import attention, prompt, shared
from octavo.kernels.triton.attention import QueryTiling, Scratch, TilePlan
from octavo.kernels.triton.launch import next_power_of_2

# Requests with at most this many rows are packed into the narrow query tiles, larger ones into the
# wide: by the request alone, so that the rows beside it do not decide how it is computed.
NARROW_ROWS = 16
WIDE = QueryTiling(block_q=128, stages=2, warps=8)
WIDE_HEAD = QueryTiling(block_q=64, stages=1, warps=4)  # heads of more than 128 numbers fill the memory
_CHUNK_REQUESTS = 256  # steps with chunks of so many requests take the same compiled kernels
SHARED_ROWS = 64  # in larger steps every query tile has one program
# So it has in steps of more than _FEW_SHARED rows where no context is longer than _SHORT: that programs may
# share a tile costs 64 rows 2 us a layer, and one long context among short ones costs 700 where they may not.
_FEW_SHARED, _SHORT = 32, 8192
_ROOM = 256  # programs that find a place at once, two to a multiprocessor; more of them are kept smaller


def narrow_tiling(
    num_rows: int,
    rows_a_request: int,
    spec: AttentionSpec,
    dtype: torch.dtype = torch.bfloat16,
    longest: int = attention.NO_LIMIT,
) -> tuple[QueryTiling, int]:
    """How a step of so many rows is cut, and the items beyond one a query tile that long contexts may take.

    As measured. Requests have `rows_a_request` rows, as a rule, and contexts of at most `longest` tokens.
    Nothing here changes a bit of the result.
    """
    heads = spec.num_heads // spec.num_kv_heads
    wanted = next_power_of_2(heads * min(rows_a_request, NARROW_ROWS))
    most = 16 if dtype == torch.float32 else attention.MOST_FEW
    block_q = max(8, min(wanted, most), next_power_of_2(heads))
    tiles = -(-num_rows // max(1, min(rows_a_request, block_q // heads)))
    programs = spec.num_kv_heads * tiles
    one_each = block_q > 8 or tiles == 1  # one program to a multiprocessor, with more buffers
    room = max(1, (_ROOM // 2 if one_each else _ROOM) // spec.num_kv_heads)
    shares = num_rows <= (SHARED_ROWS if longest > _SHORT else min(SHARED_ROWS, _FEW_SHARED))
    extra = max(room - tiles, room // 2) if shares else 0
    if dtype == torch.float32:
        return QueryTiling(block_q, stages=2), extra
    if block_q > 8:
        return QueryTiling(block_q, stages=4 if programs <= _ROOM // 2 else 3), extra
    if programs > _ROOM and spec.head_dim <= 128:
        # four to a multiprocessor, each with one buffer: none has to wait for a place
        return QueryTiling(block_q, stages=2, registers=128), extra
    return QueryTiling(block_q, stages=3 if programs <= _ROOM // 4 else 4), extra


def plans_of(
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    dtype: torch.dtype = torch.bfloat16,
    one_tiling: bool = False,
    block_size: int | None = None,
) -> list[TilePlan]:
    """The launches that attention of a step takes: narrow query tiles, wide ones, or both.

    With `one_tiling` always the narrow ones: slower for chunks, and the same bits however a prompt
    is cut into them. `block_size`: see attention.plan.
    """
    longest = metadata.max_query_len
    usual = longest
    if longest <= NARROW_ROWS or not one_tiling:
        usual = min(longest, metadata.usual_query_len or longest)
    narrow, extra = narrow_tiling(metadata.num_tokens, usual, spec, dtype, metadata.max_seq_len)
    if one_tiling or metadata.num_tokens <= NARROW_ROWS or longest <= NARROW_ROWS:
        return [attention.plan(metadata, spec, narrow, extra, block_size=block_size)]
    wide = WIDE if spec.head_dim <= 128 else WIDE_HEAD
    if dtype == torch.float32:
        wide = narrow_tiling(metadata.num_tokens, NARROW_ROWS, spec, dtype)[0]
    plans = []
    if metadata.min_query_len <= NARROW_ROWS:
        plans.append(
            attention.plan(
                metadata, spec, narrow, extra, most=NARROW_ROWS, block_size=block_size, room=_CHUNK_REQUESTS
            )
        )
    if len(metadata.long_chunks) < metadata.num_reqs:
        most = whole = attention.NO_LIMIT
        if any(start for *_, start in metadata.long_chunks):
            most = prompt.LEAST_ROWS - 1
        elif metadata.long_chunks:
            whole = prompt.LEAST_ROWS
        plans.append(
            attention.plan(
                metadata, spec, wide, least=NARROW_ROWS + 1, most=most, whole=whole, room=_CHUNK_REQUESTS
            )
        )
    return plans


@dataclass(frozen=True, slots=True)
class Attend:
    """The launches that attention of one layer takes."""

    plans: list[TilePlan]
    scratch: Scratch | None
    prefixes: shared.SharedScratch | None

    def __call__(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> None:
        if self.prefixes is not None:
            shared.attend(q, cache, metadata, spec, self.prefixes)
        for plan in self.plans:
            attention.attend(q, cache, out, metadata, spec, plan, self.scratch, True, self.prefixes)
