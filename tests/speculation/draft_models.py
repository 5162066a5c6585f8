"""Draft models for a small random checkpoint: one that is nearly right, and one that knows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import make_checkpoint, make_config, make_tensors, write_tensors


def make_draft_models(parent: Path, noise: float = 0.06, **target: Any) -> None:
    """Write parent/near, the target with noise on every matrix, and parent/stranger, half its size.

    `target`: the arguments that the target was made with (by default those of `tokenizer=True` alone).
    """
    near = make_checkpoint(parent / "near", tokenizer=True, **target)
    config = make_config(**{"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 2} | target)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, tensor in make_tensors(config).items():
        added = torch.randn(tensor.shape, generator=generator) * tensor.std() if tensor.dim() > 1 else 0.0
        tensors[name] = (tensor + noise * added).contiguous()
    write_tensors(near, tensors)
    make_checkpoint(parent / "stranger", tokenizer=True, seed=9, num_hidden_layers=2, intermediate_size=40)
