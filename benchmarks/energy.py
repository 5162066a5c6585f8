"""Joules a token of plain and speculative decoding on a GPU, by its own counter, through the workbench.

    python -m benchmarks.energy --output out
    python -m benchmarks.energy --target qwen3-8b --draft qwen3-0.6b --concurrency 1 16 --output out

Random weights, prompts of 512 token ids, 256 tokens each; drafts are accepted by coins with fixed rates, so
the texts mean nothing and are not compared. One result file a run and one report, in the folder --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_workloads import ACCEPTANCE, MODELS, model_folder
from octavo.bench.banner import outcome
from octavo.bench.options import parse_drafts
from octavo.bench.prompts import load_prompts, parse_source
from octavo.bench.record import RunResult, save
from octavo.bench.rendering import Renderer
from octavo.bench.report import write_report
from octavo.bench.runner import run
from octavo.bench.spec import LoadSpec, RunSpec, SamplingSpec

NOTICE = (
    "random weights; drafts are accepted by coins at fixed rates (synthetic_acceptance_rates), so speed and "
    "energy mean something and the texts do not"
)


@dataclasses.dataclass(frozen=True)
class SyntheticSpec(RunSpec):
    """A run whose drafts are accepted at the rates of ACCEPTANCE."""

    def octavo_kwargs(self) -> dict[str, Any]:
        """As any run's, with the rates: each the chance that a draft is accepted if all before it were."""
        kwargs = super().octavo_kwargs()
        if kwargs.get("speculative"):
            rates = [rate / before for rate, before in zip(ACCEPTANCE, (1.0, *ACCEPTANCE), strict=False)]
            kwargs["speculative"] = {**kwargs["speculative"], "synthetic_acceptance_rates": rates}
        return kwargs


def write_tokenizer(folder: Path) -> None:
    """One token a byte: the workbench needs a tokenizer, random weights do not care which."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def specs(target: Path, draft: Path, options: argparse.Namespace) -> list[SyntheticSpec]:
    """Plain and speculative at every concurrency."""
    longest = options.input_length + options.output_length + 32
    engine = {
        "load_format": "dummy", "device": options.device, "dtype": options.dtype, "max_model_len": longest,
        "gpu_memory_utilization": 0.85, "max_num_seqs": max(options.concurrency),
    }  # fmt: skip
    if options.device == "cpu":
        engine |= {"kv_cache_memory": "64MB"}
    made = []
    for concurrency in options.concurrency:
        load = LoadSpec("closed", concurrency=concurrency, num_prompts=options.rounds * concurrency)
        for method in ("target_ar", "speculative"):
            made.append(
                SyntheticSpec(
                    method=method, model=str(target), drafter=str(draft),
                    num_speculative_tokens=options.num_speculative_tokens,
                    engine_options=engine, warmup_requests=options.warmup, notices=(NOTICE,),
                    load=load,
                    sampling=SamplingSpec(max_tokens=options.output_length, ignore_eos=True),
                    monitor_interval=0.25,
                )
            )  # fmt: skip
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run everything; 1 if a request failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="qwen3-8b", choices=MODELS)
    parser.add_argument("--draft", default="qwen3-0.6b", choices=MODELS)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16])
    parser.add_argument("--rounds", type=int, default=10, help="requests for each one open at a time")
    parser.add_argument("--input-length", type=int, default=512)
    parser.add_argument("--output-length", type=int, default=256)
    parser.add_argument("--num-speculative-tokens", type=parse_drafts, default="auto", help="0-16 or auto")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=Path("energy"), help="folder of the results")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[RunResult] = []
    with tempfile.TemporaryDirectory() as parent:
        target, draft = (model_folder(name, Path(parent)) for name in (options.target, options.draft))
        for folder in (target, draft):
            write_tokenizer(folder)
        for spec in specs(target, draft, options):
            source = parse_source(f"synthetic:{options.input_length}")
            prompts = load_prompts(
                source,
                count=spec.load.num_prompts,
                seed=spec.sampling.seed,
                tokenizer=Renderer.of(spec).tokenizer,
            )
            result = run(spec, prompts)
            name = f"{options.target}_{spec.method}_c{spec.load.concurrency}.json"
            save(result, options.output / name, force=True)
            results.append(result)
            print("\n".join(outcome(result)), flush=True)
            figures = result.gpu_monitoring
            names = ("total_energy_all_gpus", "idle_power", "average_power", "peak_power", "joules_per_token",
                     "net_joules_per_token", "energy_source", "duration")  # fmt: skip
            print(json.dumps({"run": name, **{key: figures.get(key) for key in names}}), flush=True)
    write_report(
        results, options.output / "energy.html", comparisons=[], title="Energy of speculative decoding"
    )
    return max(result.exit_code for result in results)


if __name__ == "__main__":
    raise SystemExit(main())
