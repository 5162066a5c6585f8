"""The parameters of a rotary embedding. No torch: the model's config holds one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles. Fields a type does not use keep their neutral value."""

    rotary_dim: int  # even; the first rotary_dim of head_dim numbers are rotated
    original_max_position: int  # context length the model was trained with, before any scaling
    type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn
    attention_factor: float | None = None  # None: from factor, mscale and mscale_all_dim
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
