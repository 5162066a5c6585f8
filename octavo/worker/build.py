"""Builds the muscle: chooses kernels, plans memory, loads weights, starts an executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from octavo.attention.backend import AttentionBackend, AttentionSpec
from octavo.attention.cpu import CpuBackend
from octavo.attention.torch_backend import TorchBackend
from octavo.config import EngineConfig, parse_size
from octavo.errors import ConfigError
from octavo.kernels.cpu.library import set_num_threads
from octavo.layers.ops import Kernels, TorchOps
from octavo.models.cpu_ops import choose_ops
from octavo.models.registry import build_model
from octavo.models.weights import load_weights
from octavo.sampling.cpu_draw import CpuDraw
from octavo.sampling.sampler import DrawKernels, Sampler, TorchDraw
from octavo.speculation.cpu_lookup import CpuLookup
from octavo.speculation.lookup import PythonLookup
from octavo.speculation.proposer import CustomProposer, Proposer, load_drafter
from octavo.worker.cpu_step import CpuStep
from octavo.worker.executor import Executor, InlineExecutor, ThreadExecutor
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

ATTENTION_BACKENDS = ("auto", "cpu", "torch")


@dataclass(frozen=True)
class KernelChoice:
    """Which implementation does what on this machine, and what the user should know of it."""

    ops: Kernels
    backend: AttentionBackend
    draw: DrawKernels
    steps: Callable[[DeviceState], StepMath]
    notes: tuple[str, ...] = ()


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
    if config.platform.device != "cpu" or wanted == "torch":
        if wanted == "cpu":
            raise ConfigError("attention backend 'cpu' runs on a CPU only; here: auto or torch")
        if deterministic:
            raise ConfigError(
                "deterministic=True needs Octavo's CPU kernels: plain torch gives a row other bits when "
                "other rows run beside it. Leave attention_backend at auto, on a CPU"
            )
        return reference
    ops, choice = choose_ops(torch_dtype(config.dtype), "octavo" if deterministic else None)
    if choice.library is None or choice.name == "torch":
        if wanted == "cpu":
            raise ConfigError(f"attention backend 'cpu' is not available: {choice.reason}")
        return replace(reference, notes=(choice.reason,))
    set_num_threads(config.platform.threads)
    return KernelChoice(ops, CpuBackend(choice.library), CpuDraw(choice.library), CpuStep)


def plan_worker(config: EngineConfig, kernels: KernelChoice) -> MemoryPlan:
    """The memory plan of this configuration; raises InsufficientMemoryError if it cannot be."""
    model, machine, args = config.model, config.platform, config.args
    itemsize = torch_dtype(config.dtype).itemsize
    specs = _attention_specs(config)
    on_gpu = machine.device == "cuda"
    if on_gpu:
        gpu = machine.gpu
        assert gpu is not None
        budget = int(gpu.memory * args.gpu_memory_utilization)
        budget_name = f"({args.gpu_memory_utilization:.0%} of {gpu.name})"
    else:
        budget, budget_name = machine.available_memory, "free memory"
    rows, seqs = config.max_num_batched_tokens, config.max_num_seqs
    q_and_kv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    widest = max(q_and_kv, 2 * model.intermediate_size) + 3 * model.hidden_size
    longest = args.max_model_len or model.max_position_embeddings
    asked = MemoryRequest(
        device=machine.device,
        budget=budget,
        budget_name=budget_name,
        weights=model.weight_bytes(config.dtype),
        activations=rows * widest * 4 + 2 * seqs * model.vocab_size * 4,
        slots=seqs * (longest + MAX_DRAFTS + 1) * 5,
        block_bytes=kv_block_bytes(kernels.backend, specs, args.block_size, itemsize),
        block_size=args.block_size,
        model_max_len=model.max_position_embeddings,
        max_model_len=args.max_model_len,
        max_num_seqs=seqs,
        kv_cache_memory=None
        if args.kv_cache_memory is None
        else parse_size(args.kv_cache_memory, "kv_cache_memory"),
    )
    return plan_memory(asked)


def start_executor(runner: ModelRunner, pipeline_depth: int) -> Executor:
    """The executor of a pipeline depth."""
    return ThreadExecutor(runner) if pipeline_depth else InlineExecutor(runner)


def measure_step_costs(runner: ModelRunner, plan: MemoryPlan) -> tuple[list[tuple[int, float]], float]:
    """What the draft budget starts from: seconds of a step by its rows, and per KV token read.

    A few passes, together about as long as twenty decode steps. A KV token's time is its bytes at the
    rate at which one row reads the weights; the budget corrects both by what it sees.
    """
    table = []
    for rows, repeats in ((1, 3), (2, 2), (4, 2), (8, 2), (16, 2), (32, 1), (64, 1)):
        table.append((rows, min(runner.time_rows(rows) for _ in range(repeats))))
    asked = plan.request
    bytes_per_second = asked.weights / table[0][1]
    return table, asked.block_bytes / asked.block_size / bytes_per_second


def build_runner(config: EngineConfig, kernels: KernelChoice, plan: MemoryPlan) -> ModelRunner:
    """The model runner of one rank, with weights loaded and the KV cache allocated."""
    device = torch.device(config.platform.device)
    dtype = torch_dtype(config.dtype)
    model = build_model(
        config.model, dtype, device, kernels.ops, kernels.backend, max_model_len=plan.max_model_len
    )
    load_weights(model, config.model_path, config.args.load_format, seed=config.args.seed)
    caches = allocate_kv_caches(
        kernels.backend, model.attention_specs, plan.num_blocks, config.args.block_size, dtype, device
    )
    state = DeviceState(config.max_num_seqs, plan.max_model_len, config.args.block_size, device)
    steps = kernels.steps(state)
    proposer = build_proposer(config, state, steps)
    return ModelRunner(model, caches, state, steps, Sampler(kernels.draw), proposer)


def build_proposer(config: EngineConfig, state: DeviceState, steps: StepMath) -> Proposer | None:
    """The drafter this configuration names, or None where it does not speculate."""
    if config.speculative is None:
        return None
    method = config.speculative.method
    if ":" in method:
        return CustomProposer(state, load_drafter(method), method)
    prompt = method == "prompt_lookup"
    if isinstance(steps, CpuStep):
        return CpuLookup(steps.tables, prompt=prompt)
    return PythonLookup(state, prompt=prompt)


def torch_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 by name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _attention_specs(config: EngineConfig) -> list[AttentionSpec]:
    model = config.model
    return [
        AttentionSpec(
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            scale=model.head_dim**-0.5,
            sliding_window=window,
        )
        for window in model.sliding_windows
    ]
