"""Builds the muscle: chooses kernels, plans memory, loads weights, starts an executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from octavo.attention.backend import AttentionBackend
from octavo.attention.cpu import CpuBackend
from octavo.attention.torch_backend import TorchBackend
from octavo.config import EngineConfig, parse_size
from octavo.errors import ConfigError
from octavo.kernels.cpu.library import set_num_threads
from octavo.layers.ops import Kernels, TorchOps
from octavo.models.cpu_ops import choose_ops
from octavo.models.registry import build_model
from octavo.models.weights import Progress, load_weights
from octavo.sampling.batch import SamplingSlots
from octavo.sampling.coins import CoinTable
from octavo.sampling.cpu_draw import CpuDraw
from octavo.sampling.noise import Stream
from octavo.sampling.sampler import DrawKernels, Sampler, TorchDraw
from octavo.speculation.acceptance import Acceptance, RejectionAcceptance, SyntheticAcceptance
from octavo.speculation.continued import ContinuedProposer
from octavo.speculation.cpu_lookup import CpuLookup
from octavo.speculation.lookup import HYBRID_MIN_MATCH, MIN_MATCH, PythonLookup
from octavo.speculation.proposer import CustomProposer, Proposer, load_drafter
from octavo.speculation.rejection import DraftDistributions
from octavo.worker.cpu_step import CpuStep
from octavo.worker.cuda_graph import StepBuffers
from octavo.worker.draft_build import attention_specs, build_draft_model, draft_memory
from octavo.worker.executor import Executor, InlineExecutor, ThreadExecutor
from octavo.worker.gpu_build import (
    check_deterministic,
    check_gpu_is_free,
    gpu_draft_ops,
    gpu_graphs,
    gpu_kernels,
    gpu_lookup,
    gpu_sampling,
    gpu_steps,
    gpu_workspace,
    make_ready,
    spare_the_collector,
    why_not_triton,
)
from octavo.worker.input_batch import MAX_DRAFTS, DeviceState
from octavo.worker.kv_cache import (
    MemoryPlan,
    MemoryRequest,
    allocate_kv_caches,
    kv_block_bytes,
    plan_memory,
)
from octavo.worker.model_runner import ModelRunner
from octavo.worker.step_math import StepMath, TorchStep

ATTENTION_BACKENDS = ("auto", "triton", "cpu", "torch")


@dataclass(frozen=True)
class KernelChoice:
    """Which implementation does what on this machine, and what the user should know of it."""

    ops: Kernels
    backend: AttentionBackend
    draw: DrawKernels
    steps: Callable[[DeviceState], StepMath] | None  # None: octavo.worker.gpu_build makes them
    notes: tuple[str, ...] = ()
    # A row has the same bits whatever other rows a step has: texts are then equal, not just alike.
    row_invariant: bool = False


def choose_kernels(config: EngineConfig) -> KernelChoice:
    """The fastest kernels this machine has for this dtype; the torch reference where there are none.

    attention_backend="torch" asks for the reference everywhere. deterministic=True asks for kernels
    whose rows do not depend on each other; raises ConfigError where there are none.
    """
    wanted, deterministic = config.attention_backend, config.args.deterministic
    if wanted not in ATTENTION_BACKENDS:
        raise ConfigError(
            f"attention backend {wanted!r} is unknown; choose one of {', '.join(ATTENTION_BACKENDS)}"
        )
    reference = KernelChoice(TorchOps(), TorchBackend(), TorchDraw(), TorchStep)
    on_gpu = config.platform.device != "cpu"
    reason = why_not_triton(config) if on_gpu else "they run on a GPU only"
    if wanted == "triton" and reason is not None:
        raise ConfigError(f"attention backend 'triton' cannot be used: {reason}")
    if on_gpu and wanted in ("auto", "triton") and reason is None:
        chosen = gpu_kernels(config)
        return KernelChoice(
            chosen.ops, chosen.backend, chosen.draw, None, row_invariant=config.args.deterministic
        )
    if on_gpu or wanted == "torch":
        if wanted == "cpu":
            raise ConfigError("attention backend 'cpu' runs on a CPU only; here: auto, triton or torch")
        if deterministic:
            raise ConfigError(
                "deterministic=True needs Octavo's own kernels: plain torch gives a row other bits when "
                "other rows run beside it. Leave attention_backend at auto"
            )
        if wanted == "torch":
            return reference
        return replace(reference, notes=(f"Octavo's Triton kernels are not used: {reason}",))
    ops, choice = choose_ops(torch_dtype(config.dtype), "octavo" if deterministic else None)
    if choice.library is None or choice.name == "torch":
        if wanted == "cpu":
            raise ConfigError(f"attention backend 'cpu' is not available: {choice.reason}")
        return replace(reference, notes=(choice.reason,))
    set_num_threads(config.platform.threads)
    return KernelChoice(
        ops,
        CpuBackend(choice.library),
        CpuDraw(choice.library),
        CpuStep,
        row_invariant=choice.name == "octavo",
    )


def plan_worker(config: EngineConfig, kernels: KernelChoice) -> MemoryPlan:
    """The memory plan of this configuration; raises InsufficientMemoryError if it cannot be."""
    model, machine, args = config.model, config.platform, config.args
    itemsize = torch_dtype(config.dtype).itemsize
    specs = attention_specs(config.model)
    on_gpu = machine.device == "cuda"
    if on_gpu:
        gpu = machine.gpu
        assert gpu is not None
        budget = int(gpu.memory * args.gpu_memory_utilization)
        check_gpu_is_free(budget, args.gpu_memory_utilization)
        budget_name = f"({args.gpu_memory_utilization:.0%} of {gpu.name})"
    else:
        budget, budget_name = machine.available_memory, "free memory"
    rows, seqs = config.max_num_batched_tokens, config.max_num_seqs
    q_and_kv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    widest = max(q_and_kv, 2 * model.intermediate_size) + 3 * model.hidden_size
    longest = args.max_model_len or model.max_position_embeddings
    activations = rows * widest * 4 + 2 * seqs * model.vocab_size * 4
    if kernels.steps is None:
        activations = gpu_workspace(config, longest)
    asked = MemoryRequest(
        device=machine.device,
        budget=budget,
        budget_name=budget_name,
        weights=model.weight_bytes(config.dtype),
        activations=activations,
        slots=seqs * (longest + MAX_DRAFTS + 1) * 5,
        block_bytes=kv_block_bytes(kernels.backend, specs, args.block_size, itemsize),
        block_size=args.block_size,
        model_max_len=model.max_position_embeddings,
        max_model_len=args.max_model_len,
        max_num_seqs=seqs,
        kv_cache_memory=None
        if args.kv_cache_memory is None
        else parse_size(args.kv_cache_memory, "kv_cache_memory"),
        draft=draft_memory(config, kernels.backend, torch_dtype(config.dtype)),
    )
    return plan_memory(asked)


def start_executor(runner: ModelRunner, pipeline_depth: int) -> Executor:
    """The executor of a pipeline depth. A GPU is a thread of its own: launches return at once there."""
    if pipeline_depth and runner.state.device.type == "cpu":
        return ThreadExecutor(runner)
    return InlineExecutor(runner)


def measure_step_costs(runner: ModelRunner, plan: MemoryPlan) -> tuple[list[tuple[int, float]], float]:
    """What the draft budget starts from: seconds of a step by its rows, and per KV token read.

    A few passes, together about as long as thirty decode steps. A KV token's time is its bytes at the
    rate at which one row reads the weights; the budget corrects both by what it sees.
    """
    sizes: tuple[tuple[int, int], ...] = (
        (1, 4), (2, 3), (4, 3), (8, 3), (12, 3), (16, 3), (20, 2), (32, 2), (64, 1),
    )  # fmt: skip
    if runner.state.device.type == "cuda":
        sizes += tuple((rows, 1) for rows in (96, 128, 192, 256, 320, 384, 512))
        sizes = _twice(sizes)
    table = _time_passes(runner.time_rows, sizes)
    asked = plan.request
    bytes_per_second = asked.weights / table[0][1]
    return table, asked.block_bytes / asked.block_size / bytes_per_second


def measure_draft_costs(
    runner: ModelRunner, plan: MemoryPlan
) -> tuple[list[tuple[int, float]], float] | None:
    """The same of the draft model's passes; None if there is none."""
    model, draft = runner.draft_model, plan.request.draft
    if model is None or draft is None:
        return None
    sizes: tuple[tuple[int, int], ...] = (
        (1, 3), (2, 3), (4, 3), (8, 2), (16, 2), (32, 2), (64, 1), (128, 1), (256, 1),
    )  # fmt: skip
    if runner.state.device.type == "cuda":
        # whether drafts pay hangs on what it costs to catch up with a prompt
        sizes += (512, 1), (1024, 1), (2048, 1), (4096, 1)
        sizes = tuple(size for size in _twice(sizes) if size[0] <= model.catch_up_rows)
    table = _time_passes(model.time_rows, sizes)
    bytes_per_second = draft.weights / table[0][1]
    return table, draft.block_bytes / plan.request.block_size / bytes_per_second


def _twice(sizes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Each size at least twice: a GPU's first pass of a size may still load a kernel."""
    return tuple((rows, max(2, repeats)) for rows, repeats in sizes)


def _time_passes(
    time_rows: Callable[[int], float], sizes: Sequence[tuple[int, int]]
) -> list[tuple[int, float]]:
    """The least of the seconds for each (rows, repeats); in rounds, so that a moment's disturbance is
    not all that is seen of one size."""
    best: dict[int, float] = {}
    for number in range(max(repeats for _, repeats in sizes)):
        for rows, repeats in sizes:
            if number < repeats:
                best[rows] = min(time_rows(rows), best.get(rows, math.inf))
    return list(best.items())


def build_runner(
    config: EngineConfig, kernels: KernelChoice, plan: MemoryPlan, progress: Progress | None = None
) -> ModelRunner:
    """The model runner of one rank, with weights loaded and the KV cache allocated.

    `progress` is told how many bytes of the weights are read, and of how many.
    """
    if kernels.steps is None:
        spare_the_collector()
    device = torch.device(config.platform.device)
    dtype = torch_dtype(config.dtype)
    model = build_model(
        config.model, dtype, device, kernels.ops, kernels.backend, max_model_len=plan.max_model_len
    )
    load_weights(model, config.model_path, config.args.load_format, progress, seed=config.args.seed)
    caches = allocate_kv_caches(
        kernels.backend, model.attention_specs, plan.num_blocks, config.args.block_size, dtype, device
    )
    state = DeviceState(config.max_num_seqs, plan.max_model_len, config.args.block_size, device)
    buffers: StepBuffers | None = None
    if kernels.steps is None:
        steps, buffers = gpu_steps(config, state)
        if config.args.deterministic:
            check_deterministic(model, kernels.ops)
    else:
        steps = kernels.steps(state)
    distributions = DraftDistributions()
    acceptance = build_acceptance(config, state, distributions)
    graphs, whole_steps = None, None
    if buffers is not None and not config.args.enforce_eager:
        graphs, whole_steps = gpu_graphs(config, model, caches, steps, buffers, acceptance)
    proposer = build_proposer(config, state, steps)
    sampler = Sampler(kernels.draw)
    sampling = gpu_sampling(config, device) if kernels.steps is None else SamplingSlots(state.num_slots)
    draft_model = None
    if config.draft is not None:
        draft_model = build_draft_model(
            config,
            kernels.ops if kernels.steps is not None else gpu_draft_ops(config, kernels.ops),
            kernels.backend,
            dtype,
            plan,
            state,
            sampler,
            sampling,
            distributions if isinstance(acceptance, RejectionAcceptance) else None,
            steps,
        )
    runner = ModelRunner(
        model, caches, state, steps, sampler, proposer, acceptance=acceptance, graphs=graphs,
        sampling=sampling, draft_model=draft_model, whole_steps=whole_steps,
    )  # fmt: skip
    if kernels.steps is None:
        make_ready(config, runner, sampler, plan)
    return runner


def build_proposer(config: EngineConfig, state: DeviceState, steps: StepMath) -> Proposer | None:
    """The drafter this configuration names, but a draft model; None where there is no other."""
    if config.speculative is None or not config.speculative.has_lookup:
        return None
    method = config.speculative.method
    if ":" in method:
        return CustomProposer(state, load_drafter(method), method)
    if method == "suffix":
        own = _build_lookup(state, steps, prompt=True)
        return ContinuedProposer(own, state) if config.speculative.history_tokens else own
    # Where a draft model stands behind it, a lookup guesses only if it is rather sure.
    min_match = HYBRID_MIN_MATCH if method == "hybrid" else MIN_MATCH
    return _build_lookup(state, steps, prompt=method != "predicted", min_match=min_match)


def _build_lookup(
    state: DeviceState, steps: StepMath, *, prompt: bool, min_match: int = MIN_MATCH
) -> Proposer:
    if isinstance(steps, CpuStep):
        return CpuLookup(steps.tables, prompt=prompt, min_match=min_match)
    if state.device.type == "cuda" and not isinstance(steps, TorchStep):
        return gpu_lookup(state, prompt=prompt, min_match=min_match)
    return PythonLookup(state, prompt=prompt, min_match=min_match)


def build_acceptance(
    config: EngineConfig, state: DeviceState, distributions: DraftDistributions
) -> Acceptance | None:
    """How drafts are accepted, if not by replay. `distributions` are filled by a draft model."""
    speculative = config.speculative
    if speculative is None:
        return None

    def coins(stream: Stream) -> CoinTable:
        return CoinTable(state.num_slots, state.tokens.shape[1], stream, state.device)

    if speculative.synthetic_acceptance_rates:
        return SyntheticAcceptance(state, speculative.synthetic_acceptance_rates, coins(Stream.SYNTHETIC))
    if speculative.acceptance == "rejection":
        return RejectionAcceptance(distributions, coins(Stream.REJECTION))
    return None


def torch_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 by name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
