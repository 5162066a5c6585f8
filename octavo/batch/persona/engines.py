"""The two engines a persona job can be done by, behind one face.

Each says what it really is (`facts`), how its prompts are made (`prompt_maker`), and makes all samples
that are missing (`samples`), in whatever order they end.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from octavo import __version__, hub, platform
from octavo.batch.persona.baseline import Baseline, BaselineSettings, Row
from octavo.batch.persona.fitting import PromptMaker
from octavo.batch.persona.job import PersonaOptions, Sample
from octavo.batch.persona.summary import EngineFacts
from octavo.batch.work import Workers, WorkItem, run_items
from octavo.batch.workers import open_workers
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import ConfigError
from octavo.models.config import ModelConfig
from octavo.outputs import RequestOutput

# What the transformers engine makes of the engine's options; any other one would do nothing there.
BASELINE_OPTIONS = frozenset(
    {"model", "dtype", "max_model_len", "device", "tokenizer", "trust_remote_code", "chat_template"}
)


@dataclass(frozen=True, slots=True)
class Ended:
    """One sample that has ended, well or not."""

    sample: Sample
    output: RequestOutput | None
    error: str | None
    num_dropped: int
    num_tokens: int


class SampleSource(Protocol):
    """Where an engine gets its work from."""

    def rows(self, maker: PromptMaker, *, only_missing: bool) -> Iterator[Row]:
        """Samples with their prompts, in the job's order."""
        ...

    def batches(self, maker: PromptMaker, size: int) -> Iterator[list[Row]]:
        """Fixed groups of them, each with something missing."""
        ...

    def failed_at_once(self) -> list[Ended]:
        """Samples that `rows` could make no prompt for, since the last call."""
        ...


class PersonaEngine(Protocol):
    """Whoever makes the samples of a job."""

    def facts(self) -> EngineFacts:
        """What the engine turned out to be."""
        ...

    def prompt_maker(self, options: PersonaOptions) -> PromptMaker:
        """Makes prompts that fit its context."""
        ...

    def samples(
        self, source: SampleSource, maker: PromptMaker, stop: asyncio.Event
    ) -> AsyncGenerator[Ended, None]:
        """All that is missing, as it ends."""
        ...

    async def close(self) -> None:
        """Free the model."""
        ...


class TextWorkers(Workers, Protocol):
    """Workers that know how texts become token ids; `open_workers` makes such."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None


class OctavoEngine:
    """The engine of this package, in this process or as replicas."""

    def __init__(self, workers: TextWorkers, options: PersonaOptions) -> None:
        self._workers = workers
        self._options = options

    def facts(self) -> EngineFacts:
        """What the engine turned out to be."""
        info = self._workers.info
        device = platform.detect(self._options.engine_kwargs.get("device") or "auto").device
        settings = {
            "version": __version__,
            "dtype": info.dtype,
            "device": device,
            "max_model_len": info.max_model_len,
            "max_num_seqs": info.max_num_seqs,
            "num_replicas": info.num_replicas,
            "speculative_method": info.speculative_method,
        }
        has_template = self._workers.template is not None and bool(self._workers.template.sources)
        return EngineFacts(
            settings, device, info.num_replicas if device == "cuda" else 0, has_template, list(info.notes)
        )

    def prompt_maker(self, options: PersonaOptions) -> PromptMaker:
        """Prompts for this engine's context."""
        return make_prompt_maker(
            options, self._workers.tokenizer, self._workers.template, self._workers.info.max_model_len
        )

    async def samples(
        self, source: SampleSource, maker: PromptMaker, stop: asyncio.Event
    ) -> AsyncGenerator[Ended, None]:
        """All missing samples, as they end. The samples of an item follow one another, so that they
        share the blocks of its prompt."""
        params = self._options.params

        def items() -> Iterator[WorkItem]:
            for row in source.rows(maker, only_missing=True):
                sample = row.sample
                yield WorkItem(
                    sample.key,
                    row.token_ids,
                    params.replace(seed=sample.seed),
                    group=sample.group,
                    tag=row,
                )

        async for result in run_items(self._workers, items(), stop=stop):
            row: Row = result.item.tag
            error = None if result.error is None else str(result.error)
            yield Ended(row.sample, result.output, error, row.num_dropped, result.num_tokens)
            for ended in source.failed_at_once():
                yield ended
        for ended in source.failed_at_once():
            yield ended

    async def close(self) -> None:
        """Free the model."""
        await self._workers.close()


class TransformersEngine:
    """transformers, as baseline."""

    def __init__(
        self,
        baseline: Baseline,
        options: PersonaOptions,
        facts: EngineFacts,
        tokenizer: Tokenizer,
        template: ChatTemplate,
    ) -> None:
        self._baseline = baseline
        self._options = options
        self._facts = facts
        self._tokenizer = tokenizer
        self._template = template

    def facts(self) -> EngineFacts:
        """What the engine turned out to be."""
        return self._facts

    def prompt_maker(self, options: PersonaOptions) -> PromptMaker:
        """Prompts for the same context that Octavo would have."""
        return make_prompt_maker(
            options, self._tokenizer, self._template, options.engine_kwargs["max_model_len"]
        )

    async def samples(
        self, source: SampleSource, maker: PromptMaker, stop: asyncio.Event
    ) -> AsyncGenerator[Ended, None]:
        """All missing samples, batch by batch."""
        batches = source.batches(maker, self._options.batch_size)
        async for done in self._baseline.run(batches, self._options.params, stop):
            for at, row in enumerate(done.rows):
                output = done.outputs[at] if done.error is None else None
                num_tokens = 0 if output is None else len(output.outputs[0].token_ids)
                yield Ended(row.sample, output, done.error, row.num_dropped, num_tokens)
            for ended in source.failed_at_once():
                yield ended
        for ended in source.failed_at_once():
            yield ended

    async def close(self) -> None:
        """Free the model."""
        await asyncio.to_thread(self._baseline.close)


def make_prompt_maker(
    options: PersonaOptions, tokenizer: Tokenizer | None, template: ChatTemplate | None, max_model_len: int
) -> PromptMaker:
    """Prompts that leave room for an answer. Raises ConfigError for a model without a tokenizer."""
    if tokenizer is None:
        raise ConfigError(
            f"{options.checkpoint} has no tokenizer, which prompts are made with; name one with --tokenizer"
        )
    assert options.params.max_tokens is not None
    return PromptMaker(
        options.dataset, options.ablation, tokenizer, template, max_model_len - options.params.max_tokens
    )


async def open_engine(options: PersonaOptions, model_path: Path) -> PersonaEngine:
    """Load the engine that the options name. Raises what loading a model does."""
    if options.engine == "transformers":
        return await asyncio.to_thread(_open_transformers, options, model_path)
    kwargs = {"model": options.checkpoint, **options.engine_kwargs}
    return OctavoEngine(await open_workers(kwargs, data_parallel_size=options.num_replicas), options)


def _open_transformers(options: PersonaOptions, model_path: Path) -> TransformersEngine:
    kwargs = options.engine_kwargs
    machine = platform.detect(kwargs.get("device") or "auto")
    if machine.device == "cuda" and options.num_replicas > len(machine.gpus):
        raise ConfigError(
            f"--data-parallel-size {options.num_replicas} needs a GPU each, and this machine shows "
            f"{len(machine.gpus)}"
        )
    place = hub.resolve_tokenizer(kwargs["tokenizer"]) if kwargs.get("tokenizer") else model_path
    tokenizer = Tokenizer.from_folder(place, bool(kwargs.get("trust_remote_code")))
    if tokenizer is None:
        raise ConfigError(f"{place} has no tokenizer, which prompts are made with; name one with --tokenizer")
    config = ModelConfig.from_folder(model_path)
    eos = config.eos_token_ids
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos:
        eos += (tokenizer.eos_token_id,)
    asked = kwargs.get("dtype") or "bfloat16"
    dtype = {"auto": config.dtype, "half": "float16"}.get(asked, asked)
    settings = BaselineSettings(
        str(model_path),
        dtype,
        machine.device,
        max(1, machine.threads // options.num_replicas),
        tuple(eos),
        bool(kwargs.get("trust_remote_code")),
    )
    ignored = sorted(set(kwargs) - BASELINE_OPTIONS)
    warnings = [f"--engine transformers makes no use of {', '.join(ignored)}"] if ignored else []
    baseline = Baseline.open(settings, tokenizer, options.num_replicas)
    template = ChatTemplate.for_tokenizer(tokenizer, kwargs.get("chat_template"))
    facts = EngineFacts(
        {
            "version": importlib.metadata.version("transformers"),
            "dtype": dtype,
            "device": machine.device,
            "max_model_len": kwargs["max_model_len"],
            "batch_size": options.batch_size,
            "num_replicas": options.num_replicas,
        },
        machine.device,
        options.num_replicas if machine.device == "cuda" else 0,
        bool(template.sources),
        warnings,
    )
    return TransformersEngine(baseline, options, facts, tokenizer, template)


def check_engine_options(options: PersonaOptions) -> None:
    """Refuse what the engine that was chosen cannot do, before anything is read."""
    if options.engine == "octavo" and options.batch_size != 1:
        raise ConfigError("--batch-size is for --engine transformers; octavo fills its batches by itself")
    if options.engine == "transformers" and (options.engine_kwargs.get("tensor_parallel_size") or 1) != 1:
        raise ConfigError(
            "--engine transformers keeps a whole model on each device; use --data-parallel-size instead of "
            "--tensor-parallel-size"
        )
    if options.engine == "transformers" and options.engine_kwargs.get("speculative") is not None:
        raise ConfigError("--engine transformers is the baseline without speculation")
    if options.engine == "transformers" and options.engine_kwargs.get("quantization") is not None:
        raise ConfigError(
            "--engine transformers finds out about quantisation by itself; leave --quantization out"
        )
