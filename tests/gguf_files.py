"""GGUF files made from ordinary checkpoints, as llama.cpp's converter would make them.

Written with the `gguf` package and from llama.cpp's published rules (its names, its interleaving
of q and k for `llama`), independently of the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

Array = npt.NDArray[Any]
Edit = Callable[[gguf.GGUFWriter], None]

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, part = name.split(".", 3)
    module, suffix = part.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER[module]}.{suffix}"


def interleaved(weight: Array, heads: int) -> Array:
    """llama.cpp's order of the rows of q and k: each head's two halves, row about."""
    out = np.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        block = weight[head * size : (head + 1) * size]
        out[head * size : (head + 1) * size : 2] = block[: size // 2]
        out[head * size + 1 : (head + 1) * size : 2] = block[size // 2 :]
    return out


def expected_values(weight: Array, kind: str) -> Array:
    """What is left of float32 weights that were stored as `kind`."""
    number = gguf.GGMLQuantizationType[kind]
    values: Array = gguf.dequantize(gguf.quantize(weight, number), number)
    return values.reshape(weight.shape)


def write_gguf(
    path: Path,
    checkpoint: Path,
    kind: str = "F32",
    *,
    architecture: str | None = None,
    tokenizer: Edit | None = None,
    extra: Edit | None = None,
    omit: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> Path:
    """Write `checkpoint` (config.json, model.safetensors in float32) as one GGUF file.

    Matrices are stored as `kind`, vectors as F32. `omit` leaves out tensors, by GGUF name,
    `without` metadata fields, by the end of their key.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    family = architecture or {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim", hidden // heads)
    writer = gguf.GGUFWriter(path, family)
    fields: dict[str, tuple[Callable[[str, Any], None], Any]] = {
        "block_count": (writer.add_uint32, config["num_hidden_layers"]),
        "context_length": (writer.add_uint32, config["max_position_embeddings"]),
        "embedding_length": (writer.add_uint32, hidden),
        "feed_forward_length": (writer.add_uint32, config["intermediate_size"]),
        "attention.head_count": (writer.add_uint32, heads),
        "attention.head_count_kv": (writer.add_uint32, config["num_key_value_heads"]),
        "attention.key_length": (writer.add_uint32, head_dim),
        "attention.value_length": (writer.add_uint32, head_dim),
        "attention.layer_norm_rms_epsilon": (writer.add_float32, config["rms_norm_eps"]),
        "rope.freq_base": (writer.add_float32, config["rope_theta"]),
        "rope.dimension_count": (writer.add_uint32, head_dim),
    }
    for name, (add, value) in fields.items():
        if name not in without:
            add(f"{family}.{name}", value)
    if tokenizer is not None:
        tokenizer(writer)
    if extra is not None:
        extra(writer)
    for name, stored in load_file(checkpoint / "model.safetensors").items():
        if gguf_name(name) in omit:
            continue
        weight: Array = stored.astype(np.float32)
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = interleaved(weight, heads if "q_proj" in name else config["num_key_value_heads"])
        number = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quantize(weight, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
