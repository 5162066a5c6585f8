"""Does speculation pay here, and is the draft budget as good as the best fixed number of drafts?

    python -m benchmarks.speculation [free] [costly] [falling] [copy] [chat] [--model smollm2]
           [--batches 1,8,64] [--acceptances 0.2,0.5,0.8] [--repeat 5] [--output FILE.jsonl] [--quick]

    free      the predicted-output drafter follows the recorded plain output, each token replaced by
              another one at the wanted rate: drafts that cost nothing, at any acceptance
    costly    a random draft model whose pass takes about a sixth of the target's step, under
              synthetic acceptance
    falling   as free; the acceptance falls from 0.9 to 0.1 midway
    copy      prompt lookup where the answer is in the prompt, against an engine without a drafter
    chat      prompt lookup on free chat, against an engine without a drafter
    small     the same with a KV cache so small that plain decoding preempts

There are `batch` requests at a time, of different lengths, and several times as many in all: those that
speculation helps most make room for others, as in a server. Two engines do each piece of work, a quarter
of a second each in turn (`benchmarks.paired`); the ratio of their tokens a second is taken pair by pair.

In the first three both engines draft, one as the budget decides, the other a fixed number. A first round
finds the K that come near the best; these are then paired with auto. The budget is made anew for every
cell, with costs measured anew, and goes through one run before what is recorded; in `falling`, `copy`
and `chat` it is made anew for every run.

Prints one JSON line a cell: the median, lowest and highest of the paired ratios, the ratio while all
places were taken (without the last requests, when the batch empties), the share of the time that the
scheduler and the draft budget themselves took, and how many cores anything else kept busy. Above 0.1 a
cell is disturbed. `copy`, `chat` and `small` add what the times of the steps allow (`arithmetic`).
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.paired import Bench, Pairs, Run, engine
from benchmarks.speculation_texts import Texts, spoilt
from octavo import SamplingParams, hub
from octavo.attention.torch_backend import TorchBackend
from octavo.core.acceptance import MAX_DRAFTS
from octavo.core.cost_model import CostModel
from octavo.core.draft_budget import DraftBudget
from octavo.layers.ops import TorchOps
from octavo.models.config import ModelConfig
from octavo.models.registry import build_model
from octavo.speculation import cpu_lookup

FIXED = (0, 1, 2, 3, 4, 6, 8, 12, 16)
COSTLY_FIXED = (0, 1, 2, 3, 4, 6, 8)


def greedy(new_tokens: int, **more: Any) -> SamplingParams:
    """Always the same amount of work."""
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, **more)


def lengths(count: int, mean: int) -> list[int]:
    """Tokens of each request: from half of the mean to one and a half, in mixed order."""
    return [mean // 2 + (mean * ((7 * index) % count)) // max(1, count - 1) for index in range(count)]


def against_fixed(
    auto: Bench, other: Bench, prompts: Sequence[Any], params: Callable[[int | str], list[SamplingParams]],
    options: Any, counts: Sequence[int], fresh: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Auto against every fixed number: these once, then auto paired with the nearest ones in turn."""
    first = {count: other.run(prompts, params(count)).rate for count in counts}
    near = sorted(counts, key=first.__getitem__)[-options.near :]
    if 0 not in near:
        near.append(0)
    auto.forget()
    cold = auto.run(prompts, params("auto")).rate
    pairs = {count: Pairs() for count in near}

    def begin() -> Run:
        if fresh:
            auto.forget()
        return auto.begin(prompts, params("auto"))

    for number in range(options.repeat):
        for count in near if number % 2 == 0 else reversed(near):
            fixed = functools.partial(other.begin, prompts, params(count))
            pairs[count].add((auto, begin), (other, fixed))
    best = min(near, key=lambda count: pairs[count].ratio)
    return {
        "best": best,
        **pairs[best].record(),
        "to_each": {count: round(found.ratio, 3) for count, found in pairs.items()},
        "first_round": {
            **{str(count): round(rate, 1) for count, rate in first.items()},
            "auto": round(cold, 1),
        },
        "budget": "fresh" if fresh else "kept",
        "at_the_end": what_it_believes(auto.planner.budget, auto.parts.config.max_num_seqs),
    }


def what_it_believes(budget: DraftBudget, batch: int) -> dict[str, Any]:
    """The budget's own account: to see whether it was wrong, and about what, where it did not do best.

    `step_ms` are the times it expects of steps with 0, 1, … drafts a request, without KV.
    """
    report = budget.report
    return {
        "net_speedup": round(report.net_speedup, 3),
        "step_ms": [
            round(1e3 * budget.target.seconds(batch * (1 + count)), 2) for count in (0, 1, 2, 3, 4, 6)
        ],
        "window_error": round(report.window_error, 3),
        "windows": report.num_windows,
        "explored": report.num_explored,
        "bold": report.num_bold,
        "changes": report.num_changes,
        "speculating": round(report.num_speculating_steps / max(1, report.num_steps), 2),
    }


def free(model: Path, options: Any, falling: bool = False) -> Iterator[dict[str, Any]]:
    """Predicted outputs that are wrong at a known rate."""
    vocab_size = ModelConfig.from_folder(model).vocab_size
    # Greedy texts of a small model go in circles. A drafter that looks for its place in the prediction
    # would find right tokens at another one, and the acceptance would not be what was asked for.
    setattr(cpu_lookup, "MIN_MATCH", 1 << 30)  # noqa: B010
    for batch in options.batches:
        kind: dict[str, Any] = {"max_num_seqs": batch, "speculative": {"method": "predicted"}}
        with engine(model, **kind) as auto, engine(model, **kind) as other:
            prompts = Texts(auto.llm).plain(options.texts(batch))
            mean = options.falling_tokens if falling else options.new_tokens(batch)
            work = lengths(len(prompts), mean)
            first = [greedy(new, num_speculative_tokens=0) for new in work]
            plain = [o.outputs[0].token_ids for o in auto.llm.generate(prompts, first, use_tqdm=False)]
            for acceptance in (0.9,) if falling else options.acceptances:
                later = 0.1 if falling else acceptance
                predictions = []
                for seed, text in enumerate(plain):
                    half = len(text) // 2
                    wrong = [1.0 - acceptance] * half + [1.0 - later] * (len(text) - half)
                    predictions.append(spoilt(text, wrong, vocab_size, seed))

                def params(count: int | str, told: Any = predictions) -> list[SamplingParams]:
                    return [greedy(len(text), num_speculative_tokens=count, prediction=text) for text in told]

                yield {
                    "scenario": "falling" if falling else "free",
                    "batch": batch,
                    "acceptance": "0.9, then 0.1" if falling else acceptance,
                    **against_fixed(
                        auto, other, prompts, params, options, options.fixed or FIXED, fresh=falling
                    ),
                }


def falling(model: Path, options: Any) -> Iterator[dict[str, Any]]:
    """The acceptance changes midway."""
    return free(model, options, falling=True)


def costly(model: Path, options: Any) -> Iterator[dict[str, Any]]:
    """A draft model under synthetic acceptance."""
    with tempfile.TemporaryDirectory() as folder:
        draft = random_draft(Path(folder) / "draft", model)
        for batch in options.batches:
            for acceptance in options.acceptances:
                yield {"scenario": "costly", **costly_cell(model, draft, batch, acceptance, options)}


def costly_cell(model: Path, draft: Path, batch: int, acceptance: float, options: Any) -> dict[str, Any]:
    """One batch size and acceptance."""
    speculative = {
        "method": "draft_model",
        "model": str(draft),
        "synthetic_acceptance_rates": [acceptance],
        "draft_kv_share": 0.3,
    }
    kind: dict[str, Any] = {"max_num_seqs": batch, "speculative": speculative}
    with engine(model, **kind) as auto, engine(model, **kind) as other:
        prompts = Texts(auto.llm).plain(options.texts(batch))
        work = lengths(len(prompts), options.new_tokens(batch))

        def params(count: int | str) -> list[SamplingParams]:
            return [greedy(new, num_speculative_tokens=count) for new in work]

        found = against_fixed(auto, other, prompts, params, options, options.fixed or COSTLY_FIXED)
        budget = auto.planner.budget
        return {
            "batch": batch,
            "acceptance": acceptance,
            "step_ms": round(budget.target.seconds(batch) * 1e3, 2),
            "pass_ms": round(budget.draft.seconds(batch) * 1e3, 2),
            **found,
        }


def against_plain(
    model: Path, make: Callable[[Texts, int], list[list[int]]], options: Any, **kv: Any
) -> Iterator[dict[str, Any]]:
    """An engine with prompt lookup against one without a drafter."""
    for batch in options.batches:
        kv["max_num_seqs"] = batch
        lookup = {"method": "prompt_lookup"}
        with engine(model, **kv) as plain, engine(model, speculative=lookup, **kv) as auto:
            prompts = make(Texts(plain.llm), options.texts(batch))
            params = [greedy(new) for new in lengths(len(prompts), options.new_tokens(batch))]

            def drafting(bench: Bench = auto, work: Any = prompts, params: Any = params) -> Run:
                bench.forget()
                return bench.begin(work, params)

            def without(bench: Bench = plain, work: Any = prompts, params: Any = params) -> Run:
                return bench.begin(work, params)

            # One run of each fills the prefix caches.
            plain.run(prompts, params)
            auto.run(prompts, params)
            pairs = Pairs()
            for _ in range(options.repeat):
                pairs.add((auto, drafting), (plain, without))
            found = pairs.record()
            found["preemptions"] = max(run.preemptions for run in pairs.other)
            context = sum(map(len, prompts)) // len(prompts) + options.new_tokens(batch) // 2
            found["arithmetic"] = arithmetic(auto.planner.budget.target, batch, batch * context, found)
            yield {"batch": batch, **found}


def arithmetic(target: CostModel, batch: int, kv_tokens: int, found: dict[str, Any]) -> dict[str, Any]:
    """What the steps' times, as the budget knows them at the end, say that drafts can bring.

    `row_us` is what each row of the first draft adds. `most` is the ratio to plain decoding if every
    draft were right, at the best number of them, `as_drafted` the ratio with the drafts that were made
    and accepted, everything but the target's steps left out.
    """
    plain = target.seconds(batch, kv_tokens)

    def ratio(drafts: float, accepted: float) -> float:
        return (1.0 + accepted) * plain / target.seconds(batch * (1.0 + drafts), kv_tokens)

    most, count = max((ratio(count, count), count) for count in range(MAX_DRAFTS + 1))
    drafted = found["mean_drafts"]
    return {
        "plain_ms": round(1e3 * plain, 2),
        "row_us": round(1e6 * (target.seconds(2 * batch, kv_tokens) - plain) / batch),
        "most": round(most, 3),
        "most_at": count,
        "as_drafted": round(ratio(drafted, drafted * found["accepted_share"]), 3),
    }


def copy(model: Path, options: Any) -> Iterator[dict[str, Any]]:
    """The answer is in the prompt."""
    for line in against_plain(model, Texts.copy, options):
        yield {"scenario": "copy", **line}


def chat(model: Path, options: Any) -> Iterator[dict[str, Any]]:
    """Nothing to copy."""
    for line in against_plain(model, Texts.chat, options):
        yield {"scenario": "chat", **line}


def small(model: Path, options: Any) -> Iterator[dict[str, Any]]:
    """The same where plain decoding has too little memory."""
    for line in against_plain(
        model, Texts.chat, options, kv_cache_memory=options.small_kv, max_model_len=512
    ):
        yield {"scenario": "chat, small KV", **line}


def random_draft(folder: Path, target: Path) -> Path:
    """A checkpoint with the target's vocabulary and tokenizer, and random weights."""
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.update(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=320,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
    )
    config.pop("head_dim", None)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(target / "tokenizer.json", folder / "tokenizer.json")
    described = ModelConfig.from_folder(folder)
    empty = build_model(described, torch.bfloat16, torch.device("cpu"), TorchOps(), TorchBackend())
    generator = torch.Generator().manual_seed(0)
    tensors = {
        tensor.name: (0.05 * torch.randn(tensor.shape, generator=generator)).to(torch.bfloat16)
        for tensor in empty.checkpoint_tensors()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


SCENARIOS = {"free": free, "costly": costly, "falling": falling, "copy": copy, "chat": chat, "small": small}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", nargs="*", help=", ".join(SCENARIOS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--acceptances", type=lambda text: [float(n) for n in text.split(",")])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--near", type=int, default=3, help="fixed numbers that are repeated with auto")
    parser.add_argument("--fixed", type=lambda text: [int(n) for n in text.split(",")], help="only these K")
    parser.add_argument(
        "--tokens", type=int, help="new tokens of a request in the mean (default: 96, in large batches 64)"
    )
    parser.add_argument("--times", type=int, help="requests of a run, in batches (default: 3, alone 6)")
    parser.add_argument("--small-kv", default="40MB", help="KV cache of the chat that preempts")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny work: only shows that all runs")
    options = parser.parse_args()
    unknown = set(options.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    if options.quick:
        options.repeat, options.batches, options.tokens = 1, options.batches or [2], options.tokens or 8
    options.texts = lambda batch: batch if options.quick else batch * (options.times or max(3, 6 // batch))
    options.new_tokens = lambda batch: options.tokens or (96 if batch < 64 else 64)
    options.falling_tokens = options.tokens or 256  # both halves are long enough to be learned
    options.acceptances = options.acceptances or [0.2, 0.5, 0.8]
    model = hub.resolve(options.model)
    chosen_batches = options.batches
    for name in options.scenarios or list(SCENARIOS):
        usual = {"copy": [1, 16], "chat": [1, 4, 16, 64], "small": [16], "falling": [1, 8]}
        options.batches = chosen_batches or usual.get(name, [1, 8, 64])
        for line in SCENARIOS[name](model, options):
            text = json.dumps(line)
            print(text, flush=True)
            if options.output is not None:
                with options.output.open("a", encoding="utf-8") as stream:
                    stream.write(text + "\n")


if __name__ == "__main__":
    main()
