"""Does speculation pay here, and is the draft budget as good as the best fixed number of drafts?

    python -m benchmarks.speculation [free] [costly] [falling] [copy] [chat] [--model smollm2]
           [--batches 1,8,64] [--acceptances 0.2,0.5,0.8] [--repeat 5] [--output FILE.jsonl] [--quick]

    free      the predicted-output drafter follows the recorded plain output, each token replaced by
              another one at the wanted rate: drafts that cost nothing, at any acceptance
    costly    a random draft model whose pass takes about a sixth of the target's step, under
              synthetic acceptance
    falling   as free; the acceptance falls from 0.9 to 0.1 midway
    copy      prompt lookup where the answer is in the prompt, against an engine without a drafter
    chat      prompt lookup on free chat, against an engine without a drafter; also with a KV cache
              so small that plain decoding preempts

There are always `batch` requests at a time, and more of them than that: those that speculation helps
most make room for others, as in a server. In the first three, one engine serves auto and every fixed K
in turn, auto with a budget that has seen nothing yet. A first round finds the K that come near the best;
these and auto are then repeated, in alternating order, and compared pair by pair. In the last two, the
two engines take turns.

Prints one JSON line a cell: medians, the lowest and the highest of the paired ratios, the share of the
time that the scheduler and the draft budget themselves took, and how many cores anything else kept
busy. Above 0.1 a cell is disturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.engines.job import ForeignCores
from benchmarks.workloads import REWRITE, SENTENCES
from octavo import LLM, SamplingParams, hub
from octavo.attention.torch_backend import TorchBackend
from octavo.core.draft_planner import BudgetPlanner
from octavo.engine.setup import make_planner
from octavo.layers.ops import TorchOps
from octavo.models.config import ModelConfig
from octavo.models.registry import build_model

FIXED = (0, 1, 2, 3, 4, 6, 8, 12, 16)
COSTLY_FIXED = (0, 1, 2, 3, 4, 6, 8)
QUESTIONS = (
    "Tell me a short story about {}.",
    "What should I know before I buy {}?",
    "Explain {} to a child of eight.",
    "Write a letter to a friend who is afraid of {}.",
)
SUBJECTS = (
    "a lighthouse", "bread", "volcanoes", "old maps", "chess", "the moon", "a violin", "bees", "glass",
    "rivers in winter", "a night train", "clocks", "salt", "wild horses", "snow", "a stone bridge",
)  # fmt: skip


@dataclass
class Run:
    """One piece of work, done once."""

    tokens_s: float
    foreign_cores: float | None
    brain_share: float  # of the time: schedule, update
    mean_drafts: float  # verified, a request and step
    preemptions: int


@dataclass
class Bench:
    """An engine, and clocks around its scheduler."""

    llm: LLM
    _brain: float = 0.0

    def __post_init__(self) -> None:
        parts: Any = self.llm._engine_parts()
        self._parts = parts
        scheduler = parts.engine.scheduler
        for name in ("schedule", "update"):
            setattr(scheduler, name, self._timed(getattr(scheduler, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            found = call(*arguments)
            self._brain += time.perf_counter() - started
            return found

        return timed

    @property
    def planner(self) -> Any:
        """The scheduler's."""
        return self._parts.engine.scheduler.planner

    def forget(self) -> None:
        """A draft budget as after the start."""
        config, scheduler = self._parts.config, self._parts.engine.scheduler
        if isinstance(scheduler.planner, BudgetPlanner):
            runner = self._parts.engine.executor.runner
            scheduler.planner = make_planner(config, config.speculative, runner, self._parts.plan)

    def run(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Run:
        """Tokens a second over all of it."""
        stats = self._parts.engine.scheduler.stats
        preempted, self._brain = stats.num_preemptions, 0.0
        with ForeignCores() as watch:
            started = time.perf_counter()
            outputs = self.llm.generate(list(prompts), list(params), use_tqdm=False)
            seconds = time.perf_counter() - started
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        found = [o.metrics.speculation for o in outputs if o.metrics and o.metrics.speculation]
        steps = sum(m.num_steps for m in found)
        return Run(
            made / seconds,
            watch.cores,
            self._brain / seconds,
            sum(m.drafted for m in found) / steps if steps else 0.0,
            stats.num_preemptions - preempted,
        )


@dataclass
class Cell:
    """Several ways to do the same work, in turn."""

    ways: dict[str, Callable[[], Run]]
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def once(self, names: Sequence[str]) -> None:
        """Each of these ways once; every other time in reversed order."""
        number = max((len(runs) for runs in self.runs.values()), default=0)
        for name in names if number % 2 == 0 else reversed(names):
            self.runs.setdefault(name, []).append(self.ways[name]())

    def median(self, name: str) -> float:
        """Tokens a second."""
        return statistics.median(run.tokens_s for run in self.runs[name])

    def record(self, mine: str, other: str, rounds: int) -> dict[str, Any]:
        """The last `rounds` runs of two ways, compared pair by pair."""
        pairs = list(zip(self.runs[mine][-rounds:], self.runs[other][-rounds:], strict=True))
        ratios = sorted(a.tokens_s / b.tokens_s for a, b in pairs)
        foreign = [run.foreign_cores for pair in pairs for run in pair if run.foreign_cores is not None]
        return {
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3),
            "rounds": len(ratios),
            "tokens_s": {name: round(self.median(name), 1) for name in self.runs},
            "brain_share": round(statistics.median(a.brain_share for a, _ in pairs), 4),
            "mean_drafts": round(statistics.median(a.mean_drafts for a, _ in pairs), 2),
            "foreign_cores": round(statistics.median(foreign), 3) if foreign else None,
        }


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Bench]:
    """A running engine, shut down at the end."""
    options = {"max_model_len": 1024, "max_num_seqs": 64, "kv_cache_memory": "768MB", **options}
    with LLM(str(model), **options) as llm:
        yield Bench(llm)


class Texts:
    """Prompts as token ids, made from the model's own tokenizer and fixed seeds."""

    def __init__(self, llm: LLM) -> None:
        parts: Any = llm._engine_parts()
        self._tokenizer = parts.engine.tokenizer
        self._template = parts.chat_template(None)

    def plain(self, count: int, length: int = 32) -> list[list[int]]:
        """Different ordinary texts of `length` tokens."""
        found = []
        for index in range(count):
            rng = random.Random(index)
            text = f"{rng.randrange(10**6):06}. " + " ".join(rng.sample(SENTENCES, len(SENTENCES)))
            found.append(self._tokenizer.encode(text, add_special_tokens=False)[:length])
        return found

    def chat(self, count: int) -> list[list[int]]:
        """Questions with nothing to copy."""
        pairs = [(question, subject) for subject in SUBJECTS for question in QUESTIONS]
        found = []
        for index in range(count):
            question, subject = pairs[index % len(pairs)]
            again = f" Think of the year {1900 + index}." if index >= len(pairs) else ""
            found.append(self._turn(question.format(subject) + again))
        return found

    def copy(self, count: int) -> list[list[int]]:
        """Ten sentences to be written again with one name changed."""
        texts = (" ".join(random.Random(index).sample(SENTENCES, 10)) for index in range(count))
        return [self._turn(REWRITE + text) for text in texts]

    def _turn(self, text: str) -> list[int]:
        rendered = self._template.render([{"role": "user", "content": text}])
        found: list[int] = self._tokenizer.encode(rendered, add_special_tokens=False)
        return found


def spoilt(tokens: Sequence[int], wrong: Sequence[float], vocab_size: int, seed: int) -> list[int]:
    """The tokens, number i replaced by another one with probability wrong[i]."""
    rng = random.Random(seed)
    return [
        rng.randrange(vocab_size) if rng.random() < chance else token
        for token, chance in zip(tokens, wrong, strict=True)
    ]


def greedy(new_tokens: int, **more: Any) -> SamplingParams:
    """Always the same amount of work."""
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, **more)


def against_fixed(
    bench: Bench, prompts: Sequence[Any], params: Callable[[int | str], list[SamplingParams]],
    options: Any, counts: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Auto against every fixed number: all once, then auto and the nearest ones in turn."""

    def way(count: int | str) -> Callable[[], Run]:
        def run() -> Run:
            bench.forget()
            return bench.run(prompts, params(count))

        return run

    cell = Cell({f"K={count}": way(count) for count in counts} | {"auto": way("auto")})
    fixed = [f"K={count}" for count in counts]
    cell.once([*fixed, "auto"])
    near = sorted(fixed, key=cell.median)[-options.near :]
    for _ in range(options.repeat):
        cell.once(["auto", *near])
    best = max(near, key=cell.median)
    return {
        "best": best,
        **cell.record("auto", best, options.repeat),
        "to_plain": round(cell.median("auto") / cell.median(f"K={counts[0]}"), 3),
    }


def free(model: Path, options: Any, falling: bool = False) -> Iterator[dict[str, Any]]:
    """Predicted outputs that are wrong at a known rate."""
    vocab_size = ModelConfig.from_folder(model).vocab_size
    for batch in options.batches:
        with engine(model, max_num_seqs=batch, speculative={"method": "predicted"}) as bench:
            new = options.new_tokens(batch)
            prompts = Texts(bench.llm).plain(options.texts(batch))
            first = greedy(new, num_speculative_tokens=0)
            plain = [o.outputs[0].token_ids for o in bench.llm.generate(prompts, first, use_tqdm=False)]
            for acceptance in (0.9,) if falling else options.acceptances:
                later = 0.1 if falling else acceptance
                wrong = [1.0 - acceptance] * (new // 2) + [1.0 - later] * (new - new // 2)
                predictions = [spoilt(text, wrong, vocab_size, seed) for seed, text in enumerate(plain)]

                def params(count: int | str, new: int = new, told: Any = predictions) -> list[SamplingParams]:
                    return [greedy(new, num_speculative_tokens=count, prediction=text) for text in told]

                yield {
                    "scenario": "falling" if falling else "free",
                    "batch": batch,
                    "acceptance": "0.9, then 0.1" if falling else acceptance,
                    **against_fixed(bench, prompts, params, options, options.fixed or FIXED),
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
    with engine(model, max_num_seqs=batch, speculative=speculative) as bench:
        prompts, new = Texts(bench.llm).plain(options.texts(batch)), options.new_tokens(batch)

        def params(count: int | str) -> list[SamplingParams]:
            return [greedy(new, num_speculative_tokens=count)] * len(prompts)

        found = against_fixed(bench, prompts, params, options, options.fixed or COSTLY_FIXED)
        budget = bench.planner.budget
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
            params = [greedy(options.new_tokens(batch))] * len(prompts)

            def drafting(bench: Bench = auto, work: Any = prompts, params: Any = params) -> Run:
                bench.forget()
                return bench.run(work, params)

            def without(bench: Bench = plain, work: Any = prompts, params: Any = params) -> Run:
                return bench.run(work, params)

            cell = Cell({"plain": without, "auto": drafting})
            for _ in range(1 + options.repeat):  # the first round fills the prefix caches
                cell.once(["plain", "auto"])
            preemptions = max(run.preemptions for run in cell.runs["plain"])
            yield {
                "batch": batch,
                **cell.record("auto", "plain", options.repeat),
                "preemptions": preemptions,
            }


def copy(model: Path, options: Any) -> Iterator[dict[str, Any]]:
    """The answer is in the prompt."""
    for line in against_plain(model, Texts.copy, options):
        yield {"scenario": "copy", **line}


def chat(model: Path, options: Any) -> Iterator[dict[str, Any]]:
    """Nothing to copy; and the same where plain decoding has too little memory."""
    for line in against_plain(model, Texts.chat, options):
        yield {"scenario": "chat", **line}
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


SCENARIOS = {"free": free, "costly": costly, "falling": falling, "copy": copy, "chat": chat}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", nargs="*", help=", ".join(SCENARIOS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--acceptances", type=lambda text: [float(n) for n in text.split(",")])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--near", type=int, default=4, help="fixed numbers that are repeated with auto")
    parser.add_argument("--fixed", type=lambda text: [int(n) for n in text.split(",")], help="only these K")
    parser.add_argument(
        "--tokens", type=int, help="new tokens of each request (default: 128, in large batches 96)"
    )
    parser.add_argument("--small-kv", default="40MB", help="KV cache of the chat that preempts")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny work: only shows that all runs")
    options = parser.parse_args()
    unknown = set(options.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    if options.quick:
        options.repeat, options.batches, options.tokens = 1, options.batches or [2], options.tokens or 8
    options.texts = lambda batch: batch if options.quick else batch * max(2, 8 // batch)
    options.new_tokens = lambda batch: options.tokens or (128 if batch < 16 else 96)
    options.acceptances = options.acceptances or [0.2, 0.5, 0.8]
    model = hub.resolve(options.model)
    chosen_batches = options.batches
    for name in options.scenarios or list(SCENARIOS):
        usual = {"copy": [1, 16], "chat": [1, 4, 16, 64], "falling": [1, 8]}
        options.batches = chosen_batches or usual.get(name, [1, 8, 64])
        for line in SCENARIOS[name](model, options):
            text = json.dumps(line)
            print(text, flush=True)
            if options.output is not None:
                with options.output.open("a", encoding="utf-8") as stream:
                    stream.write(text + "\n")


if __name__ == "__main__":
    main()
