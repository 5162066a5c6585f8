"""Telling one checkpoint from another, or from itself after more training, without reading it whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
_PIECE = 1 << 12
_NUM_STEPS = 16


def fingerprint(model_path: Path) -> str:
    """A hash of the configuration, and of each file of weights: its length, its ends and pieces between."""
    digest = hashlib.sha256()
    files = [model_path] if model_path.is_file() else []
    if not files:
        files = sorted({file for pattern in _WEIGHT_FILES for file in model_path.glob(pattern)})
        config = model_path / "config.json"
        if config.is_file():
            digest.update(config.read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with open(path, "rb") as file:
            for step in range(_NUM_STEPS + 1):
                file.seek(max(0, size - _PIECE) * step // _NUM_STEPS)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()
