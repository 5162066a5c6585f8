"""What is done while torch is imported: on the side, once, and undone at the end."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import pytest

from octavo.platform import head_start as module
from octavo.platform.head_start import head_start


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.fixture
def before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.usefixtures("before_torch")
def test_a_gpu_gets_its_kernels_names_worked_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hashed, go_on = threading.Event(), threading.Event()

    def hash_triton() -> None:
        hashed.set()
        go_on.wait(60)

    monkeypatch.setattr(module, "_hash_triton", hash_triton)
    monkeypatch.setattr(module, "_NVIDIA_DRIVER", tmp_path)  # something that exists
    before = sys.getswitchinterval()
    with head_start():
        assert hashed.wait(60)
        assert "octavo-head-start" in threads()
        assert sys.getswitchinterval() == pytest.approx(0.0005)
        assert not gc.isenabled()
    assert sys.getswitchinterval() == pytest.approx(before)
    assert gc.isenabled()
    threading.Timer(0.05, go_on.set).start()
    module.wait_for_digest()
    assert "octavo-head-start" not in threads()


@pytest.mark.usefixtures("before_torch")
def test_what_was_imported_is_not_looked_at_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    enable = gc.enable
    oldest: list[int] = []

    def look_and_enable() -> None:
        oldest.extend(map(id, gc.get_objects(2)))
        enable()

    monkeypatch.setattr(module, "_NVIDIA_DRIVER", tmp_path / "missing")
    monkeypatch.setattr(gc, "enable", look_and_enable)
    with head_start():
        made: list[list[int]] = [[] for _ in range(100)]
    assert set(map(id, made)) <= set(oldest)
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("before_torch")
def test_without_a_gpu_nothing_is_hashed_and_an_error_goes_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_hash_triton", lambda: pytest.fail("nobody asked for it"))
    monkeypatch.setattr(module, "_NVIDIA_DRIVER", tmp_path / "missing")
    with pytest.raises(ImportError), head_start():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with head_start():
            pass
        assert not gc.isenabled()  # whoever turned it off wants it off
    finally:
        gc.enable()


def test_nothing_happens_behind_torch() -> None:
    pytest.importorskip("torch")
    with head_start():
        assert gc.isenabled()


def test_the_digest_is_the_one_triton_asks_for() -> None:
    pytest.importorskip("triton")
    from triton.runtime.cache import triton_key

    module._hash_triton()
    assert triton_key.cache_info().currsize == 1
