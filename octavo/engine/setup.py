"""From options to a running engine: resolve, plan, load.

    EngineArgs --resolve--> EngineConfig --plan--> MemoryPlan --build--> EngineParts

Everything that can be refused is refused in the first two steps, before weights are read.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo import hub, platform
from octavo.config import CacheConfig, EngineArgs, EngineConfig, SchedulerConfig, SpeculativeConfig
from octavo.core.cost_model import CostModel
from octavo.core.draft_budget import DraftBudget
from octavo.core.draft_planner import BudgetPlanner
from octavo.core.scheduler import Scheduler
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.engine import Engine, EngineInfo
from octavo.engine.grammar import GrammarCompiler
from octavo.engine.stats import StatsLog
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import RequestError
from octavo.worker.kv_cache import MemoryPlan

logger = logging.getLogger("octavo")


@dataclass
class EngineParts:
    """A running engine and what its facades need beside it."""

    engine: Engine
    config: EngineConfig
    plan: MemoryPlan
    notes: tuple[str, ...] = ()  # what a user should know: slow paths taken, and why
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
            raise RequestError("chat needs a tokenizer, and this engine has none", "messages")
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


def resolve(args: EngineArgs) -> EngineConfig:
    """Find the model, read its config, look at the machine, and settle every open option.

    Raises ConfigError, ModelNotFoundError, UnsupportedModelError or CheckpointError.
    """
    platform.prepare_environment()
    from octavo.models.config import ModelConfig

    machine = platform.detect(args.device)
    model_path = hub.resolve(args.model, trust_remote_code=args.trust_remote_code)
    tokenizer_path = model_path if args.tokenizer is None else hub.resolve_tokenizer(args.tokenizer)
    model = ModelConfig.from_folder(model_path)
    on_gpu = machine.device == "cuda"
    depth = args.pipeline_depth
    return EngineConfig(
        args=args,
        model=model,
        model_path=model_path,
        tokenizer_path=tokenizer_path,
        platform=machine,
        dtype=_dtype(args.dtype, model.dtype),
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens or (8192 if on_gpu else 1024),
        max_chunk_tokens=args.max_chunk_tokens or sys.maxsize,
        # On a CPU host and device are the same cores: nothing is won by running one step late.
        pipeline_depth=depth if depth is not None else int(on_gpu),
        attention_backend=_attention_backend(args.attention_backend),
        speculative=None if args.speculative is None else SpeculativeConfig.from_dict(args.speculative),
    )


def plan(args: EngineArgs) -> str:
    """The memory plan as a text, without loading weights."""
    from octavo.worker.build import choose_kernels, plan_worker

    config = resolve(args)
    return plan_worker(config, choose_kernels(config)).describe()


def build_engine(args: EngineArgs) -> EngineParts:
    """Resolve, plan (the plan is logged before anything is allocated), load, and start."""
    config = resolve(args)
    # The tokenizer takes as long as the weights, and needs no torch: both at the same time.
    tokenizer = _InThread(lambda: _load_tokenizer(config))
    from octavo.worker.build import (
        build_runner,
        choose_kernels,
        measure_step_costs,
        plan_worker,
        start_executor,
    )

    kernels = choose_kernels(config)
    memory = plan_worker(config, kernels)
    if logger.hasHandlers():
        for line in memory.describe().splitlines():
            logger.info(line)
    else:  # nobody has set up logging: the plan is shown all the same
        print(memory.describe(), file=sys.stderr)
    runner = build_runner(config, kernels, memory)
    found = tokenizer.result()
    eos = config.model.eos_token_ids
    if found is not None and found.eos_token_id is not None and found.eos_token_id not in eos:
        eos += (found.eos_token_id,)
    info = EngineInfo(
        vocab_size=config.model.vocab_size,
        max_model_len=memory.max_model_len,
        eos_token_ids=eos,
        seed=args.seed,
        enable_prefix_caching=args.enable_prefix_caching,
        speculates=config.speculative is not None,
    )
    scheduler_config = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=memory.max_model_len,
        max_chunk_tokens=config.max_chunk_tokens,
        pipeline_depth=config.pipeline_depth,
        # one block for each request that may run, at most a hundredth of all
        watermark_blocks=min(config.max_num_seqs, memory.num_blocks // 100),
    )
    cache = CacheConfig(args.block_size, memory.num_blocks, args.enable_prefix_caching)
    grammar = GrammarCompiler(found, config.model.vocab_size, eos) if found is not None else None
    planner = None
    if config.speculative is not None:
        table, per_kv_token = measure_step_costs(runner, memory)
        budget = DraftBudget(
            CostModel(table, per_kv_token),
            max_num_batched_tokens=config.max_num_batched_tokens,
            reserves_rows=config.pipeline_depth > 0,
        )
        planner = BudgetPlanner(budget, config.speculative.method, config.speculative.num_speculative_tokens)
    executor = start_executor(runner, config.pipeline_depth)
    log = None if args.disable_log_stats else StatsLog()
    engine = Engine(info, Scheduler(scheduler_config, cache, planner), executor, found, grammar, log)
    for note in kernels.notes:
        logger.warning(note)
    return EngineParts(engine, config, memory, kernels.notes)


def _load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    if config.args.skip_tokenizer_init:
        return None
    tokenizer = Tokenizer.from_folder(config.tokenizer_path, config.args.trust_remote_code)
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        logger.warning(
            "the tokenizer of %s has %d tokens and the model only %d: if they do not belong together, the "
            "output is nonsense, and prompts that need the missing tokens are refused",
            config.tokenizer_path,
            tokenizer.vocab_size,
            config.model.vocab_size,
        )
    return tokenizer


def _dtype(asked: str, checkpoint: str) -> str:
    dtype = {"auto": checkpoint, "half": "float16"}.get(asked, asked)
    if dtype == "float16" and checkpoint == "bfloat16":
        logger.warning(
            "dtype=%s for a bfloat16 checkpoint: float16 overflows above 65504, which some bfloat16 models "
            "reach; if the output is empty or wrong, use dtype=bfloat16",
            asked,
        )
    return dtype


def _attention_backend(asked: str) -> str:
    """The option, or the environment where the option was left at auto."""
    if asked != "auto":
        return asked
    for name in ("OCTAVO_ATTENTION_BACKEND", "VLLM_ATTENTION_BACKEND"):
        value = os.environ.get(name)
        if value:
            return value.lower()
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

        self._thread = threading.Thread(target=run, name="octavo-tokenizer", daemon=True)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value
