"""From options to a running engine: resolve, plan, load.

    EngineArgs --resolve--> EngineConfig --plan--> MemoryPlan --build--> EngineParts

Everything that can be refused is refused in the first two steps, before weights are read.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo import hub, platform
from octavo.config import (
    ATTENTION_BACKENDS,
    CacheConfig,
    EngineArgs,
    EngineConfig,
    SchedulerConfig,
    SpeculativeConfig,
    check_attention_backend,
)
from octavo.core.cost_model import CostModel
from octavo.core.draft_budget import DraftBudget
from octavo.core.draft_kv import DraftKV
from octavo.core.draft_planner import BudgetPlanner
from octavo.core.scheduler import Scheduler
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.draft import resolve_draft
from octavo.engine.engine import Engine
from octavo.engine.grammar import GrammarCompiler
from octavo.engine.request_reader import EngineInfo
from octavo.engine.stats import StatsLog
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import CheckpointError, ConfigError, RequestError
from octavo.platform.byte_code import kept_byte_code
from octavo.platform.head_start import wait_for_digest
from octavo.sampling_params import SamplingParams
from octavo.speculation.suffix import SuffixGuesser, make_history
from octavo.worker.kv_cache import MemoryPlan

if TYPE_CHECKING:
    from octavo.worker.model_runner import ModelRunner

logger = logging.getLogger("octavo")

LoadObserver = Callable[[str, "float | None"], None]


@dataclass
class EngineParts:
    """A running engine and what its facades need beside it."""

    engine: Engine
    config: EngineConfig
    plan: MemoryPlan
    notes: tuple[str, ...] = ()  # what a user should know: slow paths taken, and why
    row_invariant: bool = False  # a row's bits do not depend on the other rows of its step
    _closed: bool = False
    _templates: dict[str | None, ChatTemplate] = field(default_factory=dict)  # compiled ones

    @property
    def model_path(self) -> Path:
        """The resolved model folder."""
        return self.config.model_path

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Sampling defaults from the model's generation_config."""
        return self.config.model.generation_defaults

    def chat_template(self, given: str | None) -> ChatTemplate:
        """The template to use: `given`, the engine's option, or the model's own."""
        if self.engine.tokenizer is None:
            raise RequestError(
                "chat needs a tokenizer, and this engine has none (skip_tokenizer_init is set, or the model "
                "folder holds no tokenizer: tokenizer=… names another one)",
                "messages",
            )
        wanted = given or self.config.args.chat_template
        if wanted not in self._templates:
            self._templates[wanted] = ChatTemplate.for_tokenizer(self.engine.tokenizer, wanted)
        return self._templates[wanted]

    def close(self) -> None:
        """Stop the engine and drop what it holds."""
        if not self._closed:
            self._closed = True
            self.engine.shutdown()
            del self.engine
            if self.config.platform.device == "cuda":
                from octavo.worker.gpu_build import release_memory

                release_memory()


def resolve(args: EngineArgs) -> EngineConfig:
    """Find the model, read its config, look at the machine, and settle every open option.

    Raises ConfigError, ModelNotFoundError, UnsupportedModelError or CheckpointError.
    """
    backend = _attention_backend(args.attention_backend)
    platform.prepare_environment()
    from octavo.models.config import ModelConfig

    machine = platform.detect(args.device)
    model_path = hub.resolve(args.model, trust_remote_code=args.trust_remote_code)
    tokenizer_path = model_path if args.tokenizer is None else hub.resolve_tokenizer(args.tokenizer)
    model = ModelConfig.from_folder(model_path)
    _check_generation_defaults(model.generation_defaults, model_path)
    on_gpu = machine.device == "cuda"
    depth = args.pipeline_depth
    speculative = None if args.speculative is None else SpeculativeConfig.from_dict(args.speculative)
    draft = None
    if speculative is not None:
        draft = resolve_draft(speculative, model, model_path, args.trust_remote_code)
    config = EngineConfig(
        args=args,
        model=model,
        model_path=model_path,
        tokenizer_path=tokenizer_path,
        platform=machine,
        dtype=_dtype(args.dtype, model.dtype, machine),
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens or _batched_tokens(on_gpu, args.deterministic),
        max_chunk_tokens=args.max_chunk_tokens or sys.maxsize,
        # On a CPU host and device are the same cores: nothing is won by running one step late.
        pipeline_depth=depth if depth is not None else int(on_gpu),
        attention_backend=backend,
        speculative=speculative,
        draft=draft,
    )
    if config.max_num_batched_tokens < config.max_num_seqs:
        logger.warning(
            "max_num_batched_tokens=%d is less than max_num_seqs=%d: a step has one row for each of %d "
            "requests at most, and the others wait until one of these ends; raise max_num_batched_tokens, or "
            "lower max_num_seqs",
            config.max_num_batched_tokens,
            config.max_num_seqs,
            config.max_num_batched_tokens,
        )
    return config


def plan(args: EngineArgs) -> str:
    """The memory plan as a text, without loading weights."""
    from octavo.worker.build import choose_kernels, plan_worker

    config = resolve(args)
    return plan_worker(config, choose_kernels(config)).describe()


@kept_byte_code()  # what a device needs is imported here
def build_engine(args: EngineArgs, progress: LoadObserver | None = None) -> EngineParts:
    """Resolve, plan (the plan is logged before anything is allocated), load, and start.

    `progress` is told of each stage, with the share of it that is done where that is known.
    """
    tell = progress or (lambda stage, share: None)
    tell("looking for the model", None)
    config = resolve(args)
    tell("planning memory", None)
    # The tokenizer takes as long as the weights, and needs no torch: both at the same time.
    tokenizer = _InThread(lambda: _load_tokenizer(config))
    # So does a GPU's context, and what is imported next does not need it yet.
    context = _InThread(platform.gpu_memory) if config.platform.device == "cuda" else None
    from octavo.worker.build import (
        build_runner,
        choose_kernels,
        plan_worker,
        start_executor,
    )
    from octavo.worker.draft_build import draft_context
    from octavo.worker.gpu_build import explained_out_of_memory

    kernels = choose_kernels(config)
    if context is not None:
        context.result()
        wait_for_digest()
    memory = plan_worker(config, kernels)
    if logger.hasHandlers():
        for line in memory.describe().splitlines():
            logger.info(line)
    else:  # nobody has set up logging: the plan is shown all the same
        print(memory.describe(), file=sys.stderr)
    if args.chat_template is not None:  # a wrong one is refused before the weights are read
        given = ChatTemplate.for_tokenizer(tokenizer.result(), args.chat_template)
        if faults := given.faults():
            raise ConfigError("\n".join(faults))
    with explained_out_of_memory():
        runner = build_runner(
            config, kernels, memory, lambda done, all_: tell("reading weights", done / all_)
        )
    tell("starting", None)
    found = tokenizer.result()
    eos = config.model.eos_token_ids
    if found is not None and found.eos_token_id is not None and found.eos_token_id not in eos:
        eos += (found.eos_token_id,)
    info = _engine_info(config, memory, eos)
    cache = CacheConfig(args.block_size, memory.num_blocks, info.enable_prefix_caching)
    grammar = GrammarCompiler(found, config.model.vocab_size, eos) if found is not None else None
    planner = draft_kv = suffix = None
    speculative = config.speculative
    if speculative is not None:
        planner = make_planner(config, speculative, runner, memory)
        if config.draft is not None:
            draft_kv = DraftKV(
                memory.num_draft_blocks,
                args.block_size,
                draft_context(config, memory),
                with_lookup=speculative.has_lookup,
            )
    executor = start_executor(runner, config.pipeline_depth)
    if speculative is not None and speculative.history_tokens:
        suffix = SuffixGuesser(make_history(speculative.history_tokens))
    log = None if args.disable_log_stats else StatsLog(synthetic=info.synthetic_acceptance)
    scheduler = Scheduler(_scheduler_config(config, memory), cache, planner, draft_kv)
    engine = Engine(info, scheduler, executor, found, grammar, log, suffix)
    notes = (*kernels.notes, *_speculation_notes(config, memory, info))
    for note in notes:
        logger.warning(note)
    return EngineParts(engine, config, memory, notes, kernels.row_invariant)


def _engine_info(config: EngineConfig, memory: MemoryPlan, eos: tuple[int, ...]) -> EngineInfo:
    """What the engine must know of its model and its options."""
    speculative = config.speculative
    synthetic = speculative is not None and bool(speculative.synthetic_acceptance_rates)
    return EngineInfo(
        vocab_size=config.model.vocab_size,
        max_model_len=memory.max_model_len,
        eos_token_ids=eos,
        seed=config.args.seed,
        enable_prefix_caching=config.args.enable_prefix_caching and not synthetic,
        speculates=speculative is not None,
        reads_predictions=speculative is None or speculative.reads_predictions,
        synthetic_acceptance=synthetic,
    )


def _scheduler_config(config: EngineConfig, memory: MemoryPlan) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=memory.max_model_len,
        max_chunk_tokens=config.max_chunk_tokens,
        pipeline_depth=config.pipeline_depth,
        # A prompt in one piece costs a GPU less than a sliver of it and the rest.
        least_chunk_rows=config.max_num_batched_tokens // 8 if config.platform.device == "cuda" else 0,
        # one block for each request that may run, at most a hundredth of all
        watermark_blocks=min(config.max_num_seqs, memory.num_blocks // 100),
    )


def _speculation_notes(config: EngineConfig, memory: MemoryPlan, info: EngineInfo) -> list[str]:
    """What a user of this drafter should know from the start."""
    from octavo.worker.draft_build import draft_context

    notes = []
    if config.draft is not None and draft_context(config, memory) < memory.max_model_len:
        notes.append(
            f"the draft model {config.draft.name} was made for {draft_context(config, memory):,} tokens and "
            f"the context is {memory.max_model_len:,}: a request that grows beyond that goes on without "
            "drafts"
        )
    if info.synthetic_acceptance:
        notes.append(
            "synthetic_acceptance_rates are set: drafts are accepted by coins, the text means nothing, and "
            "the prefix cache is off. For benchmarks only"
        )
    return notes


def _check_generation_defaults(defaults: Mapping[str, Any], model_path: Path) -> None:
    """Now rather than when the first request wants them."""
    try:
        SamplingParams().with_defaults(defaults)
    except ConfigError as error:
        file = model_path / "generation_config.json"
        raise CheckpointError(f"{file}: {error.__cause__}; correct the file, or delete it") from error


def make_planner(
    config: EngineConfig, speculative: SpeculativeConfig, runner: ModelRunner, memory: MemoryPlan
) -> BudgetPlanner:
    """The draft budget, which has seen no drafts yet, over costs that are measured now."""
    from octavo.worker.build import (
        measure_draft_costs,
        measure_step_costs,
        padded_draft_rows,
        padded_rows,
    )
    from octavo.worker.draft_build import catch_up_rows

    draft_costs = measure_draft_costs(runner, memory)
    budget = DraftBudget(
        CostModel(*measure_step_costs(runner, memory), padded_rows(runner)),
        None if draft_costs is None else CostModel(*draft_costs, padded_draft_rows(runner)),
        max_num_batched_tokens=config.max_num_batched_tokens,
        reserves_rows=config.pipeline_depth > 0,
        catch_up_rows=catch_up_rows(config),
    )
    return BudgetPlanner(
        budget,
        speculative.method if speculative.has_lookup else None,
        model="draft_model" if config.draft is not None else None,
        fixed=speculative.num_speculative_tokens,
    )


def _load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    if config.args.skip_tokenizer_init:
        return None
    tokenizer = Tokenizer.from_folder(config.tokenizer_path, config.args.trust_remote_code)
    if tokenizer is None:
        logger.warning(
            "%s holds no tokenizer: prompts must be token ids, and answers have no text. Name another one "
            "with tokenizer (--tokenizer); skip_tokenizer_init says that this is meant",
            config.tokenizer_path,
        )
        return None
    if tokenizer.vocab_size > config.model.vocab_size:
        logger.warning(
            "the tokenizer of %s has %d tokens and the model only %d: if they do not belong together, the "
            "output is nonsense, and prompts that need the missing tokens are refused",
            config.tokenizer_path,
            tokenizer.vocab_size,
            config.model.vocab_size,
        )
    if config.args.chat_template is None:  # plain prompts do without one: no reason to end here
        for fault in ChatTemplate.for_tokenizer(tokenizer).faults():
            logger.warning(
                "%s.\nConversations are refused with these words, plain prompts are served: mend the file in "
                "%s, or give another template with chat_template (--chat-template).",
                fault,
                config.tokenizer_path,
            )
    return tokenizer


def _batched_tokens(on_gpu: bool, deterministic: bool) -> int:
    """Rows of a step, where the user leaves it open."""
    if not on_gpu:
        return 1024
    # The GPU's row-invariant products end at 128 rows.
    return 128 if deterministic else 8192


def _dtype(asked: str, checkpoint: str, machine: platform.Platform) -> str:
    dtype = platform.choose_dtype(asked, checkpoint, machine)
    if dtype == "float16" and checkpoint == "bfloat16":
        logger.warning(
            "dtype=%s for a bfloat16 checkpoint: float16 overflows above 65504, which some bfloat16 models "
            "reach; if the output is empty or wrong, use dtype=%s",
            asked,
            "bfloat16" if platform.has_bfloat16(machine) else "float32",
        )
    return dtype


def _attention_backend(asked: str) -> str:
    """The option, or the environment where the option was left at auto."""
    if asked != "auto":
        return asked
    for name in ("OCTAVO_ATTENTION_BACKEND", "VLLM_ATTENTION_BACKEND"):
        value = os.environ.get(name)
        if value:
            ours = value.lower() in ATTENTION_BACKENDS
            return check_attention_backend(value.lower() if ours else value, name)
    return "auto"


class _InThread:
    """One call in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, call: Any) -> None:
        self._value: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._value = call()
            except BaseException as error:  # raised again by result()
                self._error = error

        self._thread = threading.Thread(target=run, name="octavo-loading", daemon=True)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value
