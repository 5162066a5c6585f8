"""Rotary position embedding: tables of cosines and sines, and the rotation.

Half-split form: number i of a head turns together with number i + rotary_dim / 2. The five kinds
of scaling follow transformers' formulas (linear: kaiokendev; dynamic NTK: bloc97 and emozilla;
yarn: arXiv 2309.00071; llama3: the Llama 3.1 release), and a yarn attention factor is multiplied
into the tables.

Dynamic NTK makes the frequencies depend on the length of the sequence. transformers rotates every
token of one forward with the frequencies of that forward's last position, so its cached keys carry
the frequencies of the moment they were made. Here position p is rotated with the frequencies of a
sequence that ends at p. That is the same for every token up to the original length and for every
token generated one by one beyond it, from a prompt that fits. It differs for the part of a *prompt*
beyond the original length, where transformers' result depends on how the prompt is cut into
forwards; ours must not, or chunked prefill and prefix caching would change the text.
"""

from __future__ import annotations

import math

import torch

from octavo.layers.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """(radians a position [rotary_dim / 2] float32, factor on cosines and sines)."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.type == "linear":
        return frequencies / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.type == "yarn":
        return _yarn(rope, frequencies), _yarn_attention_factor(rope)
    return frequencies, 1.0  # default, and dynamic within the original length


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched, short ones kept, a band between them blended."""
    waves_in_context = rope.original_max_position * frequencies / (2 * math.pi)
    blend = (waves_in_context - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Blend of stretched and kept frequencies, linear in the index between two rotation counts."""

    def index_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rotary_tables(rope: RopeConfig, max_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [max_len, rotary_dim / 2] float32."""
    frequencies, factor = inverse_frequencies(rope)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
    if rope.type == "dynamic" and max_len > rope.original_max_position:
        angles[rope.original_max_position :] = _dynamic_angles(rope, max_len)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def _dynamic_angles(rope: RopeConfig, max_len: int) -> torch.Tensor:
    """Angles of the positions from the original length on, each with its own base."""
    positions = torch.arange(rope.original_max_position, max_len, dtype=torch.float64)[:, None]
    stretch = rope.factor * (positions + 1) / rope.original_max_position - (rope.factor - 1)
    base = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float64) / rope.rotary_dim
    return (positions * base**-exponents).float()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [num_tokens, heads, head_dim] by cos and sin [num_tokens, rotary_dim / 2].

    Computed in float32; numbers beyond rotary_dim pass through.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
