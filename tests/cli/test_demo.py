"""The arithmetic of the demo's ceiling, and that it shows both figures."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from octavo import platform
from octavo.cli import demo
from octavo.cli.main import main
from octavo.errors import CheckpointError
from tests.cli.fakes import FakeLLM


def write_header(file: Path, shapes: dict[str, list[int]], dtype: str = "BF16") -> None:
    """A safetensors file without its data: the header is all that is read here."""
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def test_a_tied_embedding_is_read_as_the_head(tmp_path: Path) -> None:
    write_header(tmp_path / "a.safetensors", {"model.embed_tokens.weight": [10, 4]})
    write_header(
        tmp_path / "b.safetensors", {"model.layers.0.mlp.up_proj.weight": [8, 4], "model.norm.weight": [4]}
    )
    assert demo.bytes_per_token(tmp_path, 2) == 2 * (40 + 32 + 4)


def test_an_input_embedding_of_its_own_is_not_counted(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": [10, 4], "lm_head.weight": [10, 4], "model.norm.weight": [4]}
    write_header(tmp_path / "model.safetensors", shapes, dtype="F32")
    assert demo.bytes_per_token(tmp_path, 4) == 4 * (40 + 4)


def test_no_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        demo.bytes_per_token(tmp_path, 2)


def test_the_demo_shows_answer_and_ceiling(
    fake_llm: type[FakeLLM],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    write_header(tmp_path / "model.safetensors", {"model.norm.weight": [1_000_000]})
    fake_llm.model_path = str(tmp_path)
    monkeypatch.setattr(platform, "memory_bandwidth_probe", lambda: 10.0)
    rates = {0: 100.0, "auto": 250.0}
    monkeypatch.setattr(demo, "rewrite", lambda llm, drafts: ([1, 2], rates[drafts]))
    assert main(["m", "--prompt", "hello"], demo.command) == 0
    out, err = capsys.readouterr()
    assert "one two three\n" in out
    assert "this machine reads 10.0 GB/s; one token reads 2 MB of weights: at best 5000.0 tok/s" in out
    assert "reached: " in out
    assert "100 tok/s plainly, 250 tok/s with the text itself as drafter (2.5x), the same tokens" in out
    assert "3 tokens in" in err
    speculative = {"method": "prompt_lookup", "num_speculative_tokens": "auto"}
    assert fake_llm.made[0].kwargs == {"model": "m", "dtype": "bfloat16", "speculative": speculative}
