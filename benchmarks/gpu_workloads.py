"""The GPU work every engine is measured on: same prompts, same lengths, same sampling.

Random weights, so only speed is compared: prompts are token ids, end-of-sequence is ignored, and
speculation uses fixed acceptance rates a draft position.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
    "use_cache": True, "torch_dtype": "bfloat16", "dtype": "bfloat16",
}  # fmt: skip
# Unconditional acceptance by draft position: 3.85 tokens a step with the one that comes for free.
ACCEPTANCE = (0.80, 0.66, 0.55, 0.46, 0.38)

KINDS = ("latency-b1", "latency-b16", "latency-b64", "throughput", "prefill", "prefix")


def model_folder(name: str, parent: Path) -> Path:
    """Write a model folder without weights and return it."""
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**_COMMON, **MODELS[name]}))
    ends = {name: _COMMON[name] for name in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def requests(kind: str, seed: int = 0) -> list[tuple[list[int], int]]:
    """(prompt token ids, tokens to generate) of one scenario."""
    source = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [source.randint(0, 150000) for _ in range(count)]

    if kind == "throughput":
        return [(ids(source.randint(100, 1024)), source.randint(100, 1024)) for _ in range(256)]
    if kind.startswith("latency-b"):
        return [(ids(512), 256) for _ in range(int(kind.removeprefix("latency-b")))]
    if kind == "prefill":
        return [(ids(4000), 1) for _ in range(16)]
    if kind == "prefix":
        head = ids(2048)
        return [(head + ids(64), 64) for _ in range(64)]
    raise ValueError(f"unknown scenario {kind!r}; one of {', '.join(KINDS)}")
