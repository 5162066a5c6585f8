"""Builds the muscle: chooses kernels, plans memory, loads weights, starts an executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from octavo.attention.backend import AttentionBackend, AttentionSpec
from octavo.attention.cpu import CpuBackend
from octavo.attention.sdpa_backend import SdpaBackend, scratch_bytes
from octavo.attention.torch_backend import TorchBackend
from octavo.config import EngineConfig, parse_size
from octavo.errors import ConfigError
from octavo.kernels import triton as triton_kernels
from octavo.kernels.cpu.library import set_num_threads
from octavo.layers.ops import Kernels, TorchOps
from octavo.models.cpu_ops import choose_ops
from octavo.models.registry import build_model
from octavo.models.weights import Progress, load_weights
from octavo.platform import AttentionChoice, choose_attention
from octavo.sampling.batch import SamplingSlots
from octavo.sampling.coins import CoinTable
from octavo.sampling.cpu_draw import CpuDraw
from octavo.sampling.device_draw import SCRATCH_BYTES, DeviceDraw
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
    CONTEXT,
    GraphedNetwork,
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
    most_drafts,
    spare_the_collector,
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

    attention_backend="torch" asks for the reference everywhere, "sdpa" for torch's own kernels. With
    deterministic=True kernels are needed whose rows do not depend on each other; raises ConfigError where
    there are none.
    """
    asked, deterministic = config.attention_backend, config.args.deterministic
    attention = choose_attention(asked, config.platform, triton_kernels.available())
    if attention.name == "triton":
        chosen = gpu_kernels(config)
        return KernelChoice(chosen.ops, chosen.backend, chosen.draw, None, row_invariant=deterministic)
    if attention.name != "cpu":
        if deterministic:
            way = "Leave attention_backend at auto"
            if attention.reason is not None:
                way = f"They do not run here: {attention.reason}. Use device='cpu'"
            raise ConfigError(
                "deterministic=True needs Octavo's own kernels: plain torch gives a row other bits when "
                f"other rows run beside it. {way}"
            )
        return _in_torch(attention, config.platform.device)
    ops, choice = choose_ops(torch_dtype(config.dtype), "octavo" if deterministic else None)
    if choice.library is None or choice.name == "torch":
        if asked == "cpu":
            raise ConfigError(f"attention_backend='cpu' is not available: {choice.reason}")
        return KernelChoice(TorchOps(), TorchBackend(), TorchDraw(), TorchStep, notes=(choice.reason,))
    set_num_threads(config.platform.threads)
    return KernelChoice(
        ops,
        CpuBackend(choice.library),
        CpuDraw(choice.library),
        CpuStep,
        row_invariant=choice.name == "octavo",
    )


def _in_torch(attention: AttentionChoice, device: str) -> KernelChoice:
    """Torch for everything, on any device."""
    backend = TorchBackend() if attention.name == "torch" else SdpaBackend()
    draw = TorchDraw() if attention.name == "torch" or device == "cpu" else DeviceDraw()
    notes: tuple[str, ...] = ()
    if attention.reason is not None:
        notes = (
            f"Octavo's Triton kernels are not used: {attention.reason}. Torch's own kernels run instead, "
            "several times as slow",
        )
    return KernelChoice(TorchOps(), backend, draw, TorchStep, notes)


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
    elif on_gpu:
        activations = _torch_workspace(config, specs, longest)
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


def _torch_workspace(config: EngineConfig, specs: Sequence[AttentionSpec], longest: int) -> int:
    """Bytes that a GPU holds beside weights, KV cache and slots where torch does it all; an upper bound."""
    model, rows, itemsize = config.model, config.max_num_batched_tokens, torch_dtype(config.dtype).itemsize
    q_and_kv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    # The norms go through float32, nothing works in place.
    a_row = 24 * model.hidden_size + 4 * max(model.intermediate_size, q_and_kv) * itemsize
    sampled = min(rows, config.max_num_seqs * (1 + most_drafts(config)))
    logits = 3 * sampled * model.vocab_size * 4  # what is drawn from, and log-probabilities
    logits += SCRATCH_BYTES
    rotary = longest * model.head_dim * 4
    return CONTEXT + rows * a_row + logits + rotary + max(scratch_bytes(s, longest, itemsize) for s in specs)


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
        sizes = _twice(tuple((rows, 1) for rows in padded_rows(runner)) or sizes)
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
        sizes += tuple((rows, 1) for rows in (512, 640, 1024, 1280, 2048, 4096))
        sizes = tuple(size for size in _twice(sizes) if size[0] <= model.catch_up_rows)
    table = _time_passes(model.time_rows, sizes)
    bytes_per_second = draft.weights / table[0][1]
    return table, draft.block_bytes / plan.request.block_size / bytes_per_second


def padded_rows(runner: ModelRunner) -> tuple[int, ...]:
    """The numbers of rows that steps without a chunk are padded to, as they are graphs; empty: to none."""
    graphs = runner.graphs
    return () if graphs is None else tuple(sorted({*graphs.sizes.short, *graphs.sizes.verify}))


def padded_draft_rows(runner: ModelRunner) -> tuple[int, ...]:
    """The same of the draft model's passes, those that catch up with a prompt among them."""
    network = None if runner.draft_model is None else runner.draft_model.network
    if not isinstance(network, GraphedNetwork):
        return ()
    return tuple(sorted({*network.graphs.sizes.short, *network.graphs.sizes.chunks}))


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
    elif device.type == "cuda":  # libraries load their kernels at the first call
        for rows in (1, config.max_num_seqs):
            runner.time_rows(rows)
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
