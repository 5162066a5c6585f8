"""`octavo models`, `env` and `plan`: each asks one module and prints what it says."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from octavo.config import EngineArgs, EngineConfig
from octavo.errors import InsufficientMemoryError
from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Cli


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both caches empty; returns the root of Octavo's."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "octavo"))
    # huggingface-hub reads its environment at import, which may have happened already
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "octavo"


def test_models_lists_what_is_supported(cli: Cli, caches: Path) -> None:
    from octavo import hub
    from octavo.models.config import SUPPORTED_ARCHITECTURES

    result = cli("models")
    assert result.code == 0
    for name in [*SUPPORTED_ARCHITECTURES, *hub.ALIASES]:
        assert name in result.out
    assert result.out.count("none") == 2


def test_models_lists_whole_folders_of_the_cache(cli: Cli, caches: Path) -> None:
    for name, config in (("whole", b"{}"), ("damaged", b"{")):
        folder = caches / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes(b"x" * 3_000_000)
        record = {"source": "gguf", "file": "/somewhere/a.gguf", "files": {"config.json": 2}}
        (folder / "octavo.json").write_text(json.dumps(record))
    result = cli("models")
    assert "models/whole" in result.out
    assert "3 MB, from /somewhere/a.gguf" in result.out
    assert "damaged" not in result.out


def test_env_prints_the_description(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import octavo

    platform = types.ModuleType("octavo.platform")
    vars(platform)["describe"] = lambda: "two cores"
    monkeypatch.setitem(sys.modules, "octavo.platform", platform)
    monkeypatch.setitem(vars(octavo), "platform", platform)
    assert cli("env").out == "two cores\n"


def test_env_warm_compiles_for_the_options_given(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from octavo.worker import compile_ahead

    seen: list[tuple[str, int]] = []

    def compile_nothing(config: EngineConfig) -> None:
        seen.append((config.args.model, config.max_num_seqs))

    monkeypatch.setattr(compile_ahead, "compile_ahead", compile_nothing)
    folder = make_checkpoint(tmp_path / "m", "LlamaForCausalLM")
    result = cli("env", "--warm", str(folder), "--max-num-seqs", "3", "--device", "cpu")
    assert "are compiled" in result.out
    assert seen == [(str(folder), 3)]


def test_env_warm_says_why_there_is_nothing_to_do(cli: Cli, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "LlamaForCausalLM")
    result = cli("env", "--warm", str(folder), "--device", "cpu")
    assert result.code == 2
    assert "no kernels to compile ahead" in result.err


def test_a_model_is_cut_to_one_layer_of_each_kind(tmp_path: Path) -> None:
    from octavo.models.config import ModelConfig
    from octavo.worker.compile_ahead import one_layer_of_each_kind

    folder = make_checkpoint(tmp_path / "m", "LlamaForCausalLM")
    model = replace(ModelConfig.from_folder(folder), num_layers=4, sliding_windows=(None, 8, None, 8))
    small = one_layer_of_each_kind(model)
    assert (small.num_layers, small.sliding_windows) == (2, (None, 8))
    assert small.hidden_size == model.hidden_size


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[EngineArgs]:
    """A stand-in for octavo.engine.setup; returns what it was asked for."""
    import octavo.engine

    asked: list[EngineArgs] = []

    def plan(args: EngineArgs) -> str:
        asked.append(args)
        if args.max_model_len == 999_999:
            raise InsufficientMemoryError("lower max_model_len to 4096")
        return "weights 269 MB"

    setup = types.ModuleType("octavo.engine.setup")
    vars(setup)["plan"] = plan
    monkeypatch.setitem(sys.modules, "octavo.engine.setup", setup)
    monkeypatch.setitem(vars(octavo.engine), "setup", setup)
    return asked


def test_plan_prints_the_plan(cli: Cli, planned: list[EngineArgs]) -> None:
    assert cli("plan", "m", "--kv-cache-memory", "256MB").out == "weights 269 MB\n"
    assert planned == [EngineArgs(model="m", kv_cache_memory="256MB")]


def test_plan_that_does_not_fit_fails(cli: Cli, planned: list[EngineArgs]) -> None:
    result = cli("plan", "m", "--max-model-len", "999999")
    assert (result.code, result.out) == (1, "")
    assert result.err == "octavo: error: lower max_model_len to 4096\n"
