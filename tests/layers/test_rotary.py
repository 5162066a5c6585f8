"""Rotary tables against transformers' formulas, and the rotation against complex numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.errors import CheckpointError
from octavo.layers.rope_config import RopeConfig
from octavo.layers.rotary import apply_rotary, inverse_frequencies, rotary_tables
from octavo.models.rope_config import read_rope

CPU = torch.device("cpu")

PARAMETERS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 48,
        "beta_slow": 2,
        "truncate": False,
    },
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda value: str(value["rope_type"]))
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_frequencies_equal_transformers(parameters: dict[str, Any], theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    head_dim = 64
    raw = {"rope_parameters": parameters | {"rope_theta": theta}, "max_position_embeddings": 131_072}

    def error(name: str, wrong: str) -> CheckpointError:
        return CheckpointError(f"{name} {wrong}")

    rope = read_rope(raw, error, head_dim, 131_072)
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    theirs = LlamaRotaryEmbedding(config)
    frequencies, factor = inverse_frequencies(rope)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling)
    cos, sin = rotary_tables(rope, 100, CPU)
    their_cos, their_sin = theirs(torch.empty(0, dtype=torch.float32), torch.arange(100)[None])
    torch.testing.assert_close(cos, their_cos[0, :, : head_dim // 2])
    torch.testing.assert_close(sin, their_sin[0, :, : head_dim // 2])


def test_dynamic_positions_beyond_the_original_length() -> None:
    """Each turns with the frequencies that transformers uses for a sequence ending there."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=20,
        rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10_000.0},
    )
    theirs = LlamaRotaryEmbedding(config)
    cos, _ = rotary_tables(RopeConfig(16, 20, "dynamic", 10_000.0, 3.0), 50, CPU)
    for position in (0, 19, 20, 33, 49):
        expected, _ = theirs(torch.empty(0, dtype=torch.float32), torch.tensor([[position]]))
        torch.testing.assert_close(cos[position], expected[0, 0, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_a_complex_product(dtype: torch.dtype) -> None:
    cos, sin = rotary_tables(RopeConfig(6, 64), 64, CPU)
    x = torch.randn(5, 3, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.tensor([0, 7, 63, 2, 2])
    turned = apply_rotary(x, cos[positions], sin[positions])
    angles = torch.complex(cos, sin)[positions].unsqueeze(1)
    expected = torch.complex(x[..., :3].float(), x[..., 3:6].float()) * angles
    assert turned.dtype == dtype
    torch.testing.assert_close(turned[..., :3], expected.real.to(dtype))
    torch.testing.assert_close(turned[..., 3:6], expected.imag.to(dtype))
    assert torch.equal(turned[..., 6:], x[..., 6:])  # partial rotary: the rest passes through
