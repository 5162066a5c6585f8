"""Builds the draft model's part of the muscle: its memory, its weights, its passes."""

from __future__ import annotations

import torch

from octavo.attention.backend import AttentionBackend, AttentionSpec
from octavo.config import EngineConfig
from octavo.layers.ops import Kernels
from octavo.models.config import ModelConfig
from octavo.models.registry import build_model
from octavo.models.weights import load_weights
from octavo.sampling.batch import SamplingSlots
from octavo.sampling.sampler import Sampler
from octavo.speculation.cpu_draft_passes import CpuDraftPasses
from octavo.speculation.draft_model import DraftModel, DraftNetwork
from octavo.speculation.draft_passes import DraftPasses, TorchDraftPasses
from octavo.speculation.rejection import DraftDistributions
from octavo.worker.gpu_build import gpu_draft_model
from octavo.worker.input_batch import DeviceState
from octavo.worker.kv_cache import DraftMemory, MemoryPlan, allocate_kv_caches, kv_block_bytes
from octavo.worker.step_math import StepMath

# Rows in which the draft model catches up in one step. On a GPU 8192 of a small model take about as long
# as a few decode steps of a large one, and a prompt that is caught up slowly goes without drafts longer; half
# as many would take as long to launch.
_CPU_CATCH_UP_ROWS = 256
_GPU_CATCH_UP_ROWS = 8192


def catch_up_rows(config: EngineConfig) -> int:
    """The most rows of a step in which the draft model catches up."""
    if config.platform.device == "cpu":
        return _CPU_CATCH_UP_ROWS
    return min(_GPU_CATCH_UP_ROWS, config.max_num_batched_tokens)


def attention_specs(model: ModelConfig) -> list[AttentionSpec]:
    """One a layer."""
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


def draft_memory(config: EngineConfig, backend: AttentionBackend, dtype: torch.dtype) -> DraftMemory | None:
    """What the draft model of this configuration takes; None if there is none."""
    draft, speculative = config.draft, config.speculative
    if draft is None or speculative is None:
        return None
    model = draft.model
    rows = catch_up_rows(config) + 2 * config.max_num_seqs
    q_and_kv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    widest = max(q_and_kv, 2 * model.intermediate_size) + 3 * model.hidden_size
    logits = config.max_num_seqs * max(model.vocab_size, config.model.vocab_size) * 4
    return DraftMemory(
        weights=model.weight_bytes(config.dtype),
        activations=rows * widest * 4 + 2 * logits,
        block_bytes=kv_block_bytes(backend, attention_specs(model), config.args.block_size, dtype.itemsize),
        kv_share=speculative.draft_kv_share,
    )


def draft_context(config: EngineConfig, plan: MemoryPlan) -> int:
    """The longest context that drafts are made in."""
    assert config.draft is not None
    return min(plan.max_model_len, config.draft.model.max_position_embeddings)


def build_draft_model(
    config: EngineConfig,
    ops: Kernels,
    backend: AttentionBackend,
    dtype: torch.dtype,
    plan: MemoryPlan,
    state: DeviceState,
    sampler: Sampler,
    sampling: SamplingSlots,
    distributions: DraftDistributions | None,
    steps: StepMath,
) -> DraftModel:
    """The draft model, loaded, with its KV cache. `steps`: the target's."""
    draft, args = config.draft, config.args
    assert draft is not None
    device = state.device
    model = build_model(draft.model, dtype, device, ops, backend, max_model_len=draft_context(config, plan))
    load_weights(model, draft.model_path, args.load_format, seed=args.seed)
    caches = allocate_kv_caches(
        backend, model.attention_specs, plan.num_draft_blocks, args.block_size, dtype, device
    )
    network: DraftNetwork = model
    passes: DraftPasses
    draws = getattr(steps, "draws", None)  # GpuStep's: Triton's kernels are there
    if draws is not None:
        network, passes = gpu_draft_model(
            config, model, caches, state, sampling, draws, distributions is not None
        )
    elif device.type == "cpu":
        passes = CpuDraftPasses(state, args.block_size)
    else:
        passes = TorchDraftPasses(state, args.block_size)
    return DraftModel(
        network,
        caches,
        passes,
        state,
        sampler,
        sampling,
        vocab_size=draft.model.vocab_size,
        target_vocab_size=config.model.vocab_size,
        distributions=distributions,
        catch_up_rows=catch_up_rows(config),
    )
