"""Compiling the kernels, loading them, and choosing among them."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.errors import ConfigError, OctavoError
from octavo.kernels.cpu import build, choose, library, onednn
from octavo.kernels.cpu.library import CpuLibraryError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def hidden_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def forget() -> None:
        library._shared_library.cache_clear()
        library.load.cache_clear()

    monkeypatch.setattr(build, "library_name", lambda: "liboctavo_absent.so")
    forget()
    yield
    forget()


def exported(path: Path) -> set[str]:
    """Names in the library's file: crude, but needs no tool."""
    content = path.read_bytes()
    return {
        name
        for name in ("oc_linear", "oc_rms_norm", "oc_decoder_forward")
        for isa in library.ISAS
        if f"{name}__{isa}".encode() in content
    }


@pytest.mark.skipif(build.system_compiler() is None, reason="no system compiler")
def test_each_source_once_or_once_a_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "kernel.c").write_text(
        "#define NAME_(isa) kernel__##isa\n#define NAME(isa) NAME_(isa)\n"
        '__attribute__((visibility("default"))) int NAME(OC_ISA)(void) { return OC_LEVEL; }\n'
    )
    (sources / "single.c").write_text(
        f'{build.BUILT_ONCE}\n__attribute__((visibility("default"))) int single(void) {{ return 7; }}\n'
    )
    monkeypatch.setattr(build, "SOURCES", sources)
    path = build.build(tmp_path / "new folder")
    assert path == tmp_path / "new folder" / build.library_name()
    assert list(path.parent.iterdir()) == [path]
    shared = ctypes.CDLL(str(path))
    assert shared.single() == 7
    levels = library.ISAS if build._is_x86() else ("scalar",)
    assert [getattr(shared, f"kernel__{isa}")() for isa in levels] == list(range(len(levels)))


@pytest.mark.slow
@pytest.mark.skipif(build.system_compiler() is None, reason="no system compiler")
def test_a_system_compiler_builds_the_kernels(tmp_path: Path) -> None:
    path = build.build(tmp_path)
    assert exported(path) == {"oc_linear", "oc_rms_norm", "oc_decoder_forward"}
    check = "import ctypes, sys; assert ctypes.CDLL(sys.argv[1]).oc_cpu_level() >= 0"
    subprocess.run([sys.executable, "-c", check, str(path)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")
@pytest.mark.usefixtures("hidden_compilers")
def test_without_any_compiler_ziglang_builds_it(tmp_path: Path) -> None:
    assert build.find_compiler() == [sys.executable, "-m", "ziglang", "cc"]
    assert exported(build.build(tmp_path)) == {"oc_linear", "oc_rms_norm", "oc_decoder_forward"}


@pytest.mark.usefixtures("hidden_compilers")
def test_no_compiler_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="pip install ziglang"):
        build.find_compiler()


def test_a_compiler_error_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="not-an-option"):
        build.build(tmp_path, [sys.executable, "--not-an-option"])
    assert not list(tmp_path.iterdir())


def test_cc_names_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "ccache gcc")
    assert build.find_compiler() == ["ccache", "gcc"]


@pytest.mark.usefixtures("hidden_compilers")
@pytest.mark.skipif(not (ROOT / "octavo" / "kernels").is_dir(), reason="needs the source tree")
def test_the_backend_asks_for_ziglang_only_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("backend", ROOT / "_build" / "backend.py")
    assert spec is not None
    assert spec.loader is not None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    assert backend._compiler_requirement() == [backend.ZIG]
    monkeypatch.setenv("CC", "gcc")
    assert backend._compiler_requirement() == []


@pytest.mark.usefixtures("no_library")
def test_a_missing_library_is_an_error_that_says_how_to_build() -> None:
    with pytest.raises(CpuLibraryError, match=r"python -m octavo\.kernels\.cpu\.build") as caught:
        library.load()
    assert isinstance(caught.value, OctavoError)


def test_levels() -> None:
    available = library.available_isas()
    assert available == list(library.ISAS[: len(available)])
    assert library.load().isa == available[-1]
    assert library.load("scalar") is library.load("scalar")
    with pytest.raises(CpuLibraryError, match="cannot run the CPU kernels' level 'sse9'"):
        library.load("sse9")


def test_the_choice_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "has_amx_bf16", lambda: False)
    assert choose.choose(torch.bfloat16).name == "octavo"
    assert choose.choose(torch.float32, isa="scalar").reason == "our kernels, level scalar"
    assert choose.choose(torch.float32, name="torch").name == "torch"
    assert choose.choose(torch.float16).name == "torch"
    assert "float16" in choose.choose(torch.float16).reason


def test_the_choice_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "has_amx_bf16", lambda: True)
    monkeypatch.setattr(onednn, "available", lambda: True)
    assert choose.choose(torch.bfloat16).name == "onednn"
    assert choose.choose(torch.bfloat16, name="octavo").name == "octavo"
    assert choose.choose(torch.float32).name == "octavo"


@pytest.mark.usefixtures("no_library")
def test_the_choice_without_our_library() -> None:
    chosen = choose.choose(torch.float32)
    assert chosen.name == "torch"
    assert chosen.library is None
    assert "were not built" in chosen.reason
    with pytest.raises(ConfigError, match="were not built"):
        choose.choose(torch.float32, name="octavo")


def test_a_choice_that_cannot_be_served_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of octavo, onednn, torch"):
        choose.choose(torch.float32, name="mkl")
    with pytest.raises(ConfigError, match="bfloat16"):
        choose.choose(torch.float32, name="onednn")
    with pytest.raises(ConfigError, match="sse9"):
        choose.choose(torch.float32, isa="sse9")
    with pytest.raises(ConfigError, match="choose another dtype"):
        choose.choose(torch.float16, name="octavo")


@pytest.mark.skipif(not onednn.available(), reason="torch has no bf16 oneDNN for this processor")
def test_onednn_has_the_same_interface() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 33, generator=generator).bfloat16()
    x = torch.randn(5, 33, generator=generator).bfloat16()
    bias = torch.randn(70, generator=generator).bfloat16()
    packed = onednn.pack(weight)
    assert torch.equal(onednn.unpack(packed), weight)
    expected = x.double() @ weight.double().T + bias
    y = onednn.linear(x, packed, bias, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-2)
    out = torch.empty(5, 70)
    assert onednn.linear(x, packed, bias, out=out) is out
    assert torch.equal(out, y)
    assert onednn.linear(x[:0], packed).shape == (0, 70)
    with pytest.raises(ValueError, match=r"weight must be torch\.bfloat16"):
        onednn.pack(weight.float())
