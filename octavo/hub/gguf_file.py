"""Reads a GGUF file: its metadata, and where each tensor lies.

GGUF is llama.cpp's single-file format: a magic number, key/value metadata (the model's settings
and the whole tokenizer), a table of tensors, then the tensors' bytes. The format is specified in
ggml's `docs/gguf.md`. Nothing read here is believed before it is checked against the size of the
file, so that a truncated or damaged file is an error which says what is wrong with it.

The `gguf` package has a reader too; this one is twenty times faster on files with a large
vocabulary (it makes no array per string), which is what the first start of a model waits for.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from octavo.errors import CheckpointError, UnsupportedModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


class TensorType(NamedTuple):
    """How a kind of tensor is stored: so many elements in a block of so many bytes."""

    name: str
    block_elements: int
    block_bytes: int


TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    20: TensorType("IQ4_NL", 32, 18),
    23: TensorType("IQ4_XS", 256, 136),
    30: TensorType("BF16", 1, 2),
}

# GGUF's numbers for metadata types.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: dict[int, str] = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class GGUFTensor(NamedTuple):
    """One entry of the tensor table. `shape` is in row-major order: (rows, row length)."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int

    @property
    def type(self) -> TensorType:
        return TENSOR_TYPES[self.type_id]


class GGUFFile:
    """An open GGUF file. Tensor bytes stay on disk until they are asked for."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is damaged, UnsupportedModelError for other kinds."""
        self.path = path
        try:
            with path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise damaged(path, str(error)) from error
        self._position = 0
        self.metadata = {}
        self.tensors = {}
        self._read()

    def bytes_of(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """The tensor's stored bytes, as a view of the file.  # [nbytes]"""
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)

    def _read(self) -> None:
        if self._take(4) != MAGIC:
            self._fail("it does not begin with the letters GGUF")
        version = self._integer("<I")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise UnsupportedModelError(
                    f"{self.path} is a big-endian GGUF file; convert it to little-endian."
                )
            self._fail(f"its format version is {version}, and versions {VERSIONS} are known")
        num_tensors = self._count("<Q", 24, "tensors")
        num_fields = self._count("<Q", 13, "metadata fields")
        for _ in range(num_fields):
            key = self._string("a metadata key")
            if key in self.metadata:
                self._fail(f"the metadata key {key!r} occurs twice")
            self.metadata[key] = self._value(self._integer("<I"), key)
        split = self.metadata.get("split.count", 0)
        if isinstance(split, int) and split > 1:
            raise UnsupportedModelError(
                f"{self.path} is one of {split} parts of a split GGUF file.\n"
                "Join them first: llama-gguf-split --merge FIRST_PART OUTPUT.gguf"
            )
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        self._place_tensors(entries)

    def _tensor_entry(self) -> GGUFTensor:
        name = self._string("a tensor's name")
        dimensions = self._integer("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self._fail(f"tensor {name!r} has {dimensions} dimensions")
        # GGUF lists the fastest running dimension first.
        shape = tuple(self._integer("<Q") for _ in range(dimensions))[::-1]
        type_id = self._integer("<I")
        if type_id not in TENSOR_TYPES:
            known = ", ".join(kind.name for kind in TENSOR_TYPES.values())
            raise UnsupportedModelError(
                f"{self.path}: tensor {name!r} is stored as GGML type {type_id}, which cannot be read.\n"
                f"Take a file with one of these: {known}."
            )
        return GGUFTensor(name, type_id, shape, self._integer("<Q"), 0)

    def _place_tensors(self, entries: list[GGUFTensor]) -> None:
        """Turn offsets within the data section into offsets in the file, checking every extent."""
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self._fail(f"general.alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        for name, type_id, shape, offset, _ in entries:
            kind = TENSOR_TYPES[type_id]
            if name in self.tensors:
                self._fail(f"tensor {name!r} occurs twice")
            if shape[-1] % kind.block_elements or 0 in shape:
                self._fail(f"tensor {name!r} has shape {list(shape)}, which {kind.name} cannot hold")
            elements = 1
            for size in shape:
                elements *= size
            nbytes = elements // kind.block_elements * kind.block_bytes
            end = start + offset + nbytes
            if end > len(self._map):
                self._fail(
                    f"it is cut short: tensor {name!r} ends at byte {end:,}, the file at {len(self._map):,}"
                )
            self.tensors[name] = GGUFTensor(name, type_id, shape, start + offset, nbytes)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            self._fail(f"metadata field {key!r} has the unknown type {kind}")
        return self._scalars(kind, 1)[0]

    def _array(self, key: str) -> list[Any]:
        kind = self._integer("<I")
        if kind == _STRING:
            count = self._count("<Q", 8, f"strings in {key!r}")
            return self._strings(count, key)
        if kind not in _SCALARS:
            self._fail(f"metadata field {key!r} is an array of the unknown type {kind}")
        count = self._count("<Q", np.dtype(_SCALARS[kind]).itemsize, f"items in {key!r}")
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        raw = self._take(dtype.itemsize * count)
        values: list[Any] = np.frombuffer(raw, dtype).tolist()
        return values

    def _strings(self, count: int, key: str) -> list[str]:
        """A hundred thousand of these make a vocabulary, hence the flat loop."""
        data, size, position = self._map, len(self._map), self._position
        length_of = struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_of(data, position)[0]
                if position > size:
                    self._fail(f"it is cut short in {key!r}")
                found.append(data[start:position].decode())
        except struct.error:
            self._fail(f"it is cut short in {key!r}")
        except UnicodeDecodeError as error:
            self._fail(f"{key!r} holds text that is not UTF-8 ({error.reason})")
        self._position = position
        return found

    def _string(self, what: str) -> str:
        return self._strings(1, what)[0]

    def _integer(self, layout: str) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _count(self, layout: str, least_bytes: int, what: str) -> int:
        """A number of things that follow, each at least so large: so it cannot be absurd."""
        count = self._integer(layout)
        if count * least_bytes > len(self._map) - self._position:
            self._fail(f"it claims {count:,} {what}, more than the file can hold")
        return count

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._map):
            self._fail(f"it is cut short in its header, at byte {len(self._map):,}")
        taken = self._map[self._position : end]
        self._position = end
        return taken

    def _fail(self, problem: str) -> NoReturn:
        raise damaged(self.path, problem)


def inexpressible(path: Path, problem: str) -> UnsupportedModelError:
    """The error for a file that is sound but cannot be expressed as a checkpoint we know."""
    return UnsupportedModelError(
        f"{path}: {problem}.\n"
        "Use the model's original checkpoint (a hub id or a folder with config.json) instead."
    )


def damaged(path: Path, problem: str) -> CheckpointError:
    """The error for a GGUF file that cannot be what it claims to be."""
    return CheckpointError(f"{path} cannot be read as a GGUF file: {problem}.\nDownload or convert it again.")
