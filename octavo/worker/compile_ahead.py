"""Compiles a model's GPU kernels before anybody waits for them, in several processes.

Triton keeps what it compiled on disk, under the GPU, its own version and the kernels' source. A kernel's
form depends on a model's shape and on the number of rows of a step, not on how many layers there are:
so each process makes the model with one layer of each kind and random weights, and runs its share of
the step sizes. What it compiled is found in the cache by every later start.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.models.config import ModelConfig
from octavo.models.registry import build_model
from octavo.models.weights import load_weights
from octavo.sampling.batch import SamplingSlots
from octavo.sampling.sampler import Sampler
from octavo.worker.build import choose_kernels, torch_dtype
from octavo.worker.gpu_build import capture_graphs, gpu_steps, why_not_triton
from octavo.worker.input_batch import DeviceState
from octavo.worker.kv_cache import allocate_kv_caches
from octavo.worker.model_runner import ModelRunner
from octavo.worker.warm_up import warm_up

MOST_PROCESSES = 8
_LONGEST = 8192  # tokens of a context: no kernel's form depends on it
_BLOCKS = 1024


def compile_ahead(config: EngineConfig, processes: int) -> None:
    """Compile what this configuration's target and draft model will run.

    Raises ConfigError where there is nothing to compile.
    """
    reason = why_not_triton(config)
    if reason is not None:
        raise ConfigError(f"there are no kernels to compile ahead: {reason}")
    shapes = [config.model] if config.draft is None else [config.model, config.draft.model]
    shares = max(1, min(processes, MOST_PROCESSES))
    jobs = [(config, shape, share, shares) for shape in shapes for share in range(shares)]
    # a process that has used a GPU cannot be forked
    with ProcessPoolExecutor(shares, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_compile_share, jobs):
            pass


def one_layer_of_each_kind(model: ModelConfig) -> ModelConfig:
    """The same shape with as few layers as have every kind of attention there is."""
    windows = tuple(dict.fromkeys(model.sliding_windows))
    return replace(model, num_layers=len(windows), sliding_windows=windows)


def _compile_share(job: tuple[EngineConfig, ModelConfig, int, int]) -> None:
    config, shape, share, shares = job
    kernels = choose_kernels(config)
    device, dtype = torch.device("cuda"), torch_dtype(config.dtype)
    block_size = config.args.block_size
    longest = min(config.args.max_model_len or shape.max_position_embeddings, _LONGEST)
    model = build_model(
        one_layer_of_each_kind(shape), dtype, device, kernels.ops, kernels.backend, max_model_len=longest
    )
    load_weights(model, config.model_path, "dummy", seed=0)
    caches = allocate_kv_caches(kernels.backend, model.attention_specs, _BLOCKS, block_size, dtype, device)
    state = DeviceState(config.max_num_seqs, longest, block_size, device)
    steps, buffers = gpu_steps(config, state)
    if not config.args.enforce_eager:
        capture_graphs(config, model, caches, steps, buffers, None, (share, shares))
    if share == shares - 1:  # its graphs are the smallest
        sampler = Sampler(kernels.draw)
        runner = ModelRunner(model, caches, state, steps, sampler, sampling=SamplingSlots(state.num_slots))
        warm_up(
            runner, sampler, max_step_rows=config.max_num_batched_tokens, block_size=block_size,
            num_blocks=_BLOCKS,
        )  # fmt: skip
