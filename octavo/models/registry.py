"""From a config to an empty model."""

from __future__ import annotations

import torch

from octavo.attention.backend import AttentionBackend
from octavo.errors import UnsupportedModelError
from octavo.layers.ops import Kernels
from octavo.layers.parallel import SingleRank, TPGroup
from octavo.models.config import SUPPORTED_ARCHITECTURES, ModelConfig
from octavo.models.decoder import CausalLM

__all__ = ["SUPPORTED_ARCHITECTURES", "build_model"]


def build_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    ops: Kernels,
    backend: AttentionBackend,
    tp: TPGroup | None = None,
    max_model_len: int | None = None,
) -> CausalLM:
    """A model without weights; `octavo.models.weights.load_weights` fills it.

    `max_model_len` is the longest position it will see (default: the config's). Raises ConfigError
    if the tensor parallel size does not divide the heads.
    """
    if config.architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {config.architecture} is not one of {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    length = config.max_position_embeddings if max_model_len is None else max_model_len
    return CausalLM(config, dtype, device, ops, backend, tp or SingleRank(), length)
