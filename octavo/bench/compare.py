"""The same work through several engines and methods: run each, compare what they said, write it down.

Every run is a process of its own (`octavo.bench.compare_child`), one after the other: memory, threads and
compiled kernels of one engine never meet those of another, and one that dies takes nothing with it. The
prompts are chosen once, here, and handed to all. Afterwards the first places where outputs part are shown to
the model, which says how far apart it puts the two tokens: that tells rounding from a defect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.bench import record
from octavo.bench.arrivals import schedule
from octavo.bench.equality import Comparison, Difference, as_json
from octavo.bench.prompts import PromptSet, PromptSource, load_prompts
from octavo.bench.record import RunResult
from octavo.bench.rendering import Renderer
from octavo.bench.report import compare_runs, name_runs, write_report
from octavo.bench.spec import RunSpec

SCHEMA_VERSION = 1
MOST_GAPS = 64  # differences that are looked at, over all runs

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """One run to be made, and where its result goes."""

    spec: RunSpec
    path: Path


@dataclass
class Outcome:
    """What a comparison has brought: results in the order of the report, and what could not be run."""

    results: list[RunResult]
    paths: list[str]
    comparisons: list[Comparison]
    not_run: list[tuple[str, str]] = field(default_factory=list)  # (label, why)
    baseline: RunResult | None = None

    def exit_code(self, *, require_equal: bool = False) -> int:
        """1 if a run could not be made, a request failed, or outputs that must be equal are not."""
        unequal = require_equal and not all(comparison.all_equal for comparison in self.comparisons)
        return int(bool(self.not_run) or unequal or any(result.exit_code for result in self.results))


def plan(specs: Sequence[RunSpec], output: Path, *, force: bool) -> list[Planned]:
    """Check every spec and every file to be written, before anything is loaded. Raises ConfigError."""
    planned: list[Planned] = []
    taken: set[Path] = set()
    for spec in specs:
        spec.check()
        path = record.result_path(output, spec.method, spec.engine)
        number = 1
        while path in taken:  # two URLs, or served and in process
            number += 1
            path = path.with_stem(f"{path.stem.removesuffix(f'-{number - 1}')}-{number}")
        taken.add(path)
        record.check_writable(path, force=force)
        planned.append(Planned(spec, path))
    for path in files_beside(output):
        record.check_writable(path, force=force)
    return planned


def files_beside(output: Path) -> tuple[Path, Path]:
    """(summary, report): what a comparison writes beside the results."""
    stem = output.with_suffix("")
    return stem.with_suffix(".json"), stem.with_suffix(".html")


def choose_prompts(specs: Sequence[RunSpec], source: PromptSource) -> PromptSet:
    """One list for all runs; a tokenizer of any of them measures lengths."""
    first = specs[0]
    tokenizer = None
    for spec in specs:
        tokenizer = Renderer.of(spec).tokenizer
        if tokenizer is not None:
            break
    count: int | None = first.load.num_prompts or None
    if first.load.open_loop:
        count = len(schedule(first.load, first.sampling.seed))
    return load_prompts(source, count=count, seed=first.sampling.seed, tokenizer=tokenizer)


def run_all(
    planned: Sequence[Planned], prompts: PromptSet, *, force: bool, quiet: bool, tell: Tell
) -> tuple[list[RunResult], list[str], list[tuple[str, str]]]:
    """Every run in a process of its own: (results, their files, runs that could not be made, and why)."""
    results, paths, not_run = [], [], []
    for number, item in enumerate(planned, start=1):
        tell(f"run {number} of {len(planned)}: {item.spec.label}")
        job = {
            "kind": "run",
            "spec": item.spec,
            "prompts": prompts,
            "path": item.path,
            "force": force,
            "quiet": quiet,
        }
        why = _in_process(job)
        if why is not None:
            tell(f"{item.spec.label} was not measured: {why}")
            not_run.append((item.spec.label, why))
            continue
        results.append(record.load(item.path))
        paths.append(str(item.path))
    return results, paths, not_run


def compare_results(
    results: Sequence[RunResult],
    *,
    baseline: RunResult | None = None,
    prompts: PromptSet | None = None,
    spec: RunSpec | None = None,
    tell: Tell = lambda text: None,
) -> list[Comparison]:
    """Every result's outputs against the baseline's, or the first one's.

    With `prompts` and the `spec` of a run that Octavo can do itself, the model measures the logit gap of the
    first differences.
    """
    comparisons = compare_runs(name_runs(results, baseline))
    differences = [d for comparison in comparisons for d in comparison.differences if d.unit == "tokens"]
    wanted = [d for d in differences if d.expected is not None and d.found is not None]
    if wanted and prompts is not None and spec is not None:
        tell(f"asking the model about {min(len(wanted), MOST_GAPS)} places where outputs part")
        reference = baseline if baseline is not None else results[0]
        _measure_gaps(wanted[:MOST_GAPS], reference, prompts, spec)
    return comparisons


def write_comparison(
    outcome: Outcome, output: Path, *, force: bool, title: str = "Octavo comparison"
) -> Path:
    """The summary (JSON) and the report (HTML) beside the results; returns the report's path."""
    summary_path, report_path = files_beside(output)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "results": outcome.paths,
        "not_run": [{"run": label, "reason": why} for label, why in outcome.not_run],
        "runs": [_figures(run.label, run.result) for run in name_runs(outcome.results, outcome.baseline)],
        "comparisons": as_json(outcome.comparisons),
    }
    for path in (summary_path, report_path):
        record.check_writable(path, force=force)
    text = json.dumps(record.rounded(summary), ensure_ascii=False, allow_nan=False, indent=1)
    record.write_whole(summary_path, text + "\n")
    return write_report(
        outcome.results,
        report_path,
        baseline=outcome.baseline,
        comparisons=outcome.comparisons,
        not_run=outcome.not_run,
        title=title,
        sources=outcome.paths,
    )


# ---------------------------------------------------------------------- inside


def _figures(label: str, result: RunResult) -> dict[str, Any]:
    """The figures that a program wants first."""
    names = ("total_requests", "failed_requests", "overall_throughput", "avg_ttft", "avg_latency",
             "avg_acceptance_rate", "mean_acceptance_length")  # fmt: skip
    figures = {name: result.summary.get(name) for name in names}
    return {"run": label, **figures, "joules_per_token": result.gpu_monitoring.get("joules_per_token")}


def _in_process(job: dict[str, Any]) -> str | None:
    """Do a job in a fresh interpreter; why it failed, or None. What it prints goes where ours goes."""
    with tempfile.TemporaryDirectory(prefix="octavo-compare-") as folder:
        answer = Path(folder) / "answer.json"
        task = Path(folder) / "job.pickle"
        task.write_bytes(pickle.dumps({**job, "answer": answer}))
        child = subprocess.Popen([sys.executable, "-m", "octavo.bench.compare_child", str(task)])
        try:
            code = child.wait()
        except BaseException:  # Ctrl-C reaches the child as well; it must be gone before we are
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=20)
            child.kill()
            child.wait()
            raise
        try:
            told = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"its process ended with code {code} and left no answer"
    if told.get("error") is not None:
        return str(told["error"])
    job["told"] = told
    return None


def _measure_gaps(
    differences: Sequence[Difference], reference: RunResult, prompts: PromptSet, spec: RunSpec
) -> None:
    """Fill in `logit_gap`, or why there is none."""
    texts = {prompt.prompt_id: prompt for prompt in prompts}
    answers = {each.prompt_id: each.output_token_ids or [] for each in reversed(reference.requests)}
    renderer = Renderer.of(spec)
    asked, places = [], []
    for difference in differences:
        prompt = texts.get(difference.prompt_id)
        if prompt is None:
            difference.gap_reason = "the prompt is not in this run's list"
            continue
        request = renderer.requests(spec, [prompt], None)[0][0]
        before = [*(request.prompt_token_ids or ()), *answers[difference.prompt_id][: difference.position]]
        places.append((before, difference.expected, difference.found))
        asked.append(difference)
    job: dict[str, Any] = {"kind": "gaps", "spec": spec, "places": places}
    why = _in_process(job) if places else None
    if why is not None:
        for difference in asked:
            difference.gap_reason = f"not measured: {why}"
        return
    for difference, gap in zip(asked, job.get("told", {}).get("gaps", []), strict=True):
        difference.logit_gap = gap
        difference.gap_reason = None if gap is not None else "the text is too long to ask again"


def gap_spec(specs: Sequence[RunSpec]) -> RunSpec | None:
    """A run whose model Octavo can load to measure gaps, without speculation; None for URLs alone."""
    for spec in specs:
        if spec.engine != "url":
            return dataclasses.replace(spec, engine="octavo", method="target_ar", served=False)
    return None
