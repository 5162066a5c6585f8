"""Loading: every tensor in its place, every kind of damage named, little memory on the way."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo.attention.torch_backend import TorchBackend
from octavo.errors import CheckpointError, ConfigError
from octavo.layers.checkpoint import Loadable
from octavo.layers.ops import TorchOps
from octavo.models.config import ModelConfig
from octavo.models.decoder import CausalLM
from octavo.models.registry import build_model
from octavo.models.weights import LoadReport, load_weights
from tests.checkpoints import make_checkpoint, make_config, make_tensors, tensor_shapes, write_tensors
from tests.paged import PagedRun


def empty_model(folder: Path) -> CausalLM:
    return build_model(
        ModelConfig.from_folder(folder), torch.float32, torch.device("cpu"), TorchOps(), TorchBackend()
    )


def load(folder: Path, load_format: str = "auto", seed: int = 0) -> LoadReport:
    return load_weights(empty_model(folder), folder, load_format, seed=seed)


def logits(folder: Path, load_format: str = "auto", seed: int = 0) -> torch.Tensor:
    model = empty_model(folder)
    load_weights(model, folder, load_format, seed=seed)
    return PagedRun(model, TorchBackend(), num_requests=1, max_len=16).step([(0, [5, 9, 2, 77])])


def test_the_report_and_the_progress(tmp_path: Path) -> None:
    folder, calls = make_checkpoint(tmp_path), list[tuple[int, int]]()
    report = load_weights(
        empty_model(folder), folder, progress=lambda done, total: calls.append((done, total))
    )
    shapes = tensor_shapes(make_config())
    num_bytes = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    assert (report.num_tensors, report.num_bytes) == (len(shapes), num_bytes)
    assert calls[-1] == (num_bytes, num_bytes)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_layers_are_packed_as_they_come_and_dropped(tmp_path: Path) -> None:
    """Never more than a layer's tensors stand unpacked."""
    folder = make_checkpoint(tmp_path, num_hidden_layers=6)
    model, largest = empty_model(folder), 0
    pack = model.pack

    def watching(layer: Loadable) -> None:
        nonlocal largest
        tensors = {id(item.weight): item.weight.tensor for item in model.checkpoint_tensors()}
        plain = sum(t.nbytes for t in tensors.values() if t is not None and t.dim() == 2)
        largest = max(largest, plain)
        pack(layer)

    model.pack = watching  # type: ignore[method-assign]
    load_weights(model, folder)
    config = ModelConfig.from_folder(folder)
    table = 4 * config.vocab_size * config.hidden_size
    assert largest < table + 4 * 3 * config.hidden_size * config.intermediate_size + table


def test_one_copy_of_a_tied_table(tmp_path: Path) -> None:
    model = empty_model(make_checkpoint(tmp_path, tie_word_embeddings=True))
    load_weights(model, tmp_path)
    assert model.head is model.embedding
    assert model.embedding.weight.tensor is None
    assert model.embedding.table is model.embedding.packed


def test_a_tied_checkpoint_that_holds_an_equal_head(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = logits(folder)
    tensors = make_tensors(make_config(tie_word_embeddings=True))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(folder, tensors)
    assert torch.equal(logits(folder), expected)
    del tensors["model.embed_tokens.weight"]
    write_tensors(folder, tensors)
    assert torch.equal(logits(folder), expected)


def test_a_tied_checkpoint_that_holds_another_head(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = make_tensors(make_config(tie_word_embeddings=True))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load(folder)


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    tensors = make_tensors(make_config())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    write_tensors(folder, tensors)
    load(folder)


def _remove(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(36)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.ones(18, 36)


def _quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(36, dtype=torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove, r"missing.*model\.layers\.1\.mlp\.up_proj\.weight"),
        (_add, r"unexpected tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
        (_reshape, r"k_proj\.weight has shape \[18, 36\].*asks for \[12, 36\]"),
        (_quantize, r"model\.norm\.weight is of type torch\.int8"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_wrong_tensor_is_named(
    damage: Callable[[dict[str, torch.Tensor]], None], message: str, pickled: bool, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, pickled=pickled)
    tensors = make_tensors(make_config())
    damage(tensors)
    write_tensors(folder, tensors, pickled=pickled)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    tensors = make_tensors(make_config())
    (folder / "model-00002-of-00002.safetensors").write_bytes(_safetensors_bytes(tensors))
    with pytest.raises(CheckpointError, match=r"stored twice.*00001.*00002"):
        load(folder)


def _safetensors_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(tensors)


def _header(content: bytes, data: bytes = b"") -> bytes:
    return len(content).to_bytes(8, "little") + content + data


def _entry(**fields: object) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields
    return _header(json.dumps({"model.norm.weight": entry}).encode(), b"\0" * 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\x08\0\0\0", "4 bytes"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "header"),
        (_header(b"{nonsense"), "not JSON"),
        (_header(b"[]"), "not a JSON object"),
        (_header(b"[" * 100_000), "not JSON"),
        (_header(b'{"a": {"dtype": "F32"}}'), "tensor a"),
        (_header(b'{"a": 1}'), "tensor a"),
        (_entry(shape=[3]), "8 bytes for shape"),
        (_entry(shape=[-2]), "malformed"),
        (_entry(data_offsets=[4, 12]), "does not begin"),
        (_entry(data_offsets=[0, 80], shape=[20]), "short"),
        (_entry(shape=[1], data_offsets=[0, 4]), "4 bytes follow"),
        (_header(b'{"a": {}, "a": {}}'), "twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n", "git lfs pull"),
        (_entry(dtype="F8_E4M3", shape=[36], data_offsets=[0, 8]), "F8_E4M3"),
    ],
)
def test_damaged_safetensors(content: bytes, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_truncated_safetensors(keep: float, tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(tmp_path)


class _Hostile:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (exec, ("raise SystemExit('code from the checkpoint ran')",))


@pytest.mark.parametrize(
    "content", [b"not a pickle", pickle.dumps(_Hostile()), pickle.dumps([1, 2])], ids=["text", "code", "list"]
)
def test_a_pickled_file_runs_no_code(content: bytes, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, pickled=True)
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not an index"),
        ("{}", "not an index"),
        ('{"weight_map": {}}', "none at all"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "model-9.safetensors"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder"),
    ],
)
def test_bad_index(index: str, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors or pytorch_model\.bin"):
        load(folder)


def test_load_formats(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    load(folder, "safetensors")
    with pytest.raises(CheckpointError, match="pytorch_model"):
        load(folder, "pt")
    with pytest.raises(ConfigError, match="dummy"):
        load(folder, "gguf")


def test_dummy_weights_follow_the_seed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    first = logits(folder, "dummy", seed=1)
    assert torch.isfinite(first).all()
    assert first.std() > 0
    assert torch.equal(first, logits(folder, "dummy", seed=1))
    assert not torch.equal(first, logits(folder, "dummy", seed=2))


_MEASURE = """
import sys, torch
from octavo.attention.torch_backend import TorchBackend
from octavo.layers.ops import TorchOps
from octavo.models.config import ModelConfig
from octavo.models.registry import build_model
from octavo.models.weights import load_weights

def high_water():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

config = ModelConfig.from_folder(sys.argv[1])
before = high_water()
model = build_model(config, torch.bfloat16, torch.device("cpu"), TorchOps(), TorchBackend())
load_weights(model, sys.argv[1])
print((high_water() - before) / config.weight_bytes("bfloat16"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Weights of 92 MB in twelve layers: the process grows by little more."""
    folder = make_checkpoint(
        tmp_path,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=12,
        vocab_size=8192,
        shards=2,
        torch_dtype="bfloat16",
    )
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder)], capture_output=True, text=True, check=True
    )
    assert float(measured.stdout) < 1.3
