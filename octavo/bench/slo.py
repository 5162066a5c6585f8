"""Service level objectives: "ttft=500ms,tpot=50ms", and which requests met them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from octavo.bench.record import RequestRecord
from octavo.errors import ConfigError

NAMES = {"ttft": "ttft", "tpot": "tpot", "e2el": "latency", "latency": "latency"}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s)\Z")


def parse_slo(text: str) -> dict[str, float]:
    """Limits in seconds by the record's field. Raises ConfigError that shows how it is written."""
    limits: dict[str, float] = {}
    how = "write --slo ttft=500ms,tpot=50ms (names: ttft, tpot, e2el; times in ms or s)"
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        match = _TIME.match(value.strip())
        if name not in NAMES or match is None:
            raise ConfigError(f"--slo {part.strip()!r} is not understood: {how}")
        limit = float(match[1]) / (1000 if match[2] == "ms" else 1)
        if limit <= 0:
            raise ConfigError(f"--slo {part.strip()!r} is a limit nobody can meet: {how}")
        limits[NAMES[name]] = limit
    return limits


def meets(record: RequestRecord, limits: Mapping[str, float]) -> bool:
    """True if a request was answered within every limit. A time that does not exist (tpot of one token)
    breaks none."""
    if not record.ok:
        return False
    return all((value := getattr(record, name)) is None or value <= limit for name, limit in limits.items())


def count_good(records: Sequence[RequestRecord], limits: Mapping[str, float]) -> int:
    """Requests that met every limit."""
    return sum(meets(record, limits) for record in records)
