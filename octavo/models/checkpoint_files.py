"""The files of a checkpoint: which there are, what they hold, and how to read it with little memory.

safetensors files are read by offset into one buffer that is used again for every tensor: mapped
files would count every page once touched as memory of this process. Pickled files (.bin) are read
only with torch's `weights_only`, which runs no code from the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from octavo.errors import CheckpointError

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MOST_HEADER_BYTES = 100_000_000
_MOST_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB a call


class StoredTensor(Protocol):
    """One tensor in a file."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype | str: ...  # the file's word, where torch has no such type

    @property
    def nbytes(self) -> int: ...

    def read(self, buffer: Buffer) -> torch.Tensor:
        """The numbers; valid until the buffer is used for the next tensor."""
        ...

    def read_into(self, target: torch.Tensor) -> None:
        """The numbers, into a contiguous CPU tensor of the same shape and dtype."""
        ...


class WeightFile(Protocol):
    """One file of a checkpoint."""

    path: Path

    def tensors(self) -> Iterator[StoredTensor]:
        """What the file holds, in the order of its bytes."""
        ...


class Buffer:
    """Memory that grows to the largest tensor and is used for all of them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """The first `nbytes` bytes."""
        if self._bytes.numel() < nbytes:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # free first
            self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        return self._bytes[:nbytes]


@dataclass(frozen=True)
class _SafetensorsEntry:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    nbytes: int
    offset: int  # in the file
    path: Path
    fd: int

    def read(self, buffer: Buffer) -> torch.Tensor:
        """Read the bytes into the buffer."""
        if isinstance(self.dtype, str):
            raise CheckpointError(
                f"{self.path}: tensor {self.name} is of type {self.dtype}, which is not read"
            )
        raw = buffer.take(self.nbytes)
        self._read_bytes(raw)
        return raw.view(self.dtype).view(self.shape)

    def read_into(self, target: torch.Tensor) -> None:
        """Read the bytes into the target."""
        self._read_bytes(target.view(-1).view(torch.uint8))

    def _read_bytes(self, raw: torch.Tensor) -> None:
        view = raw.numpy().data  # shares memory
        done = 0
        while done < self.nbytes:
            got = os.preadv(self.fd, [view[done : done + _MOST_READ_BYTES]], self.offset + done)
            if got <= 0:
                raise CheckpointError(f"{self.path} ends inside tensor {self.name}; download the file again")
            done += got


class SafetensorsFile:
    """A safetensors file: eight bytes of header length, a JSON header, the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tensors(self) -> Iterator[StoredTensor]:
        """In the order of the file. Raises CheckpointError if the file is damaged or short."""
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be opened: {error.strerror}") from error
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            yield from self._entries(fd)
        finally:
            os.close(fd)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {why}; download the file again")

    def _entries(self, fd: int) -> list[_SafetensorsEntry]:
        file_size = os.fstat(fd).st_size
        if file_size < 8:
            raise self._damaged(f"it has {file_size} bytes")
        start_of_file = os.pread(fd, 8, 0)
        if start_of_file == b"version ":  # a text of three lines, where Git LFS was not installed
            raise CheckpointError(
                f"{self.path} holds no weights but a pointer of Git LFS to them: run git lfs pull in its "
                "folder, or download the file again"
            )
        header_size = int.from_bytes(start_of_file, "little")
        if header_size > min(_MOST_HEADER_BYTES, file_size - 8):
            raise self._damaged("its header does not fit into the file, which may be cut short")
        try:
            header = json.loads(os.pread(fd, header_size, 8), object_pairs_hook=self._once)
        except (ValueError, UnicodeDecodeError, RecursionError) as error:
            raise self._damaged("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is not a JSON object")
        start = 8 + header_size
        entries = [
            self._entry(fd, name, value, start) for name, value in header.items() if name != "__metadata__"
        ]
        entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
        end = start
        for entry in entries:
            if entry.offset != end:
                raise self._damaged(f"tensor {entry.name} does not begin where the one before it ends")
            end += entry.nbytes
        if end > file_size:
            raise CheckpointError(
                f"{self.path} is short: it has {file_size} of {end} bytes; download the file again"
            )
        if end < file_size:
            raise self._damaged(f"{file_size - end} bytes follow its last tensor")
        return entries

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
            raise CheckpointError(f"{self.path}: {', '.join(twice)} is in the header twice")
        return names

    def _entry(self, fd: int, name: str, value: Any, start: int) -> _SafetensorsEntry:
        try:
            word, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise self._damaged(f"the header's entry of tensor {name} is not whole") from error
        numbers = (*shape, begin, end)
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or not isinstance(word, str):
            raise self._damaged(f"the header's entry of tensor {name} is malformed")
        dtype = _TORCH_DTYPES.get(word, word)
        if isinstance(dtype, torch.dtype) and end - begin != math.prod(shape) * dtype.itemsize:
            raise self._damaged(f"tensor {name} has {end - begin} bytes for shape {list(shape)} of {word}")
        return _SafetensorsEntry(name, shape, dtype, end - begin, start + begin, self.path, fd)


@dataclass
class _PickledEntry:
    name: str
    tensors: dict[str, torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    nbytes: int

    def read(self, buffer: Buffer) -> torch.Tensor:
        """The tensor, which the file's dict lets go of."""
        return self.tensors.pop(self.name)

    def read_into(self, target: torch.Tensor) -> None:
        """Copy; the file's dict lets go of the tensor."""
        target.copy_(self.tensors.pop(self.name))


class PickledFile:
    """A .bin file: a pickled dict of tensors. Held whole while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tensors(self) -> Iterator[StoredTensor]:
        """In the order of the dict."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a hostile or broken pickle ends in
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{self.path} cannot be read as plain weights ({first}); "
                f"take the checkpoint's safetensors files, or download the file again"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.path} holds no dict of tensors; take the safetensors files")
        for name, value in list(state.items()):
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(f"{self.path}: {name!r} is {type(value).__name__}, not a tensor")
            yield _PickledEntry(str(name), state, tuple(value.shape), value.dtype, value.nbytes)


def checkpoint_files(folder: Path, load_format: str = "auto") -> list[WeightFile]:
    """The weight files of a model folder; `load_format` auto prefers safetensors over pickled files.

    Raises CheckpointError if there are none, or if an index names one that is not there.
    """
    kinds: list[tuple[str, str, Callable[[Path], WeightFile]]] = []
    if load_format in ("auto", "safetensors"):
        kinds.append(("safetensors", "model", SafetensorsFile))
    if load_format in ("auto", "pt"):
        kinds.append(("bin", "pytorch_model", PickledFile))
    for suffix, stem, make in kinds:
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return [make(single)]
        if index.is_file():
            return [make(path) for path in _files_of_index(index)]
    wanted = " or ".join(f"{stem}.{suffix}" for suffix, stem, _ in kinds)
    raise CheckpointError(
        f"{folder} holds no weights: no {wanted}, and no index of shards; download the model again"
    )


def _files_of_index(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weight files; download it again") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its folder: {name}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{index} names files that are not there: {', '.join(missing) or 'none at all'}; "
            f"download the model again"
        )
    return [index.parent / name for name in names]
