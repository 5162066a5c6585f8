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
SHARED_ROWS = 32  # above so many rows there are enough query tiles to fill the card
_FULL = attention.FULL
_CROWD = 264  # programs, beyond which they are kept small


def narrow_tiling(
    num_rows: int, rows_a_request: int, spec: AttentionSpec, dtype: torch.dtype = torch.bfloat16
) -> tuple[QueryTiling, int]:
    """How a step of so many rows is cut, and how many programs may share a query tile: as measured.

    Requests have `rows_a_request` rows, as a rule. Nothing here changes a bit of the result.
    """
    heads = spec.num_heads // spec.num_kv_heads
    wanted = next_power_of_2(heads * min(rows_a_request, NARROW_ROWS))
    most = 16 if dtype == torch.float32 else attention.MOST_FEW
    block_q = max(8, min(wanted, most), next_power_of_2(heads))
    programs = spec.num_kv_heads * max(1, num_rows)
    parts = next_power_of_2(max(1, min(16, 256 // programs)))
    if num_rows > SHARED_ROWS or programs >= _FULL:
        parts = 1
    if dtype == torch.float32:
        return QueryTiling(block_q, stages=2), parts
    if block_q > 8 or parts > 4:
        return QueryTiling(block_q, stages=3), parts
    if programs > _CROWD and spec.head_dim <= 128:
        # four to a multiprocessor, each with one buffer: none has to wait for a place
        return QueryTiling(block_q, stages=2, registers=128), parts
    return QueryTiling(block_q, stages=4 if parts == 1 else 5), parts


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
    narrow, parts = narrow_tiling(metadata.num_tokens, usual, spec, dtype)
    if one_tiling or metadata.num_tokens <= NARROW_ROWS or longest <= NARROW_ROWS:
        return [attention.plan(metadata, spec, narrow, parts, block_size=block_size)]
    wide = WIDE if spec.head_dim <= 128 else WIDE_HEAD
    if dtype == torch.float32:
        wide = narrow_tiling(metadata.num_tokens, NARROW_ROWS, spec, dtype)[0]
    plans = []
    if metadata.min_query_len <= NARROW_ROWS:
        plans.append(attention.plan(metadata, spec, narrow, parts, most=NARROW_ROWS, block_size=block_size))
    if len(metadata.long_chunks) < metadata.num_reqs:
        most = whole = attention.NO_LIMIT
        if any(start for *_, start in metadata.long_chunks):
            most = prompt.LEAST_ROWS - 1
        elif metadata.long_chunks:
            whole = prompt.LEAST_ROWS
        plans.append(attention.plan(metadata, spec, wide, least=NARROW_ROWS + 1, most=most, whole=whole))
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
