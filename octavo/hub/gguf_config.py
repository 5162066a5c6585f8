"""A GGUF file's settings, as the `config.json` that transformers would have written.

llama.cpp stores Llama, Mistral and relatives as architecture `llama`; Qwen2 and Qwen3 have their
own. What cannot be said in a config.json of those families (experts, partial rotary embedding,
unknown rope factors) is an error here: a model that loads but computes something else is worse.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.hub.gguf_file import GGUFFile, damaged, inexpressible

ROPE_FACTORS = "rope_freqs.weight"

# architecture -> (model_type, class name)
_FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}

# Llama 3.1 and its descendants: low and high frequency factor, as released.
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
_LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)


class _Settings:
    """Metadata of one architecture, with errors that name the file and the missing field."""

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self._gguf = gguf
        self._prefix = architecture

    def get(self, name: str, default: Any = None) -> Any:
        return self._gguf.metadata.get(f"{self._prefix}.{name}", default)

    def integer(self, name: str) -> int:
        value = self.get(name)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]  # some converters write one value per layer
        if isinstance(value, list):
            raise inexpressible(self._gguf.path, f"it {self._prefix}.{name} differs from layer to layer")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise damaged(self._gguf.path, f"its metadata field {self._prefix}.{name} is {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise damaged(self._gguf.path, f"its metadata field {self._prefix}.{name} is {value!r}")
        # A float32 1e-05 comes back as 9.999999747378752e-06; seven digits are all it holds.
        return float(f"{value:.7g}")


def make_config(gguf: GGUFFile) -> dict[str, Any]:
    """The model's config.json.

    Raises UnsupportedModelError for another architecture or a feature that cannot be expressed,
    CheckpointError for settings that are missing or contradict the tensors.
    """
    architecture = gguf.metadata.get("general.architecture")
    if architecture not in _FAMILIES:
        raise inexpressible(
            gguf.path, f"its architecture is {architecture!r}, and readable are {', '.join(_FAMILIES)}"
        )
    if any("_exps" in name or ".ffn_gate_inp" in name for name in gguf.tensors):
        raise inexpressible(gguf.path, "a mixture of experts cannot be read from GGUF")
    settings = _Settings(gguf, architecture)
    model_type, class_name = _FAMILIES[architecture]
    heads = settings.integer("attention.head_count")
    hidden = settings.integer("embedding_length")
    if settings.get("attention.head_count_kv") is None:
        kv_heads = heads
    else:
        kv_heads = settings.integer("attention.head_count_kv")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "attention_dropout": 0.0,
        "head_dim": _head_dim(gguf, settings, hidden, heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": settings.integer("feed_forward_length"),
        "max_position_embeddings": settings.integer("context_length"),
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": settings.integer("block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "use_cache": True,
        "vocab_size": _vocab_size(gguf),
    }
    config["rope_scaling"] = _rope_scaling(gguf, settings, config)
    if architecture != "qwen2":  # Qwen2 has its three biases by definition
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
        window = settings.get("attention.sliding_window")
        if window:
            _refuse_biased_mistral(gguf, config)
            config.update(
                architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=int(window)
            )
    else:
        config["use_sliding_window"] = False
    config["dtype"] = config["torch_dtype"] = _dtype(gguf)
    for name, key in _SPECIAL_IDS.items():
        if (token_id := gguf.metadata.get(f"tokenizer.ggml.{key}")) is not None:
            config[name] = int(token_id)
    return config


_SPECIAL_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
# Tokens that end a turn where the chat template writes them.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>")


def make_generation_config(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The token ids a generation starts, ends and pads with.

    GGUF names one end-of-sequence token. Chat models have more: the ones that llama.cpp keeps in
    fields of their own, and the control tokens with which the chat template ends a turn.
    """
    result = {name: config[name] for name in _SPECIAL_IDS if name in config}
    ends = [config["eos_token_id"]] if "eos_token_id" in config else []
    for field in ("eot_token_id", "eom_token_id"):
        if (token_id := gguf.metadata.get(f"tokenizer.ggml.{field}")) is not None:
            ends.append(int(token_id))
    template = gguf.metadata.get("tokenizer.chat_template", "")
    tokens = gguf.metadata.get("tokenizer.ggml.tokens", [])
    ends += [tokens.index(text) for text in _TURN_ENDS if text in template and text in tokens]
    ends = list(dict.fromkeys(ends))
    if len(ends) > 1:
        result["eos_token_id"] = ends
    return result


def _head_dim(gguf: GGUFFile, settings: _Settings, hidden: int, heads: int) -> int:
    if settings.get("attention.key_length") is not None:
        head_dim = settings.integer("attention.key_length")
    elif hidden % heads:
        raise damaged(gguf.path, f"{heads} attention heads do not divide the hidden size {hidden}")
    else:
        head_dim = hidden // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if settings.get(name, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{gguf.path}: {name} is {settings.get(name)} and the heads have {head_dim} dimensions; "
                "Llama, Qwen2 and Qwen3 need them equal."
            )
    return head_dim


def _vocab_size(gguf: GGUFFile) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise damaged(gguf.path, "it has no tensor 'token_embd.weight'")
    tokens = gguf.metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) > embedding.shape[0]:
        raise damaged(
            gguf.path, f"its tokenizer has {len(tokens)} tokens, its embedding {embedding.shape[0]} rows"
        )
    return embedding.shape[0]


def _dtype(gguf: GGUFFile) -> str:
    """Full precision files keep theirs; everything quantised becomes bfloat16."""
    kinds = {tensor.type.name for tensor in gguf.tensors.values() if len(tensor.shape) > 1}
    if kinds <= {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F16", "F32"} else "bfloat16"


def _refuse_biased_mistral(gguf: GGUFFile, config: dict[str, Any]) -> None:
    if config.pop("attention_bias") | config.pop("mlp_bias"):
        raise inexpressible(gguf.path, "it has a sliding window and biases, which no known family has")


def _rope_scaling(gguf: GGUFFile, settings: _Settings, config: dict[str, Any]) -> dict[str, Any] | None:
    if any(name.startswith("rope_factors_") for name in gguf.tensors):
        raise inexpressible(gguf.path, "it has longrope factors, which cannot be read")
    factors = gguf.tensors.get(ROPE_FACTORS)
    kind = settings.get("rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            raise inexpressible(gguf.path, f"it has both rope factors and {kind!r} rope scaling")
        if factors.type.name != "F32" or factors.shape != (config["head_dim"] // 2,):
            raise damaged(gguf.path, f"{ROPE_FACTORS} is not {config['head_dim'] // 2} float32 numbers")
        return _llama3_scaling(gguf, gguf.bytes_of(factors).view(np.float32).astype(np.float64), config)
    if kind == "none":
        old = settings.get("rope.scale_linear")  # as files were written until late 2023
        return {"rope_type": "linear", "factor": float(old)} if old and old != 1.0 else None
    factor = settings.number("rope.scaling.factor")
    if factor < 1.0:
        raise CheckpointError(f"{gguf.path}: rope.scaling.factor is {factor}, and must be 1 or more.")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise inexpressible(gguf.path, f"it uses {kind!r} rope scaling; readable are linear, yarn and llama3")
    if settings.get("rope.scaling.yarn_log_multiplier"):
        raise inexpressible(gguf.path, "it uses DeepSeek's form of yarn, which this family does not have")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": settings.integer("rope.scaling.original_context_length"),
    }
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if settings.get(f"rope.scaling.{theirs}") is not None:
            scaling[ours] = settings.number(f"rope.scaling.{theirs}")
    attention = settings.number("rope.scaling.attn_factor", 1.0)
    if attention != 1.0:  # llama.cpp multiplies yarn's own factor, transformers replaces it
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return scaling


def llama3_factors(head_dim: int, theta: float, factor: float, original_context: int) -> np.ndarray[Any, Any]:
    """What Llama 3.1's scaling divides each rotary frequency by.  # [head_dim / 2]"""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    smooth = (original_context / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    smooth = np.clip(smooth, 0.0, 1.0)
    result: np.ndarray[Any, Any] = 1.0 / ((1.0 - smooth) / factor + smooth)
    return result


def _llama3_scaling(
    gguf: GGUFFile, factors: np.ndarray[Any, Any], config: dict[str, Any]
) -> dict[str, Any] | None:
    """Recover the settings from the factors: llama.cpp keeps only the latter."""
    if np.allclose(factors, 1.0, rtol=1e-5):
        return None
    factor = float(f"{factors.max():.6g}")
    for context in _LLAMA3_CONTEXTS:
        expected = llama3_factors(config["head_dim"], config["rope_theta"], factor, context)
        if np.allclose(factors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": context,
            }
    raise inexpressible(gguf.path, f"{ROPE_FACTORS} does not follow Llama 3's rope scaling")
