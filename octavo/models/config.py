"""What a model is, read once from its folder and free of every spelling the hub knows.

`ModelConfig.from_folder` reads config.json (and generation_config.json) and normalises it: old and
new names, values at the top level or inside `rope_parameters`, flags that an architecture implies
without writing them down. Everything behind it asks the dataclass and never the JSON. The memory
plan's two figures, bytes of weights and bytes of KV a token, follow from the config alone and live
here too. This file imports no torch.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError, ConfigError, NotInThisVersionError, UnsupportedModelError
from octavo.layers.rope_config import RopeConfig
from octavo.models.rope_config import read_rope

# One line each; `octavo models` prints them.
SUPPORTED_ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "Llama 1, 2, 3 and what shares their shape: SmolLM2, TinyLlama, Yi …",
    "MistralForCausalLM": "Mistral 7B, Nemo, Small: sliding windows, head size of its own",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5: biases on query, key and value",
    "Qwen3ForCausalLM": "Qwen3 (dense): norms on query and key heads",
}

_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_GENERATION_DEFAULTS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "do_sample",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model. `dataclasses.replace` makes variants of it."""

    architecture: str
    model_path: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # one a layer; a row sees that many positions, its own included
    rope: RopeConfig
    dtype: str  # of the checkpoint: float32, bfloat16, float16
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    generation_defaults: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read a model folder in the Hugging Face layout.

        Raises CheckpointError (no or malformed config.json), UnsupportedModelError (an architecture
        or a feature of it), NotInThisVersionError (quantized weights).
        """
        folder = Path(path)
        raw = _read_json(folder / "config.json", required=True)
        generation = _read_json(folder / "generation_config.json", required=False)
        return _normalise(
            _Fields(raw, folder / "config.json"),
            _Fields(generation, folder / "generation_config.json"),
            str(folder),
        )

    def weight_bytes(self, dtype: str | None = None, tp_size: int = 1) -> int:
        """Bytes of this model's weights on one rank, in `dtype` (default: the checkpoint's)."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        kv_per_rank = -(-self.num_kv_heads // tp_size) * self.head_dim
        sharded = self.hidden_size * (2 * q) + 3 * self.hidden_size * self.intermediate_size
        sharded += self.qkv_bias * q + self.mlp_bias * 2 * self.intermediate_size
        keys_values = 2 * kv_per_rank * (self.hidden_size + self.qkv_bias) if tp_size > 1 else 0
        if tp_size == 1:
            keys_values = 2 * kv * (self.hidden_size + self.qkv_bias)
        whole = self.hidden_size * (2 + self.o_bias + self.mlp_bias) + self.qk_norm * 2 * self.head_dim
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        count = self.num_layers * (-(-sharded // tp_size) + keys_values + whole)
        count += -(-tables // tp_size) + self.hidden_size
        return count * _dtype_bytes(dtype or self.dtype)

    def kv_bytes_per_token(self, dtype: str | None = None, tp_size: int = 1) -> int:
        """Bytes of KV cache that one token takes on one rank, all layers together."""
        heads = -(-self.num_kv_heads // tp_size)
        return 2 * self.num_layers * heads * self.head_dim * _dtype_bytes(dtype or self.dtype)

    def tensor_parallel_sizes(self, at_most: int = 64) -> list[int]:
        """The tensor parallel sizes this model can be cut into."""
        return [size for size in range(1, at_most + 1) if self._divides(size)]

    def check_tensor_parallel_size(self, size: int) -> None:
        """Raise ConfigError, listing the sizes that work, if the heads do not divide by `size`."""
        if not self._divides(size):
            sizes = ", ".join(map(str, self.tensor_parallel_sizes()))
            raise ConfigError(
                f"tensor_parallel_size={size} does not divide the model's {self.num_heads} attention heads "
                f"({self.num_kv_heads} KV heads); sizes that do: {sizes}"
            )

    def _divides(self, size: int) -> bool:
        return (
            size >= 1
            and self.num_heads % size == 0
            # KV heads are shared out, or replicated where there are fewer of them than ranks
            and (self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0)
        )


def _dtype_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


class _Fields:
    """A JSON file of the model with checked access: every complaint names the file and the field."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def error(self, name: str, wrong: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: field {name!r} {wrong}; correct the file, or get it again")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, f"must be a positive whole number, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(name, f"must be a number, not {value!r}")
        if value <= 0:
            raise self.error(name, f"must be greater than 0, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required:
            raise CheckpointError(
                f"{path} does not exist; a model folder needs config.json beside its weights"
            ) from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); get the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _architecture(fields: _Fields) -> str:
    named = fields.raw.get("architectures")
    model_type = fields.raw.get("model_type")
    if named is None and isinstance(model_type, str):
        named = [_BY_MODEL_TYPE.get(model_type, model_type)]
    if not (isinstance(named, list) and named and all(isinstance(name, str) for name in named)):
        raise fields.error("architectures", f"must be a list of names, not {named!r}")
    for name in named:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    if not named[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise UnsupportedModelError(
            f"architecture {named[0]} ({fields.path}) generates no text, and embeddings, scores and "
            f"reranking are not in this version of Octavo.\nSupported: {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    near = difflib.get_close_matches(named[0], SUPPORTED_ARCHITECTURES, n=1, cutoff=0.0)[0]
    raise UnsupportedModelError(
        f"architecture {named[0]} ({fields.path}) is not supported.\n"
        f"Supported: {', '.join(SUPPORTED_ARCHITECTURES)}.\n"
        f"Nearest way out: take a {near} checkpoint of the same size (`octavo models` describes the "
        f"families), or run this one with transformers itself until its family is added here."
    )


def _normalise(fields: _Fields, generation: _Fields, model_path: str) -> ModelConfig:
    raw = fields.raw
    architecture = _architecture(fields)
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise NotInThisVersionError(
            f"a quantized checkpoint (quantization_config: {method}, {fields.path})",
            "take the model's unquantized one (float32, bfloat16 or float16), or a .gguf file, which is "
            "dequantised on load",
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"hidden_act={activation!r} ({fields.path}) is not supported with {architecture}, only silu is; "
            "choose another model"
        )

    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else max(hidden_size // num_heads, 1)
    head_dim = fields.integer("head_dim", default_head_dim)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} attention heads"
        )
    num_layers = fields.integer("num_hidden_layers")
    max_position = fields.integer("max_position_embeddings", 2048)
    attention_bias = fields.flag("attention_bias", False)
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    biased = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and attention_bias
    defaults = {
        name: value for name in _GENERATION_DEFAULTS if (value := generation.raw.get(name)) is not None
    }
    ends = fields if generation.raw.get("eos_token_id") is None else generation
    return ModelConfig(
        architecture=architecture,
        model_path=model_path,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=is_qwen2 or biased,
        o_bias=biased,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias", False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_windows=_sliding_windows(fields, architecture, num_layers),
        rope=read_rope(raw, fields.error, head_dim, max_position),
        dtype=_dtype(fields),
        bos_token_id=_token_id(fields, "bos_token_id"),
        eos_token_ids=_eos_token_ids(ends),
        generation_defaults=defaults,
    )


def _dtype(fields: _Fields) -> str:
    value = fields.raw.get("dtype") or fields.raw.get("torch_dtype") or "float32"
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPE_BYTES:
        raise fields.error("dtype", f"must be one of {', '.join(DTYPE_BYTES)}, not {value!r}")
    return str(name)


def _token_id(fields: _Fields, name: str) -> int | None:
    value = fields.raw.get(name)
    if isinstance(value, list):  # some configs write a list of one
        value = value[0] if value else None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise fields.error(name, f"must be a token id, not {value!r}")
    # -1 is written by some configs that mean "none"
    return None if value is None or value < 0 else value


def _eos_token_ids(fields: _Fields) -> tuple[int, ...]:
    """End-of-sequence ids, of generation_config.json where it has any, as in transformers."""
    value = fields.raw.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int):
            raise fields.error("eos_token_id", f"must be a token id or a list of them, not {value!r}")
    return tuple(dict.fromkeys(item for item in values if item >= 0))


def _sliding_windows(fields: _Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    raw = fields.raw
    if architecture == "LlamaForCausalLM" or raw.get("sliding_window") is None:
        if "sliding_attention" in (raw.get("layer_types") or ()) and architecture != "LlamaForCausalLM":
            raise fields.error("sliding_window", "is missing, but layer_types has sliding_attention layers")
        return (None,) * num_layers
    window = fields.integer("sliding_window")
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if not fields.flag("use_sliding_window", False):
        return (None,) * num_layers
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise fields.error("max_window_layers", f"must be a whole number, not {first!r}")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.error("layer_types", f"must be a list of {num_layers} names, not {layer_types!r}")
    known = {"full_attention": None, "sliding_attention": window}
    for name in layer_types:
        if name not in known:
            raise UnsupportedModelError(
                f"{fields.path}: layer type {name!r} is not supported with {architecture}; "
                f"{' and '.join(known)} are"
            )
    return tuple(known[name] for name in layer_types)
