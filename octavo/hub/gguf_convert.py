"""Turns a GGUF file into an ordinary checkpoint folder, dequantised.

The weights are streamed: a slice of rows is dequantised (by the `gguf` package), rounded to the
checkpoint's dtype and written where it belongs, on a few threads, so that memory stays at a few
megabytes whatever the model's size. The checkpoint is cached under the identity of the file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.errors import ConfigError, ModelError, OctavoError
from octavo.hub.cache import CONVERSION_VERSION, publish
from octavo.hub.gguf_config import make_config, make_generation_config
from octavo.hub.gguf_file import GGUFFile, damaged
from octavo.hub.gguf_layout import TargetTensor, plan_tensors
from octavo.hub.gguf_tokenizer import write_tokenizer
from octavo.hub.progress import ByteProgress, note

# Elements per slice: its float32 form stays in a core's second-level cache (measured on SmolLM2,
# two threads: 0.26 s with 128 Ki elements, 0.43 s with 1 Mi, 1.1 s with the package's own slices).
_SLICE_ELEMENTS = 1 << 17
_MAX_THREADS = 8
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def convert_cached(path: Path, root: Path, progress: bool, tokenizer_only: bool = False) -> Path:
    """The checkpoint folder of a GGUF file under the cache `root`, converted if it is not there."""
    suffix = "-tokenizer" if tokenizer_only else ""
    folder = root / "gguf" / f"{path.stem}-{file_identity(path)}{suffix}"

    def build(scratch: Path) -> dict[str, Any]:
        convert(path, scratch, progress, tokenizer_only)
        return {"source": "gguf", "file": str(path.absolute()), "conversion": CONVERSION_VERSION}

    return publish(
        folder, build, lambda: note(f"waiting for another process that converts {path.name}", progress)
    )


def file_identity(path: Path) -> str:
    """A short key for a file's content: its size, its time of change, and hashes of both ends.

    The head holds settings and vocabulary. Reading the whole of a large file would cost more than
    the check is worth; the time of change covers what lies between.
    """
    digest = hashlib.sha256()
    try:
        status = path.stat()
        digest.update(f"{CONVERSION_VERSION} {status.st_size} {status.st_mtime_ns} ".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, status.st_size - (1 << 16)))
            digest.update(stream.read())
    except OSError as error:
        raise damaged(path, str(error)) from error
    return digest.hexdigest()[:16]


def convert(path: Path, folder: Path, progress: bool = False, tokenizer_only: bool = False) -> None:
    """Write config.json, the tokenizer's files and model.safetensors into an existing folder.

    Raises CheckpointError or UnsupportedModelError, which name the file and the problem.
    """
    gguf = GGUFFile(path)
    try:
        config = make_config(gguf)
        if not tokenizer_only:
            targets = plan_tensors(gguf, config)
            output = folder / "model.safetensors"
            with _WeightWriter(gguf, targets, config["dtype"], output, progress) as writer:
                # Its threads dequantise while this one builds the tokenizer.
                has_tokenizer = write_tokenizer(gguf, folder, config["max_position_embeddings"])
                writer.finish()
        else:
            has_tokenizer = write_tokenizer(gguf, folder, config["max_position_embeddings"])
        if tokenizer_only and not has_tokenizer:
            raise ModelError(f"{path} holds no tokenizer; name another one (tokenizer=…).")
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", make_generation_config(gguf, config))
    except OctavoError:  # ConfigError is a ValueError too
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError) as error:
        # Metadata of another type than the format asks for.
        raise damaged(path, f"its metadata is malformed ({type(error).__name__}: {error})") from error


class _Slice(NamedTuple):
    """Some rows of one target tensor."""

    target: TargetTensor
    first: int
    last: int
    offset: int  # of the first row, in the output file


class _WeightWriter:
    """Writes one safetensors file from several threads, each slice at its own place."""

    def __init__(
        self, gguf: GGUFFile, targets: list[TargetTensor], dtype: str, output: Path, progress: bool
    ) -> None:
        self._gguf = gguf
        self._library = _import_gguf(gguf.path)
        self._targets = targets
        self._dtype = dtype
        self._itemsize = 4 if dtype == "float32" else 2
        header = self._header()
        self._data_start = len(header)
        self._total = sum(_elements(target) for target in targets) * self._itemsize
        self._check_room(output)
        self._file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
        os.write(self._file, header)
        os.truncate(self._file, self._data_start + self._total)
        label = f"converting {gguf.path.name} to {dtype}"
        self._progress = ByteProgress(label, self._total, progress)
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, _usable_cores()), "octavo-gguf")

    def __enter__(self) -> _WeightWriter:
        self._progress.__enter__()
        self._results = [self._pool.submit(self._write, part) for part in self._slices()]
        return self

    def finish(self) -> None:
        """Wait for the last slice; raises what went wrong in any of them."""
        for result in self._results:
            result.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._progress.__exit__(kind, error, None)
        os.close(self._file)

    def _header(self) -> bytes:
        """safetensors: the length of a JSON table (8 bytes), the table, then the tensors' bytes."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for target in self._targets:
            end = offset + _elements(target) * self._itemsize
            table[target.name] = {
                "dtype": _SAFETENSORS_NAMES[self._dtype],
                "shape": list(target.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _slices(self) -> Iterator[_Slice]:
        offset = self._data_start
        for target in self._targets:
            rows, length = _rows(target)
            step = max(1, _SLICE_ELEMENTS // length)
            for first in range(0, rows, step):
                last = min(rows, first + step)
                yield _Slice(target, first, last, offset + first * length * self._itemsize)
            offset += rows * length * self._itemsize

    def _write(self, part: _Slice) -> None:
        data = _rounded(self._values(part), self._dtype)
        view = data.view(np.uint8).data
        written = 0
        while written < len(view):
            written += os.pwrite(self._file, view[written:], part.offset + written)
        self._progress.advance(len(view))

    def _values(self, part: _Slice) -> npt.NDArray[np.float32]:
        """The slice's rows, dequantised.  # [rows * length]"""
        target, source = part.target, part.target.source
        rows, length = _rows(target)
        if source is None:
            return np.zeros((part.last - part.first) * length, np.float32)
        stored = self._gguf.bytes_of(source).reshape(rows, -1)
        if target.rotary_heads:
            # Quantisation runs along the rows, so rows can be reordered before it is undone.
            order = _half_rotation_order(rows, target.rotary_heads)
            chosen = stored[order[part.first : part.last]]
        else:
            chosen = stored[part.first : part.last]
        kind = self._library.GGMLQuantizationType(source.type_id)
        values: npt.NDArray[np.float32] = self._library.dequantize(chosen.reshape(1, -1), kind).reshape(-1)
        if not np.isfinite(values).all():
            raise damaged(self._gguf.path, f"tensor {source.name!r} holds values that are not finite")
        return values

    def _check_room(self, output: Path) -> None:
        free = shutil.disk_usage(output.parent).free
        if free < self._total + self._data_start:
            raise ModelError(
                f"Converting {self._gguf.path.name} needs {self._total / 1e9:.1f} GB in "
                f"{output.parent.parent}, which has {free / 1e9:.1f} GB free.\n"
                "Make room or set OCTAVO_CACHE to a larger disk."
            )


def _rounded(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Finite float32 values in the checkpoint's dtype; bfloat16 as its bits in uint16."""
    if dtype == "float32":
        return np.ascontiguousarray(values)
    if dtype == "float16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    # To the nearest, ties to even: add half of the last kept bit, less one unless that bit is set.
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def _half_rotation_order(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """For each row of transformers' q or k, the row of llama.cpp's that holds it.  # [rows]

    llama.cpp rotates neighbours (0,1), (2,3) …, transformers rotates halves (0,d/2), (1,d/2+1) …;
    so the two halves of each head were interleaved when the GGUF was made.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _rows(target: TargetTensor) -> tuple[int, int]:
    """The target as (rows, row length). A rotary vector is rows of one: they are reordered too."""
    if len(target.shape) == 1:
        return (target.shape[0], 1) if target.rotary_heads else (1, target.shape[0])
    return target.shape[0], _elements(target) // target.shape[0]


def _elements(target: TargetTensor) -> int:
    count = 1
    for size in target.shape:
        count *= size
    return count


def _usable_cores() -> int:
    from octavo.platform import usable_cores

    return usable_cores()


def _import_gguf(path: Path) -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            f"Reading {path.name} needs the package gguf, which is not installed.\n"
            "Install it: pip install gguf"
        ) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
