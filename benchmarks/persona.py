"""`octavo batch persona` against the same job through transformers, on this machine's processor.

    python benchmarks/persona.py [--model smollm2] [--items 200] [--loop-items 10] [--static-items 40]
                                 [--output FILE.json] [--keep FOLDER]

Three times the same command, `octavo batch persona`, in a process of its own each: with Octavo for all
items, with transformers' generate() one request at a time for the first few, and in static batches of 16
for some more. 5 samples an item, 64 tokens each (--ignore-eos), temperature 1.0, top-p 0.9, top-k 50,
bfloat16, all cores. The scenario is the example Chameleons dealt out to as many items as asked for
(benchmarks/persona_scenario.py). What is compared is samples per second once the model is loaded, as each
run's inference_summary.json has it. Beside it stands how many cores anything else kept busy meanwhile:
above 0.1 a figure is disturbed.

The exit code is 1 unless Octavo makes at least --goal-loop times the loop's and --goal-static times the
batches' samples per second.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only this folder is on the path

from benchmarks.children import clean_environment, run_child  # noqa: E402
from benchmarks.persona_scenario import make_scenario  # noqa: E402

EXAMPLE = ROOT / "examples" / "persona" / "Chameleons"
STATIC_BATCH = 16
DISTURBED = 0.1  # cores


@dataclass(frozen=True)
class Run:
    """One way to do the job."""

    name: str
    items: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What a run's own summary says, and what was beside it."""

    name: str
    items: int
    samples: int
    seconds: float
    samples_per_second: float
    tokens_per_second: float
    load_seconds: float
    peak_mb: float
    foreign_cores: float | None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="smollm2", help="folder, hub id or alias")
    parser.add_argument("--items", type=int, default=200, help="for Octavo")
    parser.add_argument("--loop-items", type=int, default=10, help="for transformers' loop; 0 leaves it out")
    parser.add_argument("--static-items", type=int, default=40, help="for its static batches; 0: none")
    parser.add_argument("--samples", type=int, default=5, help="of an item")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a sample, all of them made")
    parser.add_argument("--ablation", default="profile_and_history_and_context")
    parser.add_argument("--goal-loop", type=float, default=25.0)
    parser.add_argument("--goal-static", type=float, default=4.0)
    parser.add_argument("--octavo-flags", default="", help="more flags for Octavo's run")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--keep", type=Path, help="leave the output folders of the runs here")
    return parser.parse_args(arguments)


def measure(run: Run, options: argparse.Namespace, scenario: Path, folder: Path) -> Measured:
    """One run in a process of its own."""
    output = folder / run.name.replace(" ", "-")
    command = [
        "octavo", "batch", "persona", "--checkpoint-dir", options.model,
        "--dataset", "Chameleons", "--scenario-path", str(scenario), "--ablation-config", options.ablation,
        "--output-dir", str(output), "--num-samples", str(options.samples),
        "--max-tokens", str(options.max_tokens), "--ignore-eos", "--max-model-len", "2048",
        "--max-items", str(run.items), "--overwrite", *run.flags,
    ]  # fmt: skip
    # The command says nothing on stdout, which run_child waits for.
    script = f"import sys; from octavo.cli.main import run; sys.argv = {command!r}; print(flush=True); run()"
    finished = run_child([sys.executable, "-c", script], ROOT, clean_environment(ROOT))
    summary: dict[str, Any] = json.loads((output / "inference_summary.json").read_text(encoding="utf-8"))
    expected = summary["total_samples"] * options.max_tokens
    if summary["failed_samples"] or summary["generated_tokens"] != expected:
        raise SystemExit(f"{run.name}: {summary['generated_tokens']} of {expected} tokens were made")
    return Measured(
        run.name,
        run.items,
        summary["total_samples"],
        summary["inference_time_seconds"],
        summary["throughput_samples_per_sec"],
        summary["generated_tokens_per_sec"],
        summary["load_time_seconds"],
        finished.peak_bytes / 1e6,
        finished.foreign_cores,
    )


def table(results: Sequence[Measured]) -> str:
    """The runs, one a line, with the ratio of the first to each."""
    lines = [
        f"{'':24}{'items':>7}{'samples':>9}{'s':>9}{'samples/s':>11}{'tok/s':>9}{'load s':>8}"
        f"{'peak MB':>9}{'others':>8}{'octavo is':>11}"
    ]
    for each in results:
        others = "?" if each.foreign_cores is None else f"{each.foreign_cores:.2f}"
        star = "*" if each.foreign_cores is not None and each.foreign_cores > DISTURBED else ""
        ratio = results[0].samples_per_second / each.samples_per_second
        lines.append(
            f"{each.name:24}{each.items:>7}{each.samples:>9}{each.seconds:>9.1f}"
            f"{each.samples_per_second:>11.3f}{each.tokens_per_second:>9.1f}{each.load_seconds:>8.1f}"
            f"{each.peak_mb:>9.0f}{others + star:>8}{ratio:>10.1f}x"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, compare with the goals."""
    options = parse(arguments)
    runs = [Run("octavo", options.items, tuple(options.octavo_flags.split()))]
    goals = {}
    if options.static_items:
        name = f"transformers batch {STATIC_BATCH}"
        flags = ("--engine", "transformers", "--batch-size", str(STATIC_BATCH))
        runs.append(Run(name, options.static_items, flags))
        goals[name] = options.goal_static
    if options.loop_items:
        runs.append(Run("transformers loop", options.loop_items, ("--engine", "transformers")))
        goals["transformers loop"] = options.goal_loop
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        scenario = folder / "scenario"
        make_scenario(scenario, max(run.items for run in runs), EXAMPLE)
        results = []
        for run in runs:
            print(f"{run.name}: {run.items} items", file=sys.stderr, flush=True)
            results.append(measure(run, options, scenario, folder))
    print(table(results))
    missed = False
    for each in results[1:]:
        ratio = results[0].samples_per_second / each.samples_per_second
        missed |= ratio < goals[each.name]
        word = "met" if ratio >= goals[each.name] else "missed"
        print(f"goal: at least {goals[each.name]:g}x {each.name}: {ratio:.1f}x, {word}")
    if options.output:
        options.output.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
