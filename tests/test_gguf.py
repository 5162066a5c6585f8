"""GGUF files become checkpoints: same numbers, same tokens, and clear errors for what cannot be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from octavo.errors import CheckpointError, ConfigError, UnsupportedModelError
from octavo.hub import gguf_convert
from octavo.hub.gguf_config import llama3_factors
from octavo.hub.gguf_convert import convert
from octavo.hub.gguf_file import TENSOR_TYPES, GGUFFile
from tests.checkpoints import make_checkpoint, make_config
from tests.gguf_files import Array, expected_values, interleaved, write_gguf

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Rows of at least a block of every simple kind.
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345 tokens,\n\n  isn't it?\t",
    "naïve 模型 Ελληνικά 🙂🙂 e\u0301 \u00a0 fin",
    "def f(x):\r\n    return x**2 + 3.14159  # comment\n\n\n\n",
    "WE'LL they'RE   trailing   ",
    "2024-01-02T03:04:05 1,000,000 ½ ٣",
    "<|im_start|>user\nhi<|im_end|>\n",
    "the theory of the in-and-out thing and an answer " * 3,
]


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert(path, folder)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


# Numbers


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_float32_comes_back_bit_for_bit(tmp_path: Path, architecture: str, tied: bool) -> None:
    source = make_checkpoint(tmp_path / "hf", architecture, tie_word_embeddings=tied)
    result = converted(write_gguf(tmp_path / "m.gguf", source), tmp_path / "out")
    want, have = load_file(source / "model.safetensors"), load_file(result / "model.safetensors")
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert have[name].dtype == torch.float32
        assert torch.equal(have[name], tensor), name
    config, original = read_json(result / "config.json"), read_json(source / "config.json")
    assert config["tie_word_embeddings"] is tied
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_theta", "vocab_size"):
        assert config[key] == original[key]


@pytest.mark.parity
@pytest.mark.parametrize("architecture", FAMILIES)
def test_transformers_computes_the_same_logits(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    source = make_checkpoint(tmp_path / "hf", architecture)
    result = converted(write_gguf(tmp_path / "m.gguf", source), tmp_path / "out")
    ids = torch.randint(0, 131, (1, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, have = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (source, result)
        )
    assert torch.equal(want, have)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_simple_kinds_are_dequantised_and_rounded(tmp_path: Path, architecture: str, kind: str) -> None:
    source = make_checkpoint(tmp_path / "hf", architecture, **WIDE)
    result = converted(write_gguf(tmp_path / "m.gguf", source, kind), tmp_path / "out")
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    assert read_json(result / "config.json")["dtype"] == str(dtype).removeprefix("torch.")
    have = load_file(result / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.numpy() if tensor.ndim == 1 else expected_values(tensor.numpy(), kind)
        assert torch.equal(have[name], torch.from_numpy(values.copy()).to(dtype)), name


# Where a block keeps its float16 factors: the rest of its bytes may be anything.
FACTOR_BYTES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
}


@pytest.mark.parametrize("kind", FACTOR_BYTES)
def test_k_kinds_are_dequantised(tmp_path: Path, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    source = make_checkpoint(tmp_path / "hf", **WIDE | {"hidden_size": 256, "head_dim": 64})
    generator = np.random.default_rng(3)
    blocks = {}

    def random_blocks(rows: int) -> Array:
        data = generator.integers(0, 256, (rows, gguf.GGML_QUANT_SIZES[number][1]), np.uint8)
        for at in FACTOR_BYTES[kind]:
            factors = generator.uniform(0.001, 0.01, rows).astype(np.float16)
            data[:, at : at + 2] = factors.view(np.uint8).reshape(rows, 2)
        return data

    def add(writer: gguf.GGUFWriter) -> None:
        for name, rows in (("output.weight", 131), ("blk.0.attn_q.weight", 256)):
            blocks[name] = random_blocks(rows)
            writer.add_tensor(name, blocks[name], raw_dtype=number)

    left_out = ("output.weight", "blk.0.attn_q.weight")
    path = write_gguf(tmp_path / "k.gguf", source, extra=add, omit=left_out)
    have = load_file(converted(path, tmp_path / "out") / "model.safetensors")
    head = torch.from_numpy(gguf.dequantize(blocks["output.weight"], number).reshape(131, 256))
    assert torch.equal(have["lm_head.weight"], head.to(torch.bfloat16))
    query = have["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    stored = torch.from_numpy(gguf.dequantize(blocks["blk.0.attn_q.weight"], number).reshape(256, 256))
    assert np.array_equal(interleaved(query, 4), stored.to(torch.bfloat16).float().numpy())


def test_our_table_of_kinds_is_that_of_the_package() -> None:
    for number, kind in TENSOR_TYPES.items():
        package = gguf.GGMLQuantizationType(number)
        assert package.name == kind.name
        assert gguf.GGML_QUANT_SIZES[package] == (kind.block_elements, kind.block_bytes)


def test_slices_smaller_than_a_tensor_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "hf")
    path = write_gguf(tmp_path / "m.gguf", source)
    whole = (converted(path, tmp_path / "a") / "model.safetensors").read_bytes()
    monkeypatch.setattr(gguf_convert, "_SLICE_ELEMENTS", 100)
    assert (converted(path, tmp_path / "b") / "model.safetensors").read_bytes() == whole


def test_biases_of_llama_are_kept_and_missing_ones_are_zero(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", attention_bias=True)
    omit = tuple(f"blk.{layer}.attn_output.bias" for layer in range(3))
    result = converted(write_gguf(tmp_path / "m.gguf", source, omit=omit), tmp_path / "out")
    assert read_json(result / "config.json")["attention_bias"] is True
    want, have = load_file(source / "model.safetensors"), load_file(result / "model.safetensors")
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(have[name], torch.zeros_like(tensor) if "o_proj.bias" in name else tensor), name


# Settings


def rope_config(tmp_path: Path, extra: Any, **overrides: Any) -> Any:
    source = make_checkpoint(tmp_path / "hf", **overrides)
    result = converted(write_gguf(tmp_path / "m.gguf", source, extra=extra), tmp_path / "out")
    return read_json(result / "config.json")["rope_scaling"]


def test_linear_rope_scaling(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    assert rope_config(tmp_path, add) == {"rope_type": "linear", "factor": 4.0}


def test_yarn_rope_scaling(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    want = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert rope_config(tmp_path, add) == want


@pytest.mark.parametrize(("factor", "context"), [(8.0, 8192), (32.0, 8192), (4.0, 2048)])
def test_llama3_rope_factors_are_recovered(tmp_path: Path, factor: float, context: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "rope_theta": 500000.0}
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
    settings = LlamaConfig(**make_config(**shape, max_position_embeddings=131072, rope_scaling=dict(scaling)))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = (plain / scaled.double()).float().numpy()

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", factors)

    assert rope_config(tmp_path, add, **shape) == scaling


def test_strange_rope_factors_are_refused(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 5, 3, dtype=np.float32))

    with pytest.raises(UnsupportedModelError, match="rope scaling"):
        rope_config(tmp_path, add)


def test_rope_factors_of_one_mean_no_scaling(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(3, np.float32))

    assert rope_config(tmp_path, add) is None
    assert llama3_factors(64, 5e5, 1.0, 8192) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "phi3"}, "'phi3'"),
        (
            {
                "extra": lambda w: w.add_uint32("llama.rope.dimension_count", 4),
                "without": ("rope.dimension_count",),
            },
            "4",
        ),
        (
            {"extra": lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((2, 2), np.float32))},
            "experts",
        ),
        ({"extra": lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32))}, "attn_sinks"),
        ({"extra": lambda w: w.add_tensor("x", np.ones(4, np.int32))}, "GGML type 26"),
        ({"extra": lambda w: w.add_uint16("split.count", 3)}, "split"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_checkpoint(tmp_path / "hf"), **change)
    with pytest.raises(UnsupportedModelError, match=message) as error:
        converted(path, tmp_path / "out")
    assert str(path) in str(error.value)


# Damaged files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"omit": ("blk.1.ffn_up.weight",)}, r"no tensor 'blk\.1\.ffn_up\.weight'"),
        ({"without": ("block_count",)}, "block_count"),
        (
            {"extra": lambda w: w.add_uint32("llama.block_count", 5), "without": ("block_count",)},
            r"no tensor 'blk\.3\.",
        ),
        (
            {"extra": lambda w: w.add_uint32("llama.embedding_length", 48), "without": ("embedding_length",)},
            "has shape",
        ),
        (
            {
                "extra": lambda w: w.add_tensor("output.weight", np.full((131, 36), np.nan, np.float32)),
                "omit": ("output.weight",),
            },
            "not finite",
        ),
        (
            {"extra": lambda w: w.add_string("llama.rope.freq_base", "x"), "without": ("rope.freq_base",)},
            "freq_base",
        ),
        ({"extra": lambda w: w.add_string("tokenizer.ggml.bos_token_id", "x")}, "malformed|bos"),
    ],
)
def test_inconsistent_files_name_the_problem(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_checkpoint(tmp_path / "hf"), **change)
    with pytest.raises(CheckpointError, match=message) as error:
        converted(path, tmp_path / "out")
    assert str(path) in str(error.value)


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_checkpoint(tmp_path / "hf", num_hidden_layers=1))
    whole = path.read_bytes()
    header_end = min(tensor.offset for tensor in GGUFFile(path).tensors.values())
    for length in [0, 3, 4, 7, 20, *range(24, header_end, 37), header_end, len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read as a GGUF file"):
            GGUFFile(path)


def test_random_damage_to_the_header_never_escapes_as_another_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_checkpoint(tmp_path / "hf", num_hidden_layers=1))
    whole = bytearray(path.read_bytes())
    header_end = min(tensor.offset for tensor in GGUFFile(path).tensors.values())
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole)
        for at in generator.integers(0, header_end, 3):
            damaged[at] = generator.integers(0, 256)
        path.write_bytes(damaged)
        folder = tmp_path / f"out{trial}"
        try:
            converted(path, folder)
        except (CheckpointError, UnsupportedModelError):
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a model", b"GGUF\x00\x00\x00\x03" + b"\0" * 99])
def test_other_files_are_not_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=r"m\.gguf"):
        GGUFFile(path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_checkpoint(tmp_path / "hf"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        converted(path, tmp_path / "out")


# Tokenizers

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def original_tokenizer(pre: str) -> Tokenizer:
    """A tokenizer as the model's makers publish it, trained on this file."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre == "smollm":
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    elif pre == "gpt-2":
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        pattern = LLAMA3_PATTERN if pre == "llama-bpe" else QWEN2_PATTERN
        steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(), *TEXTS], trainer)
    return tokenizer


def store_byte_pairs(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str | None, **ids: int) -> None:
    content = json.loads(tokenizer.to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if index < 3 else gguf.TokenType.NORMAL for index in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(ids.get("bos", 1))
    writer.add_eos_token_id(ids.get("eos", 2))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_byte_pair_tokenizers_give_the_same_ids(tmp_path: Path, pre: str) -> None:
    original = original_tokenizer(pre)
    source = make_checkpoint(tmp_path / "hf", vocab_size=600)

    def add(writer: gguf.GGUFWriter) -> None:
        store_byte_pairs(writer, original, pre)
        writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")

    result = converted(write_gguf(tmp_path / "m.gguf", source, tokenizer=add), tmp_path / "out")
    rebuilt = Tokenizer.from_file(str(result / "tokenizer.json"))
    assert original.pre_tokenizer is not None
    assert rebuilt.pre_tokenizer is not None
    for text in TEXTS:
        # A small vocabulary can hide where text was cut, so the pieces are compared as well.
        pieces = rebuilt.pre_tokenizer.pre_tokenize_str(text)
        assert pieces == original.pre_tokenizer.pre_tokenize_str(text)
        want = original.encode(text).ids
        assert rebuilt.encode(text, add_special_tokens=False).ids == want, text
        bos = [1] if pre == "llama-bpe" else []
        assert rebuilt.encode(text).ids == bos + want
        if pre != "qwen2":  # which composes accents
            assert rebuilt.decode(want, skip_special_tokens=False) == text
    assert rebuilt.decode([1, 2]) == ""  # control tokens are special
    settings = read_json(result / "tokenizer_config.json")
    assert settings["chat_template"] == "{{ messages[0]['content'] }}<|im_end|>"
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert settings["add_bos_token"] is (pre == "llama-bpe")
    config = read_json(result / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert read_json(result / "generation_config.json")["eos_token_id"] == 2


def test_the_default_rules_cut_numbers_and_punctuation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = original_tokenizer("gpt-2")
    source = make_checkpoint(tmp_path / "hf", vocab_size=600)
    path = write_gguf(tmp_path / "m.gguf", source, tokenizer=lambda w: store_byte_pairs(w, original, None))
    result = converted(path, tmp_path / "out")
    assert "does not say how its tokenizer cuts text" in caplog.text
    rebuilt = Tokenizer.from_file(str(result / "tokenizer.json"))
    assert rebuilt.pre_tokenizer is not None
    pieces = [piece for piece, _ in rebuilt.pre_tokenizer.pre_tokenize_str("ab 12345, c++ d")]
    # llama.cpp's four rules in turn: punctuation, GPT-2's, numbers, groups of three digits.
    assert pieces == ["ab", "Ġ", "123", "45", ",", "Ġc", "++", "Ġd"]


def test_ends_of_turn_are_ends_of_generation(tmp_path: Path) -> None:
    original = original_tokenizer("qwen2")
    source = make_checkpoint(tmp_path / "hf", vocab_size=600)

    def add(writer: gguf.GGUFWriter) -> None:
        store_byte_pairs(writer, original, "qwen2", eos=0)
        writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
        writer.add_uint32("tokenizer.ggml.eot_token_id", 5)

    result = converted(write_gguf(tmp_path / "m.gguf", source, tokenizer=add), tmp_path / "out")
    assert read_json(result / "generation_config.json")["eos_token_id"] == [0, 5, 2]


def pieces_by_score(text: str, scores: dict[str, float], first: bool = True) -> list[str]:
    """Sentencepiece's BPE by its definition: join the neighbours that make the best token."""
    parts = list(("▁" if first and text else "") + text.replace(" ", "▁"))
    while True:
        joined = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not joined:
            return parts
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    kinds = gguf.TokenType
    tokens, types = ["<unk>", "<s>", "</s>"], [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [kinds.BYTE] * 256
    merged = ["▁t", "he", "▁the", "in", "▁a", "er", "ing", "▁an", "an", "nd", "▁and", "▁▁", "th", "▁th", "re"]
    merged += ["▁there", "the", "er▁", "▁i", "▁in"]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789.,!?'-"))
    scores = [0.0] * len(tokens) + [-float(index) for index in range(len(merged) + len(letters))]
    tokens += merged + letters
    types += [kinds.NORMAL] * (len(merged) + len(letters))
    tokens.append("[INST]")
    types.append(kinds.USER_DEFINED)
    scores.append(0.0)
    return tokens, scores, [int(kind) for kind in types]


def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    tokens, scores, types = sentencepiece_vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def test_sentencepiece_tokenizers_follow_the_scores(tmp_path: Path) -> None:
    tokens, scores, types = sentencepiece_vocabulary()
    source = make_checkpoint(tmp_path / "hf", vocab_size=len(tokens))
    result = converted(write_gguf(tmp_path / "m.gguf", source, tokenizer=add_sentencepiece), tmp_path / "out")
    rebuilt = Tokenizer.from_file(str(result / "tokenizer.json"))
    normal = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == gguf.TokenType.NORMAL}
    ids = {token: index for index, token in enumerate(tokens)}

    def as_ids(parts: Sequence[str]) -> list[int]:
        return [
            index
            for part in parts
            for index in (
                [ids[part]] if part in normal else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
            )
        ]

    for text in [
        "the theory and there  in an",
        "a",
        " the",
        "naïve 模型 🙂",
        "in\n\tthe",
        "there's nothing, Ann!",
        *TEXTS[2:6],
    ]:
        assert rebuilt.encode(text, add_special_tokens=False).ids == as_ids(pieces_by_score(text, normal)), (
            text
        )
        assert rebuilt.encode(text).ids[0] == 1
        assert rebuilt.decode(rebuilt.encode(text).ids) == text
    assert ids["[INST]"] in rebuilt.encode("the [INST] the").ids


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda w: w.add_tokenizer_model("bert"), UnsupportedModelError, "'bert'"),
        (
            lambda w: store_byte_pairs(w, original_tokenizer("gpt-2"), "poro-chat"),
            UnsupportedModelError,
            "poro-chat",
        ),
        (
            lambda w: store_byte_pairs(w, original_tokenizer("gpt-2"), "gpt-2", eos=999),
            CheckpointError,
            "999",
        ),
        (lambda w: w.add_tokenizer_model("gpt2"), CheckpointError, "tokens"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(
    tmp_path: Path, edit: Any, error: type[Exception], message: str
) -> None:
    source = make_checkpoint(tmp_path / "hf", vocab_size=600)
    path = write_gguf(tmp_path / "m.gguf", source, tokenizer=edit)
    with pytest.raises(error, match=message):
        converted(path, tmp_path / "out")


def test_merges_that_do_not_fit_the_tokens(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_merges(["a b", "a c"])

    path = write_gguf(tmp_path / "m.gguf", make_checkpoint(tmp_path / "hf"), tokenizer=add)
    with pytest.raises(CheckpointError, match="merges do not fit"):
        converted(path, tmp_path / "out")


def test_more_tokens_than_embedding_rows(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_checkpoint(tmp_path / "hf"), tokenizer=add_sentencepiece)
    with pytest.raises(CheckpointError, match="131 rows"):
        converted(path, tmp_path / "out")
