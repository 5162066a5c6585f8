"""Every spelling of a config.json ends in the same ModelConfig, and bad ones in a clear error."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import CheckpointError, ConfigError, NotInThisVersionError, UnsupportedModelError
from octavo.models.config import SUPPORTED_ARCHITECTURES, ModelConfig
from tests.checkpoints import make_config, tensor_shapes


def read(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    generation: dict[str, Any] | None = None,
    **overrides: Any,
) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(make_config(architecture, **overrides)))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_sizes(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (131, 36, 77)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 6, 2, 6)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (128, 1e-5)
    assert config.model_path == str(tmp_path)
    assert dataclasses.replace(config, num_layers=1).num_layers == 1


def test_defaults_of_absent_fields(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=None, tie_word_embeddings=None, torch_dtype=None)
    assert config.num_kv_heads == 6
    assert not config.tie_word_embeddings
    assert config.dtype == "float32"


@pytest.mark.parametrize(
    ("architecture", "overrides", "flags"),
    [
        ("LlamaForCausalLM", {}, (False, False, False, False)),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ("MistralForCausalLM", {}, (False, False, False, False)),
        ("Qwen2ForCausalLM", {}, (True, False, False, False)),
        ("Qwen3ForCausalLM", {}, (False, False, False, True)),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_flags(architecture: str, overrides: dict[str, Any], flags: tuple[bool, ...], tmp_path: Path) -> None:
    config = read(tmp_path, architecture, **overrides)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == flags


def test_qwen3_head_dim_has_its_own_default(tmp_path: Path) -> None:
    assert read(tmp_path, "Qwen3ForCausalLM", head_dim=None).head_dim == 128


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float16"}, "float16"), ({}, "float32")],
)
def test_dtype(spelling: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert read(tmp_path, **({"torch_dtype": None} | spelling)).dtype == expected


@pytest.mark.parametrize(
    ("architecture", "overrides", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 9}, (None, None, None)),
        ("MistralForCausalLM", {"sliding_window": 9}, (9, 9, 9)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("Qwen2ForCausalLM", {"sliding_window": 9}, (None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 9),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (9, None, 9),
        ),
    ],
)
def test_sliding_windows(
    architecture: str, overrides: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    assert read(tmp_path, architecture, **overrides).sliding_windows == windows


def test_rope_spellings_agree(tmp_path: Path) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16}
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "yarn"} | scaling)
    middle = read(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "yarn"} | scaling)
    new = read(tmp_path, rope_theta=None, rope_parameters={"rope_type": "yarn", "rope_theta": 5e5} | scaling)
    nested = read(
        tmp_path,
        rope_theta=None,
        rope_parameters={"full_attention": {"rope_type": "yarn", "rope_theta": 5e5} | scaling},
    )
    assert old.rope == middle.rope == new.rope == nested.rope
    assert (old.rope.type, old.rope.theta, old.rope.factor) == ("yarn", 5e5, 4.0)
    assert (old.rope.original_max_position, old.rope.beta_fast, old.rope.beta_slow) == (32, 16.0, 1.0)


def test_partial_rotary(tmp_path: Path) -> None:
    assert read(tmp_path, head_dim=16, partial_rotary_factor=0.5).rope.rotary_dim == 8
    inside = {"rope_type": "default", "partial_rotary_factor": 0.25}
    assert read(tmp_path, head_dim=16, rope_parameters=inside).rope.rotary_dim == 4


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5, 2], None, (2, 5)),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        (2, {"eos_token_id": None}, (2,)),
        (None, None, ()),
        (-1, None, ()),
    ],
)
def test_eos(own: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert read(tmp_path, generation=generation, eos_token_id=own).eos_token_ids == expected


def test_generation_defaults(tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_k": 20, "do_sample": True, "transformers_version": "5"}
    defaults = read(tmp_path, generation=generation).generation_defaults
    assert defaults == {"temperature": 0.6, "top_k": 20, "do_sample": True}


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_counts_the_checkpoint(architecture: str, tied: bool, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"tie_word_embeddings": tied}
    if architecture == "LlamaForCausalLM":
        overrides |= {"attention_bias": True, "mlp_bias": True}
    config = read(tmp_path, architecture, **overrides)
    shapes = tensor_shapes(make_config(architecture, **overrides)).values()
    count = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    assert config.weight_bytes("float32") == 4 * count
    assert config.weight_bytes("bfloat16") == 2 * count
    half = config.weight_bytes("float32", tp_size=2)
    assert 2 * count <= half < 2 * count * 1.1  # norms are on both ranks


def test_kv_bytes(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.kv_bytes_per_token("bfloat16") == 2 * 3 * 2 * 6 * 2
    assert config.kv_bytes_per_token("float32", tp_size=2) == 2 * 3 * 1 * 6 * 4
    assert config.kv_bytes_per_token("float32", tp_size=6) == 2 * 3 * 1 * 6 * 4  # replicated
    with pytest.raises(ConfigError, match="int3"):
        config.kv_bytes_per_token("int3")


def test_tensor_parallel_sizes(tmp_path: Path) -> None:
    config = read(tmp_path, num_attention_heads=6, num_key_value_heads=2)
    assert config.tensor_parallel_sizes() == [1, 2, 6]
    config.check_tensor_parallel_size(2)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=4.*6 attention heads.*1, 2, 6"):
        config.check_tensor_parallel_size(4)


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotInThisVersionError, match="awq"):
        read(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})


def test_an_unknown_architecture_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3MoeForCausalLM"]}))
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_folder(tmp_path)
    text = str(caught.value)
    assert "Qwen3MoeForCausalLM" in text
    assert all(name in text for name in SUPPORTED_ARCHITECTURES)
    assert "take a Qwen3ForCausalLM checkpoint" in text


def test_model_type_stands_in_for_architectures(tmp_path: Path) -> None:
    assert read(tmp_path, "Qwen2ForCausalLM", architectures=None).architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e4},
                "sliding_attention": {"rope_theta": 1e6},
            }
        },
    ],
)
def test_unsupported_features(overrides: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        read(tmp_path, **overrides)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "36"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "float8"}, "dtype"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"head_dim": 7}, "head_dim"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        (
            {
                "rope_scaling": {
                    "type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1
                }
            },
            "high_freq_factor",
        ),
    ],
)  # fmt: skip
def test_malformed_fields_are_named(overrides: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        read(tmp_path, **overrides)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("layer_types", [["full_attention"], "full_attention"])
def test_layer_types_of_the_wrong_length(layer_types: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layer_types"):
        read(
            tmp_path,
            "Qwen3ForCausalLM",
            use_sliding_window=True,
            sliding_window=4,
            layer_types=layer_types,
        )


@pytest.mark.parametrize("content", [None, "{", "[1]", "\xff"])
def test_unreadable_files(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_the_config_needs_no_torch() -> None:
    code = "import sys, octavo.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
