"""Quick launches take the compiled form that Triton would take, and give it what Triton would give it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import octavo.kernels.triton as kernels
from octavo.kernels.triton import quick
from octavo.kernels.triton.quick import Kernel


def _add(x_ptr, y_ptr, count, stride, eps, WIDTH: tl.constexpr, ADDS: tl.constexpr = True):  # type: ignore[no-untyped-def]
    pass


def _copy(x_desc, out_ptr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


def _names(at_ptr, stream, key, form, grid, x, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


class _Compiled:
    """What Triton returns of a launch."""

    function = 77
    packed_metadata = (4, 1, 0)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.launches.append(args)


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> list[_Compiled]:
    """Each launch that went the usual way."""
    made: list[_Compiled] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> _Compiled:
        made.append(_Compiled())
        return made[-1]

    monkeypatch.setattr(Kernel, "run", run)
    monkeypatch.setattr(quick, "where", lambda: (0, 5))
    return made


def _kernel() -> Any:
    return Kernel(_add, do_not_specialize=["count"])


_X = torch.zeros(64)
_Y = torch.zeros(64, dtype=torch.bfloat16)


def test_the_second_launch_hands_over_what_the_compiled_kernel_takes(usual: list[_Compiled]) -> None:
    kernel = _kernel()
    kernel[(3,)](_X, None, 7, 32, 0.5, WIDTH=64, num_warps=4)
    kernel[(9, 2)](_X, None, 8, 48, 1.5, WIDTH=64, num_warps=4)
    assert len(usual) == 1
    (launch,) = usual[0].launches
    assert launch[:9] == (9, 2, 1, 5, 77, (4, 1, 0), None, None, None)
    assert launch[9:] == (_X.data_ptr(), None, 8, 48, 1.5, 64, True)


@pytest.mark.parametrize(
    "other",
    [
        lambda k: k[(1,)](_Y, _X, 3, 32, 0.5, WIDTH=64),  # another type
        lambda k: k[(1,)](_X, None, 3, 32, 0.5, WIDTH=64),  # nothing where there was a tensor
        lambda k: k[(1,)](_X[1:], _X, 3, 32, 0.5, WIDTH=64),  # another alignment
        lambda k: k[(1,)](_X, _X, 3, 33, 0.5, WIDTH=64),  # no multiple of 16
        lambda k: k[(1,)](_X, _X, 3, 1, 0.5, WIDTH=64),
        lambda k: k[(1,)](_X, _X, 3, 32, 0.5, WIDTH=32),
        lambda k: k[(1,)](_X, _X, 3, 32, 0.5, WIDTH=64, ADDS=False),
        lambda k: k[(1,)](_X, _X, 3, 32, 0.5, WIDTH=64, num_warps=8),
    ],
)
def test_what_is_compiled_anew_goes_the_usual_way(
    usual: list[_Compiled], other: Callable[[Any], Any]
) -> None:
    kernel = _kernel()
    kernel[(1,)](_X, _X, 3, 32, 0.5, WIDTH=64)
    other(kernel)
    assert len(usual) == 2
    other(kernel)
    assert len(usual) == 2
    assert len(usual[1].launches) == 1


def test_what_changes_no_form_is_quick(usual: list[_Compiled]) -> None:
    kernel = _kernel()
    kernel[(1,)](_X, _X, 3, 32, 0.5, WIDTH=64)
    kernel[(1,)](_X.clone(), _X[16:], 1, 64, 2.5, WIDTH=64)  # `count` is not specialized on
    assert len(usual) == 1


def test_other_devices_have_other_forms(usual: list[_Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _kernel()
    kernel[(1,)](_X, _X, 3, 32, 0.5, WIDTH=64)
    monkeypatch.setattr(quick, "where", lambda: (1, 5))
    kernel[(1,)](_X, _X, 3, 32, 0.5, WIDTH=64)
    assert len(usual) == 2


def test_a_parameter_may_have_any_name(usual: list[_Compiled]) -> None:
    kernel = Kernel(_names, do_not_specialize=["stream"])
    for number in (3, 4):
        kernel[(9,)](_X, number, 5, 6, 7, 8, WIDTH=64)
    ((*before, address, stream, key, form, grid, x, width),) = usual[0].launches
    assert before[:4] == [9, 1, 1, 5]
    assert (address, stream, key, form, grid, x, width) == (_X.data_ptr(), 4, 5, 6, 7, 8, 64)


def test_descriptors_are_told_apart_by_what_they_load(usual: list[_Compiled]) -> None:
    kernel = Kernel(_copy)
    for block in ([16], [32], [32]):
        kernel[(1,)](TensorDescriptor(_X, [64], [1], block), _Y, WIDTH=64)
    assert len(usual) == 2
    ((*_, descriptor, address, width),) = usual[1].launches
    assert (descriptor.block_shape, address, width) == ([32], _Y.data_ptr(), 64)


def test_what_cannot_be_told_apart_goes_the_usual_way(usual: list[_Compiled]) -> None:
    kernel = _kernel()
    for _ in range(2):
        kernel[(1,)](_X, _X, 3, 32, 0.5, 64)  # a constant by position
        kernel[(1,)](_X, _X, 3, True, 0.5, WIDTH=64)
        kernel[(1,)](_X, _X, 2**40, 32, 0.5, WIDTH=64)
    assert len(usual) == 6


def test_a_recording_is_repeated_with_other_tensors(usual: list[_Compiled]) -> None:
    kernel = _kernel()
    weights, others, buffer = torch.zeros(16), torch.ones(16), torch.zeros(16)
    kernel[(3,)](_X, weights, 7, 32, 0.5, WIDTH=64)
    with quick.recorded() as recording:
        kernel[(3,)](_X, weights, 7, 32, 0.5, WIDTH=64)
        quick.call(torch.add, weights, 1, out=buffer)
    kernel[(3,)](_X, weights, 9, 32, 0.5, WIDTH=64)  # behind it: not recorded
    assert recording.is_whole
    recording.bind([None, weights])
    usual[0].launches.clear()
    recording.repeat([None, others])
    (launch,) = usual[0].launches
    assert launch[:4] == (3, 1, 1, 5)
    assert launch[9:] == (_X.data_ptr(), others.data_ptr(), 7, 32, 0.5, 64, True)
    assert buffer.tolist() == [2.0] * 16
    recording.repeat([None, weights])
    assert usual[0].launches[-1][10] == weights.data_ptr()
    assert buffer.tolist() == [1.0] * 16


def test_a_recording_without_a_launch_is_not_whole(usual: list[_Compiled]) -> None:
    with quick.recorded() as recording:
        _kernel()[(3,)](_X, _X, 7, 32, 0.5, WIDTH=64)
    assert not recording.is_whole


def test_who_watches_launches_sees_all(usual: list[_Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _kernel()
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
    for _ in range(2):
        kernel[(1,)](_X, _X, 3, 32, 0.5, WIDTH=64)
    assert len(usual) == 2


def test_a_kernel_can_be_compiled_like_any_other() -> None:
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "count": "i32", "stride": "i32", "eps": "fp32"}
    source = ASTSource(
        _kernel(), {**signature, "WIDTH": "constexpr", "ADDS": "constexpr"}, {"WIDTH": 1, "ADDS": True}
    )
    assert source.fn.arg_names[0] == "x_ptr"


def test_every_kernel_launched_from_the_host_is_declared_as_one() -> None:
    """Another one's launches would be missing in a recording."""
    launched: dict[str, set[str]] = {}
    for file in Path(kernels.__path__[0]).glob("*.py"):
        for name in re.findall(r"(\w+)\[\(", file.read_text()):
            launched.setdefault(name, set()).add(file.stem)
    names = {name for name in launched if name.endswith("_kernel")}
    assert len(names) > 30
    for stem in sorted(set().union(*launched.values())):
        for name, found in vars(importlib.import_module(f"{kernels.__name__}.{stem}")).items():
            assert name not in names or isinstance(found, Kernel), f"{stem}.{name}"
