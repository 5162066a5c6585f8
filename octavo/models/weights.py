"""Fill a model from its checkpoint, one tensor at a time.

Every tensor of the files is matched against the list of tensors the model waits for: one that is
missing, unexpected, stored twice or of another shape is an error that names it. As soon as the last
tensor of a layer is in, the layer is packed and its plain copy dropped, so that loading takes the
memory of the model and little more. `load_format="dummy"` makes seeded random weights on the same
way, for work on speed.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.errors import CheckpointError, ConfigError
from octavo.layers.checkpoint import CheckpointTensor
from octavo.models.checkpoint_files import Buffer, StoredTensor, WeightFile, checkpoint_files
from octavo.models.decoder import CausalLM

LOAD_FORMATS = ("auto", "safetensors", "pt", "dummy")

# Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]

# Tensors that some checkpoints carry along and that hold nothing a model needs.
_HARMLESS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.self_attn\.(bias|masked_bias)$")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class LoadReport:
    """What loading did."""

    num_tensors: int
    num_bytes: int  # in the files
    seconds: float


def load_weights(
    model: CausalLM,
    folder: str | Path,
    load_format: str = "auto",
    progress: Progress | None = None,
    seed: int = 0,
) -> LoadReport:
    """Load, pack and finish `model`.

    `load_format`: auto (safetensors, else pickled files), safetensors, pt, or dummy (random weights
    from `seed`; no file is read). Raises CheckpointError naming the tensor or file at fault.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format={load_format!r} is not one of {', '.join(LOAD_FORMATS)}")
    started = time.perf_counter()
    filler = _Filler(model, progress)
    if load_format == "dummy":
        filler.fill_random(seed)
    else:
        filler.fill(checkpoint_files(Path(folder), load_format), Path(folder))
    model.after_load()
    return LoadReport(filler.num_tensors, filler.done_bytes, time.perf_counter() - started)


class _Filler:
    """One loading: what is still missing, and how far it has come."""

    def __init__(self, model: CausalLM, progress: Progress | None) -> None:
        self._model = model
        self._waiting = {tensor.name: tensor for tensor in model.checkpoint_tensors()}
        self._known = frozenset(self._waiting)
        # weights a layer still waits for; layers compare by identity
        self._open: dict[int, int] = {}
        for tensor in self._waiting.values():
            self._open[id(tensor.layer)] = self._open.get(id(tensor.layer), 0) + 1
        self._tied = model.config.tie_word_embeddings
        self._progress = progress
        self._total_bytes = sum(
            torch.Size(tensor.shape).numel() * tensor.weight.dtype.itemsize
            for tensor in self._waiting.values()
        )
        self.num_tensors = 0
        self.done_bytes = 0

    def fill(self, files: Iterable[WeightFile], folder: Path) -> None:
        """From files."""
        buffer = Buffer()
        seen: dict[str, WeightFile] = {}
        for file in files:
            for stored in file.tensors():
                if stored.name in seen:
                    raise CheckpointError(
                        f"tensor {stored.name} is stored twice: in {seen[stored.name].path} "
                        f"and in {file.path}"
                    )
                seen[stored.name] = file
                if stored.name in self._waiting:
                    self._load(self._waiting[stored.name], stored, file, buffer)
                elif not self._may_be_there(stored.name):
                    raise CheckpointError(self._unexpected(stored.name, file))
        if self._tied and _HEAD in seen:
            self._settle_tied_head(seen)
        if self._waiting:
            names = list(self._waiting)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointError(
                f"{folder}: tensors are missing from the checkpoint: {', '.join(names[:4])}{more}; "
                f"it is incomplete, or its config.json describes another model"
            )

    def fill_random(self, seed: int) -> None:
        """From a generator a tensor, seeded by its name: every rank draws the same whole tensor."""
        for target in list(self._waiting.values()):
            digest = hashlib.blake2b(f"{seed}:{target.name}".encode(), digest_size=7).digest()
            device = target.weight.device
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
            # A GPU draws in the weight's own dtype, in no time; a CPU's normal_ is made for float32.
            dtype = target.weight.dtype if device.type == "cuda" else torch.float32
            drawn = torch.empty(target.shape, dtype=dtype, device=device)
            if len(target.shape) == 1 and target.name.endswith("norm.weight"):
                drawn.uniform_(0.9, 1.1, generator=generator)
            else:
                drawn.normal_(0.0, 0.02, generator=generator)
            target.weight.load(drawn, target.shard_id)
            self._cross_off(target, target.weight.dtype.itemsize * drawn.numel())

    def _load(self, target: CheckpointTensor, stored: StoredTensor, file: WeightFile, buffer: Buffer) -> None:
        dtype = _checked_dtype(target, stored, file)
        if target.weight.is_verbatim(stored.shape, dtype):
            stored.read_into(target.weight.allocate())
        else:
            target.weight.load(stored.read(buffer), target.shard_id)
        self._cross_off(target, stored.nbytes)

    def _cross_off(self, target: CheckpointTensor, nbytes: int) -> None:
        """One tensor is in; pack its layer if that was the last one."""
        del self._waiting[target.name]
        key = id(target.layer)
        self._open[key] -= 1
        if not self._open[key]:
            self._model.pack(target.layer)
        self.num_tensors += 1
        self.done_bytes += nbytes
        if self._progress is not None:
            self._progress(self.done_bytes, max(self._total_bytes, self.done_bytes))

    def _may_be_there(self, name: str) -> bool:
        return bool(_HARMLESS.search(name)) or (self._tied and name == _HEAD)

    def _unexpected(self, name: str, file: WeightFile) -> str:
        return (
            f"{file.path}: unexpected tensor {name}; the {self._model.config.architecture} that config.json "
            f"describes has none of that name, so one of the two belongs to another model"
        )

    def _settle_tied_head(self, seen: dict[str, WeightFile]) -> None:
        """A tied model whose files hold a head too: it must be the embedding, or is it in its place."""
        if _EMBEDDING in self._waiting:
            for stored in seen[_HEAD].tensors():
                if stored.name == _HEAD:
                    self._load(self._waiting[_EMBEDDING], stored, seen[_HEAD], Buffer())
                    return
        head, embedding = _read(seen[_HEAD], _HEAD), _read(seen[_EMBEDDING], _EMBEDDING)
        if not torch.equal(head, embedding):
            raise CheckpointError(
                f"{seen[_HEAD].path}: config.json ties {_HEAD} to {_EMBEDDING}, but the two differ in the "
                f"checkpoint; set tie_word_embeddings to false in config.json"
            )


def _checked_dtype(target: CheckpointTensor, stored: StoredTensor, file: WeightFile) -> torch.dtype:
    """The stored tensor's dtype, once its form is known to fit."""
    if stored.shape != target.shape:
        raise CheckpointError(
            f"{file.path}: tensor {stored.name} has shape {list(stored.shape)}, but config.json asks for "
            f"{list(target.shape)}; one of the two belongs to another model"
        )
    if isinstance(stored.dtype, str) or not stored.dtype.is_floating_point:
        raise CheckpointError(
            f"{file.path}: tensor {stored.name} is of type {stored.dtype}; float32, bfloat16 and float16 "
            f"are read, quantized weights are not in this version"
        )
    return stored.dtype


def _read(file: WeightFile, name: str) -> torch.Tensor:
    """One tensor of a file that is known to hold it."""
    for stored in file.tensors():
        if stored.name == name:
            return stored.read(Buffer())
    raise CheckpointError(f"{file.path} changed while it was read: {name} is gone")
