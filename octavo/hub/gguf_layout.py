"""Which tensors a checkpoint of a GGUF's family must have, and where each comes from.

A plan is made and checked in full before the first byte is written: a tensor that is missing, of
the wrong shape, or unknown to the family is an error that names it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from octavo.errors import CheckpointError
from octavo.hub.gguf_config import ROPE_FACTORS
from octavo.hub.gguf_file import GGUFFile, GGUFTensor, inexpressible


class TargetTensor(NamedTuple):
    """One tensor of the checkpoint to be written."""

    name: str
    shape: tuple[int, ...]
    source: GGUFTensor | None  # None: zeros (a bias that transformers has and the model has not)
    rotary_heads: int  # > 0: the rows are llama.cpp's order of so many heads, to be undone


class _Part(NamedTuple):
    """A tensor as both sides call it."""

    gguf: str
    name: str
    shape: tuple[int, ...]
    heads: int = 0  # rotated heads, for q and k
    zeros_if_absent: bool = False


def plan_tensors(gguf: GGUFFile, config: dict[str, Any]) -> list[TargetTensor]:
    """Every tensor of the checkpoint, in the order in which it is written.

    Raises CheckpointError for a missing or wrongly shaped tensor, UnsupportedModelError for one
    that the family does not have.
    """
    parts = _parts(config)
    targets = [_target(gguf, part) for part in parts]
    unknown = gguf.tensors.keys() - {part.gguf for part in parts} - {ROPE_FACTORS}
    if unknown:
        some = ", ".join(sorted(unknown)[:4]) + (" …" if len(unknown) > 4 else "")
        raise inexpressible(
            gguf.path, f"it holds tensors that {config['architectures'][0]} does not have: {some}"
        )
    return targets


def _target(gguf: GGUFFile, part: _Part) -> TargetTensor:
    tensor = gguf.tensors.get(part.gguf)
    if tensor is None:
        if part.zeros_if_absent:
            return TargetTensor(part.name, part.shape, None, 0)
        raise CheckpointError(f"{gguf.path} has no tensor {part.gguf!r}: it is not a whole model.")
    if tensor.shape != part.shape:
        raise CheckpointError(
            f"{gguf.path}: tensor {part.gguf!r} has shape {list(tensor.shape)}; "
            f"its metadata makes that {list(part.shape)}."
        )
    return TargetTensor(part.name, part.shape, tensor, part.heads)


def _parts(config: dict[str, Any]) -> list[_Part]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    parts = [_Part("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(config["num_hidden_layers"]):
        parts += [
            part._replace(gguf=f"blk.{layer}.{part.gguf}", name=f"model.layers.{layer}.{part.name}")
            for part in _layer_parts(config)
        ]
    parts.append(_Part("output_norm.weight", "model.norm.weight", (hidden,)))
    if not config["tie_word_embeddings"]:
        parts.append(_Part("output.weight", "lm_head.weight", (vocab, hidden)))
    return parts


def _layer_parts(config: dict[str, Any]) -> list[_Part]:
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    family = config["model_type"]
    # llama.cpp rotates neighbouring pairs for `llama` and halves for the Qwens, as transformers does.
    rotary = family in ("llama", "mistral")
    q_heads, k_heads = (heads, kv_heads) if rotary else (0, 0)
    query, key_value = heads * head_dim, kv_heads * head_dim

    parts = [
        _Part("attn_norm.weight", "input_layernorm.weight", (hidden,)),
        _Part("attn_q.weight", "self_attn.q_proj.weight", (query, hidden), q_heads),
        _Part("attn_k.weight", "self_attn.k_proj.weight", (key_value, hidden), k_heads),
        _Part("attn_v.weight", "self_attn.v_proj.weight", (key_value, hidden)),
        _Part("attn_output.weight", "self_attn.o_proj.weight", (hidden, query)),
        _Part("ffn_norm.weight", "post_attention_layernorm.weight", (hidden,)),
        _Part("ffn_gate.weight", "mlp.gate_proj.weight", (inner, hidden)),
        _Part("ffn_up.weight", "mlp.up_proj.weight", (inner, hidden)),
        _Part("ffn_down.weight", "mlp.down_proj.weight", (hidden, inner)),
    ]
    if family == "qwen2" or config.get("attention_bias"):
        parts += [
            _Part("attn_q.bias", "self_attn.q_proj.bias", (query,), q_heads),
            _Part("attn_k.bias", "self_attn.k_proj.bias", (key_value,), k_heads),
            _Part("attn_v.bias", "self_attn.v_proj.bias", (key_value,)),
        ]
    if config.get("attention_bias"):
        # transformers' attention_bias covers the output too; many such models have none there.
        parts.append(_Part("attn_output.bias", "self_attn.o_proj.bias", (hidden,), zeros_if_absent=True))
    if config.get("mlp_bias"):
        parts += [
            _Part("ffn_gate.bias", "mlp.gate_proj.bias", (inner,), zeros_if_absent=True),
            _Part("ffn_up.bias", "mlp.up_proj.bias", (inner,)),
            _Part("ffn_down.bias", "mlp.down_proj.bias", (hidden,), zeros_if_absent=True),
        ]
    if family == "qwen3":
        parts += [
            _Part("attn_q_norm.weight", "self_attn.q_norm.weight", (head_dim,)),
            _Part("attn_k_norm.weight", "self_attn.k_norm.weight", (head_dim,)),
        ]
    return parts
