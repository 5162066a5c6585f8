"""Launches that cost the host little.

Triton looks at each argument of each launch, at its own settings, and asks the driver about every pointer:
some 20 microseconds a launch, ten launches a layer with the library's. A step with a long prompt is launched
from Python, kernel by kernel, and the device is done with a small model's sooner. Two things help:

- A launch whose form was seen before finds its compiled kernel under a key of what Triton specializes on, and
  hands over addresses instead of tensors. The first launch of a form goes the usual way, which compiles,
  checks and explains.
- What is launched for one layer is launched for the next ones again, with other weights: `recorded` keeps a
  layer's launches, and `Recording.repeat` makes them anew without going through the code that led to them.

Only kernels declared with `kernel` are launched so. Their arguments are told apart by name: `_ptr` is a
tensor or None, `_desc` a tensor descriptor, all else a number.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_USUAL = JITFunction.run  # who puts another in its place wants to see every launch


class _State(threading.local):
    recording: Recording | None = None


_state = _State()


class _Repeated(NamedTuple):
    """A launch, or a call of the library, as it was made."""

    function: Callable[..., Any]
    before: tuple[Any, ...]  # arguments that stay
    values: list[Any]
    behind: tuple[Any, ...]  # these too
    options: dict[str, Any]
    held: Any  # what must live as long as the recording


class Recording:
    """The launches of one layer, to be made again for others."""

    def __init__(self) -> None:
        self.is_whole = True  # every launch is here
        self._made: list[_Repeated] = []
        self._changes: list[list[tuple[int, int, bool]]] = []  # of each: place, which tensor, as an address

    def add(
        self,
        function: Callable[..., Any],
        before: tuple[Any, ...],
        values: Sequence[Any],
        behind: tuple[Any, ...],
        options: dict[str, Any],
        held: Any,
    ) -> None:
        """Something was just launched by function(*before, *values, *behind, **options)."""
        self._made.append(_Repeated(function, before, list(values), behind, options, held))

    def bind(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """These tensors are the ones that differ from layer to layer: the recorded layer's."""
        by_address = {t.data_ptr(): which for which, t in enumerate(tensors) if t is not None}
        by_identity = {id(t): which for which, t in enumerate(tensors) if t is not None}

        def change(place: int, value: Any) -> tuple[int, int, bool] | None:
            is_address = type(value) is int
            which = by_address.get(value) if is_address else by_identity.get(id(value))
            return None if which is None else (place, which, is_address)

        for made in self._made:
            changes = (change(place, value) for place, value in enumerate(made.values))
            self._changes.append([found for found in changes if found is not None])

    def repeat(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """The same launches for another layer's tensors, in the order of `bind`."""
        for made, changes in zip(self._made, self._changes, strict=True):
            values = made.values
            for place, which, is_address in changes:
                tensor = tensors[which]
                assert tensor is not None
                values[place] = tensor.data_ptr() if is_address else tensor
            made.function(*made.before, *values, *made.behind, **made.options)


@contextmanager
def recorded() -> Iterator[Recording]:
    """What this thread launches in here, by kernels declared below and by `call`."""
    assert _state.recording is None, "recordings do not nest"
    _state.recording = recording = Recording()
    try:
        yield recording
    finally:
        _state.recording = None


def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A call of the library that launches something and needs nothing of what it returns."""
    recording = _state.recording
    if recording is not None:
        recording.add(function, (), args, (), options, None)
    return function(*args, **options)


class _Form(NamedTuple):
    """A compiled kernel, and what stands behind the arguments given by position."""

    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]


class Kernel(JITFunction):
    """A kernel whose later launches are quick."""

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        super().__init__(fn, **options)
        self._given = [p for p in self.params if not p.is_constexpr]
        self._forms: dict[Any, _Form] = {}
        # A loop over the arguments would cost more than all the rest: the function is written out.
        source = _launcher(self._given)
        names: dict[str, Any] = {
            "_kernel": self, "_forms": self._forms, "_where": lambda: where(), "_JITFunction": JITFunction,
            "_USUAL": _USUAL, "_state": _state,
        }  # fmt: skip
        exec(source, names)
        self._launch = names["_launch"]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """What launches it: arguments by position, constants and Triton's own options by name."""
        return partial(self._launch, grid)

    def launch_as_usual(self, key: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The first launch of a form. `key`: where to find it from now on; None: nowhere."""
        if _state.recording is not None:
            _state.recording.is_whole = False
        compiled = self.run(*args, grid=grid, warmup=False, **options)
        function = getattr(compiled, "function", None)
        named = {p.name for p in self._given}
        if key is not None and function is not None and named.isdisjoint(options):
            behind = (p for p in self.params if p.is_constexpr)
            constants = tuple(options.get(p.name, p.default) for p in behind)
            self._forms[key] = _Form(compiled.run, function, compiled.packed_metadata, constants)
        return compiled


class _Interpreted:
    """A kernel that runs in Triton's interpreter: only recorded like the others."""

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        self._made = triton.jit(**options)(fn)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if _state.recording is not None:
            _state.recording.add(self._made[grid], (), args, (), options, None)
        self._made[grid](*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)


def kernel(*, do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` for what is launched from the host. Constants stand behind all other parameters."""

    def decorate(fn: Callable[..., Any]) -> Any:
        kind = _Interpreted if triton.knobs.runtime.interpret else Kernel
        return kind(fn, do_not_specialize=list(do_not_specialize))

    return decorate


def where() -> tuple[int, int]:
    """(the current device, its current stream)"""
    device = driver.active.get_current_device()
    return device, driver.active.get_current_stream(device)


def _launcher(given: Sequence[Any]) -> str:
    """The source of a kernel's launch, for the parameters that are no constants."""
    key, values, plain = [], [], []
    for parameter in given:
        name, is_specialized = parameter.name, not parameter.do_not_specialize
        if name.endswith("_desc"):
            key.append(f"{name}.base.dtype, *{name}.block_shape")
            values.append(name)
        elif name.endswith("_ptr"):
            key.append(f"None if {name} is None else {name}.dtype")
            address = f"None if {name} is None else {name}.data_ptr()"
            if is_specialized:  # on being aligned to 16 bytes
                key.append(f"(_at_{name} := {address}) is None or _at_{name} & 15 == 0")
                values.append(f"_at_{name}")
            else:
                values.append(f"({address})")
        else:
            is_narrow = f"{name}.__class__ is int and -2147483648 <= {name} < 2147483648"
            plain.append(f"({is_narrow} or {name}.__class__ is float)")
            key.append(f"{name}.__class__")
            if is_specialized:
                key.append(f"{name} == 1, {name} % 16 == 0")
            values.append(name)
    names = ", ".join(parameter.name for parameter in given)
    assert not any(parameter.name.startswith("_") for parameter in given), "such names are the launch's own"
    handed = ", ".join(values)
    return f"""
def _launch(_grid, {names}, *_others, **_options):
    if _others or _JITFunction.run is not _USUAL or not ({" and ".join(plain) or True}):
        return _kernel.launch_as_usual(None, _grid, ({names}, *_others), _options)
    _device, _stream = _where()
    _key = (_device, {", ".join(key)}, *_options.items())
    _form = _forms.get(_key)
    if _form is None:
        return _kernel.launch_as_usual(_key, _grid, ({names},), _options)
    _run, _function, _metadata, _constants = _form
    _x, _y, _z = (*_grid, 1, 1)[:3]
    if _state.recording is not None:
        _before = _x, _y, _z, _stream, _function, _metadata, None, None, None
        _state.recording.add(_run, _before, ({handed},), _constants, {{}}, ({names},))
    _run(_x, _y, _z, _stream, _function, _metadata, None, None, None, {handed}, *_constants)
"""
