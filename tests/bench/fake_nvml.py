"""A stand-in for pynvml whose cards draw a known power."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

NOT_SUPPORTED, NO_PERMISSION, LOST, UNKNOWN = 3, 4, 15, 999


class NVMLError(Exception):
    """As NVML's: the code is in `value`."""

    def __init__(self, value: int) -> None:
        super().__init__(
            {3: "Not Supported", 4: "Insufficient Permissions", 15: "GPU is lost"}.get(value, "?")
        )
        self.value = value


@dataclass
class Card:
    """One GPU. Its counter grows by `watts` a second in ticks of `tick` seconds, from a large value on."""

    watts: float
    uuid: str = "GPU-0"
    tick: float = 0.02
    refuses: dict[str, int] = field(default_factory=dict)  # function name without nvmlDeviceGet -> error code
    lost_at: float | None = None  # moment (monotonic) from which every call fails
    set_back_at: float | None = None
    began: float = field(default_factory=time.monotonic)
    throttle: int = 0x4 | 0x1
    calls: list[str] = field(default_factory=list)

    def asked(self, name: str) -> None:
        self.calls.append(name)
        if self.lost_at is not None and time.monotonic() >= self.lost_at:
            raise NVMLError(LOST)
        if name in self.refuses:
            raise NVMLError(self.refuses[name])

    def millijoules(self) -> int:
        now = time.monotonic()
        if self.set_back_at is not None and now >= self.set_back_at:
            return int((now - self.set_back_at) * self.watts * 1e3)
        ticks = (now - self.began) // self.tick
        return int(5e9 + ticks * self.tick * self.watts * 1e3)


def install(monkeypatch: pytest.MonkeyPatch, cards: list[Card]) -> ModuleType:
    """Make `import pynvml` find a machine with these cards."""
    module: Any = ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: len(cards)
    module.nvmlDeviceGetHandleByIndex = lambda index: cards[index]
    readings: dict[str, Callable[[Card], Any]] = {
        "UUID": lambda card: card.uuid,
        "Name": lambda card: f"Fake {card.watts:.0f} W",
        "TotalEnergyConsumption": Card.millijoules,
        "PowerUsage": lambda card: int(card.watts * 1e3),
        "EnforcedPowerLimit": lambda card: 700_000,
        "UtilizationRates": lambda card: SimpleNamespace(gpu=75, memory=40),
        "MemoryInfo": lambda card: SimpleNamespace(total=80 << 30, used=8 << 30),
        "CurrentClocksEventReasons": lambda card: card.throttle,
    }
    for name, read in readings.items():
        setattr(module, f"nvmlDeviceGet{name}", _function(name, read))
    module.nvmlDeviceGetTemperature = _function("Temperature", lambda card, kind: 61)
    module.nvmlDeviceGetClockInfo = _function("ClockInfo", lambda card, kind: {1: 1980, 2: 3201}[kind])
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module  # type: ignore[no-any-return]  # it is one


def _function(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
    def call(card: Card, *arguments: Any) -> Any:
        card.asked(name)
        return read(card, *arguments)

    return call
