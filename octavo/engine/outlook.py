"""`octavo plan` with a drafter: measures what steps take here, and says what speculation should bring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from octavo.config import EngineArgs, EngineConfig
from octavo.core.cost_model import CostModel
from octavo.core.outlook import ACCEPTANCES, BATCHES, CONTEXT, Prospect, prospects

_REPEATS = 3


def speculation_outlook(args: EngineArgs) -> str:
    """A table, and what in it was measured and what is assumed.

    Times a few steps of a model of this shape with random weights: loads no file, and needs the memory
    of the weights for some seconds.
    """
    from octavo.engine.setup import resolve
    from octavo.worker.build import (
        build_runner,
        choose_kernels,
        measure_draft_costs,
        measure_step_costs,
        plan_worker,
    )

    config = resolve(dataclasses.replace(args, load_format="dummy"))
    assert config.speculative is not None, "asked for without a drafter"
    kernels = choose_kernels(config)
    memory = plan_worker(config, kernels)
    # The steps that are timed read no KV: the cache need not be there.
    small = dataclasses.replace(memory, num_blocks=1, num_draft_blocks=min(1, memory.num_draft_blocks))
    runner = build_runner(config, kernels, small)
    target = _least(lambda: measure_step_costs(runner, memory))
    assert target is not None, "the target's steps can be timed"
    draft = _least(lambda: measure_draft_costs(runner, memory))
    context = max(1, min(CONTEXT, memory.max_model_len // 2))
    batches = [batch for batch in BATCHES if batch <= config.max_num_seqs]
    fixed = config.speculative.num_speculative_tokens
    found = prospects(target, draft, context, config.max_num_batched_tokens, fixed=fixed, batches=batches)
    return _describe(config, found, context)


def _least(measure: Callable[[], tuple[list[tuple[int, float]], float] | None]) -> CostModel | None:
    """The least time of a few measurements: other programs only ever add to it."""
    taken = [measure() for _ in range(_REPEATS)]
    known = [costs for costs in taken if costs is not None]
    if not known:
        return None
    tables = [table for table, _ in known]
    table = [(rows[0][0], min(seconds for _, seconds in rows)) for rows in zip(*tables, strict=True)]
    return CostModel(table, min(per_token for _, per_token in known))


def _describe(config: EngineConfig, found: list[Prospect], context: int) -> str:
    speculative = config.speculative
    assert speculative is not None
    drafter = speculative.method if config.draft is None else f"{speculative.method}, {config.draft.name}"
    fixed = speculative.num_speculative_tokens
    how = "at the best number K of drafts" if fixed is None else f"at K={fixed} drafts"
    shares = "".join(f"{f'{share:.0%} accepted':>14}" for share in ACCEPTANCES)
    lines = [
        f"speculation ({drafter}): expected speed-up against plain decoding, {how}",
        f"  batch   plain step  draft pass  pays from{shares}",
    ]
    for one in found:
        plain = f"{one.plain_seconds * 1e3:.2f} ms"
        made = f"{one.pass_seconds * 1e3:.2f} ms" if one.pass_seconds else "-"
        pays = "never" if one.break_even is None else f"{one.break_even:.0%}"
        gains = "".join(f"{f'{gain:.2f}x K={count}':>14}" for gain, count in one.gains)
        lines.append(f"  {one.batch:>5} {plain:>12} {made:>11} {pays:>10}{gains}")
    lines += [
        f"  measured here: the time of a step by its rows{_passes(config)}, with random weights",
        f"  assumed: contexts of {context} tokens, read as fast as the weights are; every draft has the same",
        f"  chance, wherever it stands; all requests decode{_matches(config)}",
        "  (num_speculative_tokens=auto observes all of it as it goes, and drafts only where that pays)",
    ]
    return "\n".join(lines)


def _passes(config: EngineConfig) -> str:
    return "" if config.draft is None else ", and of a draft pass"


def _matches(config: EngineConfig) -> str:
    speculative = config.speculative
    assert speculative is not None
    if not speculative.has_lookup:
        return ""
    return ";\n  a lookup finds something to draft in some steps only, and the others are plain ones"
