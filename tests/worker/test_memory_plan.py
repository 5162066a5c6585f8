"""The memory plan as arithmetic: what the KV caches of the target and of a draft model get."""

from __future__ import annotations

import dataclasses

import pytest

from octavo.errors import InsufficientMemoryError
from octavo.worker.kv_cache import DraftMemory, MemoryPlan, MemoryRequest, plan_memory

BLOCK, DRAFT_BLOCK = 1000, 250


def plan(*, left: int, seqs: int = 4, longest: int = 160, share: float = 0.1, **more: object) -> MemoryPlan:
    """A plan with `left` bytes beside everything of fixed size."""
    draft = DraftMemory(weights=300, activations=200, block_bytes=DRAFT_BLOCK, kv_share=share)
    asked = MemoryRequest(
        device="cuda", budget=0, budget_name="of a card", weights=5000, activations=400, slots=100,
        block_bytes=BLOCK, block_size=16, model_max_len=4096, max_model_len=longest, max_num_seqs=seqs,
        kv_cache_memory=None, draft=draft,
    )  # fmt: skip
    asked = dataclasses.replace(asked, budget=asked.fixed + left, **more)  # type: ignore[arg-type]
    return plan_memory(asked)


def test_where_memory_is_short_the_draft_model_gets_its_share() -> None:
    made = plan(left=22_000)
    assert made.num_blocks == 20
    assert made.num_draft_blocks == 20 * BLOCK // 10 // DRAFT_BLOCK
    assert made.total <= made.request.budget


@pytest.mark.parametrize("left", [44_000, 46_000, 50_000, 60_000, 10**9])
def test_what_the_target_can_never_use_is_the_draft_models(left: int) -> None:
    made = plan(left=left)
    assert made.num_blocks == 40  # four requests of ten blocks: more is never used
    room = (left - 40 * BLOCK) // DRAFT_BLOCK
    assert min(room - 1, 40) <= made.num_draft_blocks <= min(room, 40)
    assert made.total <= made.request.budget


def test_a_given_size_is_not_exceeded() -> None:
    made = plan(left=10**9, kv_cache_memory=40 * BLOCK)
    assert (made.num_blocks, made.num_draft_blocks) == (40, 40 * BLOCK // 10 // DRAFT_BLOCK)


def test_without_a_draft_model_nothing_is_kept_for_one() -> None:
    made = plan(left=22_000, draft=None)
    assert (made.num_blocks, made.num_draft_blocks, made.draft_kv) == (22, 0, 0)


def test_a_given_size_with_its_draft_share_must_fit() -> None:
    with pytest.raises(InsufficientMemoryError, match="lower draft_kv_share"):
        plan(left=22_000, kv_cache_memory=21_000)
