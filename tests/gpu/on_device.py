"""tests.paged on a GPU: a model that takes a step's tensors from the host and gives logits back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from octavo.attention.backend import AttentionBackend, AttentionMetadata, ForwardContext
from octavo.layers.ops import Kernels
from octavo.models.config import ModelConfig
from octavo.models.decoder import CausalLM
from octavo.models.registry import build_model
from octavo.models.weights import load_weights
from tests.paged import PagedRun

DEVICE = torch.device("cuda")


class _OnDevice:
    """The part of CausalLM that PagedRun uses."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.dtype = model.dtype
        self.attention_specs = model.attention_specs
        self._caches: list[torch.Tensor] | None = None

    def moved(self, ctx: ForwardContext) -> tuple[list[torch.Tensor], AttentionMetadata]:
        """The step, and this model's own KV caches, on the device."""
        if self._caches is None:
            self._caches = [cache.to(DEVICE) for cache in ctx.kv_caches]
        meta = ctx.attention
        return self._caches, replace(
            meta,
            query_start_loc=meta.query_start_loc.to(DEVICE),
            seq_lens=meta.seq_lens.to(DEVICE),
            block_table=meta.block_table.to(DEVICE),
            slot_mapping=meta.slot_mapping.to(DEVICE),
            positions=meta.positions.to(DEVICE),
        )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        caches, meta = self.moved(ctx)
        with torch.inference_mode():
            wanted = None if ctx.wanted is None else ctx.wanted.to(DEVICE)
            context = ForwardContext(meta, caches, wanted)
            return self.model.forward(input_ids.to(DEVICE), meta.positions, context)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.logits(hidden).cpu()


def load(folder: Path, dtype: torch.dtype, ops: Kernels, backend: AttentionBackend) -> CausalLM:
    """A checkpoint on the GPU."""
    model = build_model(ModelConfig.from_folder(folder), dtype, DEVICE, ops, backend)
    load_weights(model, str(folder))
    return model


def run(
    model: CausalLM, backend: AttentionBackend, num_requests: int, max_len: int, block_size: int = 16
) -> PagedRun:
    """Requests of a model on the GPU, driven from the host."""
    return PagedRun(_OnDevice(model), backend, num_requests, max_len, block_size)  # type: ignore[arg-type]
