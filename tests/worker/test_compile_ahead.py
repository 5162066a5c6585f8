"""Kernels compiled by threads before the first launch, for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from octavo.config import EngineArgs, EngineConfig
from octavo.engine.setup import resolve
from octavo.platform import Gpu
from tests.checkpoints import make_checkpoint

pytest.importorskip("triton")

from octavo.worker import build
from octavo.worker.compile_ahead import compile_ahead, compile_what_is_missing
from octavo.worker.kv_cache import MemoryPlan

H200 = Gpu(0, "NVIDIA H200", (9, 0), 150 * 10**9)

# Triton compiles for a GPU that is only named, and launches are noted.
SCRIPT = """
import threading
import time

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import build, driver

launched, loaded, begun, modules = [], [], [], []
second, loading = threading.Event(), threading.Lock()

def load(name, path):
    assert loading.acquire(blocking=False), "two launchers loaded at once"
    time.sleep(0.3)  # the other is done building by then
    modules.append(path)
    loading.release()

build._load_module_from_path = load

class Launcher:
    def __init__(self, source, metadata):
        self.name = source.name
        if threading.current_thread().name.startswith("octavo-compile"):
            begun.append(self.name)
            if len(begun) > 1:
                second.set()
            assert second.wait(200), "the launchers are built one behind the other"
            build._load_module_from_path("launcher", self.name)
    def __call__(self, *given): launched.append(self.name)

class Utils:
    def get_device_properties(self, device): return {"max_shared_mem": 232448}
    def load_binary(self, name, code, shared, device):
        loaded.append((name, threading.current_thread().name))
        return 1, 1, 32, 0, 1024

class Named:
    launcher_cls, utils = Launcher, Utils()
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Named())
from octavo.kernels.triton import rules
from octavo.worker.compile_ahead import compiled_by_threads
from triton import knobs

compiled = []
knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what["fn"].name)
logits = torch.zeros(2, 40)
entries = torch.zeros(2, 2, dtype=torch.int32)
numbers = torch.zeros(4, 64, dtype=torch.int32)
with compiled_by_threads(2):
    for _ in range(2):
        rules.mask_rows(logits, entries, numbers)
        rules.apply(logits, entries, 1, torch.ones(2, dtype=torch.int64), numbers, numbers,
                    torch.zeros(64, 40, dtype=torch.int32))
    assert not launched, launched
    # an engine that serves beside this one
    other = threading.Thread(target=rules.mask_rows, args=(logits, entries, numbers[:, :32].contiguous()))
    other.start()
    other.join()
    assert launched == ["mask_kernel"], launched
    launched.clear()
three = ["edit_kernel", "mask_kernel", "penalize_kernel"]
by_pool = sorted(name for name, thread in loaded if thread.startswith("octavo-compile"))
assert by_pool == three, loaded
assert set(compiled) == set(three), compiled
assert sorted(modules) == three, modules
assert build._load_module_from_path is load
assert not launched, launched
before = len(compiled), len(loaded)
rules.mask_rows(logits, entries, numbers)
assert launched == ["mask_kernel"], launched
assert (len(compiled), len(loaded)) == before
"""


def test_each_form_is_compiled_once_and_nothing_launched(tmp_path: Path) -> None:
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("*/*.cubin"))) == 3


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    config = resolve(EngineArgs(model=str(make_checkpoint(tmp_path / "m")), device="cpu"))
    return replace(config, platform=replace(config.platform, device="cuda", gpus=(H200,)))


def test_a_configuration_is_compiled_once(config: EngineConfig) -> None:
    done: list[int] = []

    def times(config: EngineConfig) -> int:
        compile_what_is_missing(config, lambda: done.append(1))
        return len(done)

    assert times(config) == 1
    assert times(config) == 1
    # neither the weights nor the number of layers matters to a kernel
    moved = replace(config.model, model_path="elsewhere")
    assert times(replace(config, model_path=Path("elsewhere"), model=moved)) == 1
    deeper = replace(config.model, num_layers=9, sliding_windows=(None,) * 9)
    assert times(replace(config, model=deeper)) == 1
    assert times(replace(config, dtype="float16")) == 2
    assert times(replace(config, model=replace(config.model, head_dim=64))) == 3
    other = replace(H200, name="NVIDIA L4", capability=(8, 9))
    assert times(replace(config, platform=replace(config.platform, gpus=(other,)))) == 4


def test_a_failure_leaves_no_mark(config: EngineConfig) -> None:
    def fail() -> None:
        raise ValueError("out of something")

    with pytest.raises(ValueError, match="out of something"):
        compile_what_is_missing(config, fail)
    done: list[int] = []
    compile_what_is_missing(config, lambda: done.append(1))
    assert done == [1]


def test_a_cache_that_cannot_be_written_to_is_no_error(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    done: list[int] = []
    for _ in range(2):
        compile_what_is_missing(config, lambda: done.append(1))
    assert done == [1, 1]


@pytest.mark.parametrize("drafts", [False, True])
def test_what_is_built_to_compile_is_small_and_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafts: bool
) -> None:
    """One layer, no weights, room for one long context; with the draft model that goes with it."""
    target = make_checkpoint(tmp_path / "m", num_hidden_layers=3, max_position_embeddings=16384)
    speculative = {"method": "draft_model", "model": str(target)} if drafts else None
    config = resolve(EngineArgs(model=str(target), device="cpu", speculative=speculative))
    config = replace(config, platform=replace(config.platform, device="cuda", gpus=(H200,)))
    built: list[tuple[EngineConfig, MemoryPlan]] = []
    monkeypatch.setattr(build, "build_runner", lambda config, kernels, plan: built.append((config, plan)))
    compile_ahead(replace(config, max_num_batched_tokens=8192))
    ((small, plan),) = built
    assert (small.model.num_layers, small.args.load_format) == (1, "dummy")
    assert plan.num_blocks * small.args.block_size >= plan.max_model_len == 8192
    assert (small.draft is not None) == drafts
    assert (plan.num_draft_blocks > 0) == drafts
    if small.draft is not None:
        assert small.draft.model.num_layers == 1
