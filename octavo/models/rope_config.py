"""The rotary embedding's parameters, whichever way a config.json spells them.

Three spellings are alive: `rope_theta` at the top level, `rope_scaling` beside it (with `type` or
`rope_type`), and transformers 5's `rope_parameters`, which holds everything. Unknown types are
refused: a wrong rotary embedding does not fail, it only writes worse text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.layers.rope_config import RopeConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(
    raw: dict[str, Any],
    error: Callable[[str, str], CheckpointError],
    head_dim: int,
    max_position: int,
) -> RopeConfig:
    """The rope part of a config.json. `error(field, what is wrong)` makes the complaint."""
    where = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # as transformers does
    given = raw.get(where) or {}
    if not isinstance(given, dict):
        raise error(where, f"must be an object, not {given!r}")
    given = _flat(given, where, error)
    # transformers looks inside first, then at the top level
    values = {
        name: raw[name] for name in ("rope_theta", "partial_rotary_factor") if raw.get(name) is not None
    }
    values |= {name: value for name, value in given.items() if value is not None}

    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rotary embedding of type {kind!r} ({where} in config.json) is not supported; "
            f"supported: {', '.join(ROPE_TYPES)}"
        )

    def number(name: str, default: float | None = None, least: float = 0.0) -> float:
        value = values.get(name, default)
        if value is None:
            raise error(f"{where}.{name}", f"is missing, but rope type {kind} needs it")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise error(f"{where}.{name}", f"must be a number, not {value!r}")
        if value <= least:
            raise error(f"{where}.{name}", f"must be greater than {least:g}, not {value!r}")
        return float(value)

    rotary_dim = int(head_dim * number("partial_rotary_factor", 1.0))
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise error("head_dim", f"={head_dim} gives {rotary_dim} rotated numbers a head; they go in pairs")
    original = max_position
    if kind in ("llama3", "yarn"):
        outer = raw.get("original_max_position_embeddings")
        inner = number("original_max_position_embeddings", max_position)
        original = int(inner if outer is None else outer)
    rope = RopeConfig(rotary_dim, original, kind, number("rope_theta", 10_000.0))
    if kind == "default":
        return rope
    factor = number("factor", max_position / original if kind == "yarn" else None)
    if kind in ("linear", "dynamic"):
        if kind == "dynamic" and rotary_dim < 4:
            raise error("head_dim", f"={head_dim} is too small for dynamic rope scaling")
        return RopeConfig(rotary_dim, original, kind, rope.theta, factor)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise error(f"{where}.high_freq_factor", f"={high:g} must exceed low_freq_factor={low:g}")
        return RopeConfig(
            rotary_dim, original, kind, rope.theta, factor, low_freq_factor=low, high_freq_factor=high
        )
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise error(f"{where}.truncate", f"must be true or false, not {truncate!r}")

    def optional(name: str) -> float | None:
        return number(name, least=-1.0) if name in values else None

    return RopeConfig(
        rotary_dim,
        original,
        kind,
        rope.theta,
        factor,
        attention_factor=optional("attention_factor"),
        beta_fast=optional("beta_fast") or 32.0,  # 0 means the default in transformers too
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=truncate,
    )


def _flat(given: dict[str, Any], where: str, error: Callable[[str, str], CheckpointError]) -> dict[str, Any]:
    """Parameters written once a layer type, as one set: supported where all of them agree."""
    nested = [value for key, value in given.items() if key.endswith("_attention")]
    if not nested:
        return given
    if any(value != nested[0] for value in nested) or not isinstance(nested[0], dict):
        raise UnsupportedModelError(
            f"{where} differs between layer types ({', '.join(given)}), which is not supported"
        )
    return nested[0]
