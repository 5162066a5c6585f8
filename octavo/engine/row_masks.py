"""What a grammar allows in a step: bit masks of the rows whose requests have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from octavo.core.messages import RowKind, SchedulerOutput
from octavo.engine.grammar import Matcher
from octavo.worker.model_runner import GrammarMasks


def masks_of(
    out: SchedulerOutput,
    matcher_of: Callable[[str], Matcher | None],
    drafts: Mapping[int, Sequence[int]],
    vocab_size: int,
) -> GrammarMasks:
    """By slot, int32 [1 + its drafts, vocab_size / 32 rounded up]: a set bit is a token that may follow.

    matcher_of: by the sequence's id; None where it has just ended, whose rows stay open. drafts: by slot,
    the latest ones; a verify checks as many as it has rows for.
    """
    words = -(-vocab_size // 32)
    waiting = set(out.mask_slots)
    masks: dict[int, npt.NDArray[np.int32]] = {}
    for key, rows in zip(out.row_keys, out.rows, strict=True):
        if key.slot not in waiting:
            continue
        checked = drafts.get(key.slot, ())[: rows.num_rows - 1] if rows.kind is RowKind.VERIFY else ()
        mask = np.full((1 + len(checked), words), -1, dtype=np.int32)
        matcher = matcher_of(key.request_id)
        if matcher is not None:
            _fill(matcher, checked, mask)
        masks[key.slot] = mask
    return masks


def _fill(matcher: Matcher, drafts: Sequence[int], masks: npt.NDArray[np.int32]) -> None:
    """Masks of the row after the known tokens and of each row after a draft.

    Behind the first illegal draft nothing can be accepted, so those rows stay open.
    """
    matcher.fill_mask(masks[0])
    taken = 0
    for draft in drafts:
        if matcher.is_finished or matcher.accept([draft]) == 0:
            break
        taken += 1
        matcher.fill_mask(masks[taken])
    if taken:
        matcher.rollback(taken)
