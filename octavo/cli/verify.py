"""`octavo verify`: do speculation and batching change a token here? Exit code 1 if one that must not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.console import as_text, load_llm
from octavo.cli.options import SectionCommand, engine_kwargs, engine_options
from octavo.cli.verify_runs import NEAR_TIE, Verdict, Verifier, bundled_prompts
from octavo.config import SpeculativeConfig

if TYPE_CHECKING:
    from octavo import LLM

_FREE_METHODS = ("prompt_lookup", "suffix", "predicted")
_MODEL_METHODS = ("draft_model", "hybrid")
_SHOWN = 10  # differences spelled out


@click.command(cls=SectionCommand)
@click.argument("model", default="smollm2")
@click.option(
    "--method", "methods", multiple=True, help="Check this drafter alone; may be repeated [all that can be]."
)
@click.option("--prompts", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A text file with one prompt a line, instead of the bundled ones.")  # fmt: skip
@click.option("--num-prompts", type=click.IntRange(1), default=64, show_default=True, help="Prompts in all.")
@click.option("--max-tokens", type=click.IntRange(1), default=24, show_default=True, help="Of each answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@engine_options
def command(
    model: str, methods: tuple[str, ...], file: Path | None, num_prompts: int, max_tokens: int, as_json: bool,
    **given: Any,
) -> int:  # fmt: skip
    """Prove that speculation and batching change no token of MODEL on this machine.

    Every prompt is answered alone and plainly; then in batches of 8 and 64, and with every drafter
    (with --draft also those that need a draft model), at batch 1, 8 and 64, greedy and sampled. With
    --deterministic all must be equal to the bit, and what that costs is measured.
    """
    drafters = _drafters(methods, given)
    prompts = bundled_prompts(num_prompts)
    if file is not None:
        prompts = [line for line in as_text(file.read_bytes(), str(file)).splitlines() if line.strip()]
        if not prompts:
            raise click.UsageError(f"{file} holds no prompt")
        prompts = [prompts[i % len(prompts)] for i in range(num_prompts)]
    engine = engine_kwargs(model, given)

    def tell(text: str) -> None:
        click.echo(f"octavo: {text}", err=True)

    def make(kwargs: dict[str, Any]) -> LLM:
        return load_llm(kwargs, quiet=True)

    verifier = Verifier(make, engine, prompts, max_tokens, tell)
    runs = verifier.verify(drafters)
    deterministic = bool(engine.get("deterministic"))
    costs = verifier.costs() if deterministic else []
    verdict = Verdict(verifier.dtype, deterministic, verifier.requirement, runs, costs)
    click.echo(json.dumps(_record(model, verdict)) if as_json else _table(verdict))
    return 1 if verdict.failures else 0


def _drafters(methods: tuple[str, ...], given: dict[str, Any]) -> list[dict[str, Any]]:
    """One `speculative` option for each drafter to check; takes the flags they are made of out of `given`."""
    if given.get("engine_speculative") is not None:
        raise click.UsageError("verify makes its own --speculative-config; say --method, --draft instead")
    draft = given.pop("speculative_model", None)
    method = given.pop("speculative_method", None)
    count: Any = given.pop("speculative_num_speculative_tokens", None) or "4"
    count = int(count) if count.isdigit() else count
    chosen = [*methods, *([method] if method else [])]
    if not chosen:
        chosen = [*_FREE_METHODS, *(_MODEL_METHODS if draft else ())]
    drafters = []
    for name in dict.fromkeys(chosen):
        speculative: dict[str, Any] = {"method": name, "num_speculative_tokens": count}
        if name in _MODEL_METHODS:
            if draft is None:
                raise click.UsageError(f"--method {name} needs --draft MODEL")
            speculative["model"] = draft
        SpeculativeConfig.from_dict(speculative)  # refused here, before the reference takes its minutes
        drafters.append(speculative)
    return drafters


def _table(verdict: Verdict) -> str:
    wide = max(len("drafter"), *(len(run.drafter) for run in verdict.runs))
    lines = [f"{'drafter':<{wide}}  batch  mode      equal    accepted drafts  first difference"]
    for run in verdict.runs:
        equal = f"{run.num_prompts - len(run.differences)}/{run.num_prompts}"
        drafts = f"{run.accepted}/{run.drafted}" if run.drafter != "none" else "-"
        first = min(run.differences, key=lambda d: (d.position, d.prompt), default=None)
        where = "-" if first is None else f"token {first.position} of prompt {first.prompt}"
        lines.append(f"{run.drafter:<{wide}}  {run.batch:>5}  {run.mode:<7} {equal:>7} {drafts:>18}  {where}")
    shown = [(run, difference) for run in verdict.runs for difference in run.differences]
    if shown:
        lines += ["", "the smallest and the largest gaps:" if len(shown) > _SHOWN else "differences:"]
        shown.sort(key=lambda pair: pair[1].size)
        if len(shown) > _SHOWN:
            shown = shown[: _SHOWN // 2] + shown[-(_SHOWN // 2) :]
        for run, d in shown:
            lines.append(
                f"  {run.drafter}, batch {run.batch}, {run.mode}: prompt {d.prompt}, token {d.position}: "
                f"{d.found} instead of {d.expected}, {_gap(d.logit_gap, 'logit')}"
                + (f", {_gap(d.score_gap, 'score')}" if run.mode == "sampled" else "")
            )
    lines.append("")
    for cost in verdict.costs:
        lines.append(
            f"deterministic costs {cost.slowdown:.1%} at batch {cost.batch}: {cost.deterministic:.0f} tok/s "
            f"instead of {cost.plain:.0f}"
        )
    for drafter in verdict.unproven:
        lines.append(f"not one draft of {drafter} was accepted: for it this check proves nothing")
    lines.append(_conclusion(verdict))
    return "\n".join(lines)


def _gap(gap: float | None, kind: str) -> str:
    return f"{kind} gap unknown" if gap is None else f"{kind} gap {gap:+.2g}"


def _conclusion(verdict: Verdict) -> str:
    total = sum(len(run.differences) for run in verdict.runs)
    tokens = sum(run.num_tokens for run in verdict.runs)
    how = f"{verdict.dtype}, deterministic" if verdict.deterministic else verdict.dtype
    if not total:
        return f"all {tokens:,} tokens are equal ({how})"
    if verdict.requirement == "near-ties":
        near = total - len(verdict.failures)
        text = (
            f"{near} near-ties (score gap up to {NEAR_TIE:g}) fell the other way in {tokens:,} tokens ({how})"
        )
        return text + (f"; FAILED: {len(verdict.failures)} differences are none" if verdict.failures else "")
    if verdict.requirement == "reported":
        return (
            f"{total} of {tokens:,} tokens fell the other way ({total / tokens:.3%}; {how}): here a row's "
            "bits depend on the rows beside it, with or without speculation. This is no failure; "
            "--deterministic makes all equal, where it is to be had"
        )
    return f"FAILED: {total} of {tokens:,} tokens differ where all must be equal ({how})"


def _record(model: str, verdict: Verdict) -> dict[str, Any]:
    runs = []
    for run in verdict.runs:
        runs.append({**dataclasses.asdict(run), "flip_rate": run.flip_rate})
    return {
        "model": model,
        "dtype": verdict.dtype,
        "deterministic": verdict.deterministic,
        "requirement": verdict.requirement,
        "passed": not verdict.failures,
        "num_failures": len(verdict.failures),
        "unproven": verdict.unproven,
        "runs": runs,
        "deterministic_cost": [
            {**dataclasses.asdict(cost), "slowdown": cost.slowdown} for cost in verdict.costs
        ],
    }
