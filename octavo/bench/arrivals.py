"""When requests come: moments in seconds from the start, drawn once from the run's seed.

The same seed gives the same moments to every engine. Gaps are Gamma(k, 1 / (k rate)) for a burstiness of k:
their mean is 1 / rate whatever k is, and k = 1 is the exponential distribution of a Poisson process.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.bench.spec import LoadSpec
from octavo.errors import ConfigError

MOST_REQUESTS = 1_000_000


@dataclass(frozen=True)
class Arrival:
    """One request of an open load; `max_tokens` None leaves the run's."""

    moment: float
    max_tokens: int | None = None


def schedule(load: LoadSpec, seed: int) -> list[Arrival]:
    """The arrivals of an open load. Raises ConfigError where the load brings none, or far too many."""
    if load.arrival == "trace":
        assert load.trace_file is not None
        arrivals = read_trace(Path(load.trace_file))
        return arrivals[: load.num_prompts] if load.num_prompts else arrivals
    if load.all_at_once:
        return [Arrival(0.0)] * load.num_prompts
    shape = {"constant": None, "poisson": 1.0, "gamma": load.burstiness}[load.arrival]
    draw = random.Random(f"arrivals {seed}")
    moments: list[Arrival] = []
    now = 0.0
    while True:
        # The first request comes at 0: a run does not begin with a wait.
        if load.num_prompts and len(moments) >= load.num_prompts:
            return moments
        if not load.num_prompts and now >= load.duration:
            return moments
        if len(moments) >= MOST_REQUESTS:
            raise ConfigError(
                f"{load.describe()} is more than {MOST_REQUESTS:,} requests; lower AUTO_RATE or AUTO_DURATION"
            )
        moments.append(Arrival(now))
        now += 1 / load.rate if shape is None else draw.gammavariate(shape, 1 / (shape * load.rate))


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals from a file: JSON lines, or CSV with a header.

    Each has `timestamp` (seconds; a `timestamp_ms` is understood too) and may have `output_length` or
    `max_tokens`. Moments count from the first one. Raises ConfigError naming the line that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace file {path} cannot be read: {error}") from error
    found = []
    for number, row in _rows(path, text):
        keys = {str(key).strip().lower(): value for key, value in row.items()}
        try:
            moment = float(keys["timestamp"]) if "timestamp" in keys else float(keys["timestamp_ms"]) / 1000
            tokens = keys.get("max_tokens", keys.get("output_length"))
            max_tokens = None if tokens in (None, "") else int(tokens)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{path}, line {number}: no timestamp in seconds (or timestamp_ms), or a max_tokens that "
                f"is no "
                f"number: {row}"
            ) from None
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"{path}, line {number}: max_tokens must be at least 1")
        found.append(Arrival(moment, max_tokens))
    if not found:
        raise ConfigError(f"the trace file {path} holds no request")
    first = min(arrival.moment for arrival in found)
    shifted = [Arrival(arrival.moment - first, arrival.max_tokens) for arrival in found]
    return sorted(shifted, key=lambda arrival: arrival.moment)


def _rows(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return [(number, row) for number, row in enumerate(csv.DictReader(lines), 2)]
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number} is no JSON object")
        rows.append((number, row))
    return rows
