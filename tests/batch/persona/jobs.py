"""Whole persona jobs for tests: a model of a few thousand random weights, or none at all."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from octavo.batch.persona.data import Scenario, read_scenario
from octavo.batch.persona.datasets import ablation_named, dataset_named
from octavo.batch.persona.engines import OctavoEngine, PersonaEngine
from octavo.batch.persona.job import PersonaOptions
from octavo.batch.persona.run import Outcome, run_persona
from octavo.batch.persona.summary import TIMING_KEYS
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.tokenizer import Tokenizer
from octavo.sampling_params import SamplingParams
from tests.batch.fakes import FakeWorkers
from tests.checkpoints import make_checkpoint

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "persona"


def small_model(folder: Path) -> Path:
    """Knows English badly: random weights, a byte for a token, a chat template."""
    return make_checkpoint(folder, tokenizer=True, vocab_size=320, max_position_embeddings=4096)


def options(model: Path, output: Path, **changes: Any) -> PersonaOptions:
    """A small job over an example; `dataset`, `ablation` by name, sampling by field."""
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
    sampling |= {"max_tokens": 8, "ignore_eos": True}
    sampling.update({name: changes.pop(name) for name in list(changes) if name in sampling})
    given: dict[str, Any] = {
        "checkpoint": str(model),
        "dataset": dataset_named(changes.pop("dataset", "Chameleons")),
        "ablation": ablation_named(changes.pop("ablation", "context_only")),
        "output": output,
        "params": SamplingParams(**sampling),
        "engine_kwargs": {"kv_cache_memory": "16MB", "device": "cpu", "dtype": "float32"},
        "quiet": True,
    }
    return PersonaOptions(**{**given, **changes})


def example(name: str = "Chameleons") -> Scenario:
    return read_scenario(EXAMPLES / name)


def fake_engine(model: Path, job: PersonaOptions, **workers: Any) -> PersonaEngine:
    """An engine whose answers depend on prompt and seed alone, and cost nothing."""
    tokenizer = Tokenizer.from_folder(model)
    assert tokenizer is not None
    workers = {"max_model_len": 4096, **workers}
    return OctavoEngine(
        FakeWorkers(tokenizer=tokenizer, template=ChatTemplate.for_tokenizer(tokenizer), **workers), job
    )


def run_fake(model: Path, job: PersonaOptions, scenario: Scenario | None = None, **workers: Any) -> Outcome:
    """One run of a job without a model."""

    async def load(with_length: PersonaOptions, path: Path) -> PersonaEngine:
        return fake_engine(model, with_length, **workers)

    return asyncio.run(run_persona(job, scenario or example(), load=load))


def files_of(folder: Path) -> dict[str, Any]:
    """All that a job leaves, without times and without the journal, whose lines come as they finish."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("samples.jsonl"):
            continue
        if path.name == "inference_summary.json":
            summary = json.loads(path.read_text(encoding="utf-8"))
            found[path.name] = {key: value for key, value in summary.items() if key not in TIMING_KEYS}
        else:
            found[path.name] = path.read_bytes()
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """Every generated sample of every user file."""
    names = [path for path in sorted(folder.glob("*.json")) if path.name.startswith(("c-", "d-", "r-", "u"))]
    return [sample for path in names for sample in read(path)["generated_samples"]]
