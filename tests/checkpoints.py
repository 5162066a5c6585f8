"""Small random checkpoints as real model folders, for every test that needs a model.

    folder = make_checkpoint(tmp_path, "Qwen3ForCausalLM", head_dim=10, tie_word_embeddings=True)

writes config.json, generation_config.json and weights exactly as the hub has them (and with
`tokenizer=True` a byte-level tokenizer with a chat template), in milliseconds and without
transformers. Sizes are multiples of nothing on purpose. The same arguments always give the same
bytes. The list of tensors is written down here by hand: it must not come from the code under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_config(architecture: str = "LlamaForCausalLM", **overrides: Any) -> dict[str, Any]:
    """A config.json's content; `overrides` replace or add fields, None removes one."""
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": 131,
        "hidden_size": 36,
        "intermediate_size": 77,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if architecture == "Qwen3ForCausalLM":
        config["head_dim"] = 10  # apart from hidden_size / num_attention_heads
    if architecture == "MistralForCausalLM":
        config["sliding_window"] = None
    config.update(overrides)
    return {name: value for name, value in config.items() if value is not None or name == "sliding_window"}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a model's checkpoint, in the order of the files."""
    architecture = config["architectures"][0]
    hidden, width, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q, kv = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    attention_bias = config.get("attention_bias", False)
    qkv_bias = architecture == "Qwen2ForCausalLM" or attention_bias
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        linears = {
            "self_attn.q_proj": (q, hidden, qkv_bias),
            "self_attn.k_proj": (kv, hidden, qkv_bias),
            "self_attn.v_proj": (kv, hidden, qkv_bias),
            "self_attn.o_proj": (hidden, q, attention_bias),
            "mlp.gate_proj": (width, hidden, config.get("mlp_bias", False)),
            "mlp.up_proj": (width, hidden, config.get("mlp_bias", False)),
            "mlp.down_proj": (hidden, width, config.get("mlp_bias", False)),
        }
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        if architecture == "Qwen3ForCausalLM":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def make_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors, large enough that greedy texts vary and small enough that nothing saturates."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.get("dtype", config.get("torch_dtype", "float32")))
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor = 1 + 0.2 * tensor
        elif name.endswith("bias"):
            tensor = 0.3 * tensor
        elif not name.startswith(("model.embed_tokens", "lm_head")):
            tensor = tensor * 1.2 / shape[1] ** 0.5
        tensors[name] = tensor.to(dtype)
    return tensors


def make_checkpoint(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    seed: int = 0,
    shards: int = 1,
    pickled: bool = False,
    tokenizer: bool = False,
    generation: dict[str, Any] | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a model folder and return it.

    `shards` > 1 writes that many weight files and an index, `pickled` .bin files instead of
    safetensors, `generation` replaces the content of generation_config.json. A folder with a
    tokenizer has at least 300 tokens (256 bytes, a few merges, three special ones).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        config_overrides = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 2} | config_overrides
    config = make_config(architecture, **config_overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if generation is None:
        generation = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": config.get("eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tensors(folder, make_tensors(config, seed), shards=shards, pickled=pickled)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tensors(
    folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, pickled: bool = False
) -> None:
    """Weight files as the hub names them."""
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")

    def save(part: dict[str, torch.Tensor], path: Path) -> None:
        if pickled:
            torch.save(part, path)
        else:
            save_file(part, path, metadata={"format": "pt"})

    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer: any text round-trips. Special tokens are 0, 1 and 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "the"), ("e", "r"), ("Ġ", "a")]
    merges += [("in", "g"), ("o", "n"), ("an", "d")]
    words = [*_SPECIAL_TOKENS, *letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL_TOKENS[0],
        "eos_token": _SPECIAL_TOKENS[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
