"""One JSON line at the end of a test run on a GPU: what was run where, and how far off the kernels were.

    {"passed": 152, "failed": 0, "skipped": 3, "seconds": 210.4, "device": "NVIDIA H200", …,
     "deviations": {"attention bfloat16": 0.0021, …}}

Only tests marked `gpu` count, and without a GPU nothing is printed. A test says how far off something
was with the fixture `record(name, value)`; the line holds the largest value of each name. With
OCTAVO_GPU_REPORT=FILE the line is written there as well. Under pytest-xdist the workers' results reach the
one process that prints: what a test records travels with its report.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILE_VARIABLE = "OCTAVO_GPU_REPORT"
_MACHINE, _DEVIATION = "gpu machine", "gpu deviation"
Facts = dict[str, Any]
Record = Callable[[str, float], None]


def machine_facts() -> Facts | None:
    """Device, driver and versions; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    from octavo import platform
    from octavo.kernels import triton as triton_kernels

    machine = platform.detect("cuda")
    assert machine.gpu is not None
    triton = None
    if triton_kernels.available():
        import triton as installed

        triton = str(installed.__version__)
    return {
        "device": machine.gpu.name,
        "capability": ".".join(map(str, machine.gpu.capability)),
        "driver": machine.driver,
        "torch": torch.__version__,
        "triton": triton,
    }


class GpuReport:
    """The plugin; tests/conftest.py registers it."""

    def __init__(self, config: pytest.Config, facts: Callable[[], Facts | None] = machine_facts) -> None:
        self._config = config
        self._facts = facts
        self._prints = not hasattr(config, "workerinput")  # the workers of pytest-xdist only send
        self._started = time.perf_counter()
        self._machine: Facts | None = None
        self._outcomes: dict[str, str] = {}  # by node id
        self._deviations: dict[str, float] = {}
        self._exit_status = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Each test on the GPU carries where it runs."""
        items = [item for item in items if item.get_closest_marker("gpu") is not None]
        facts = self._facts() if items else None
        if facts is not None:
            facts = json.loads(json.dumps(facts))  # plain values only travel: torch's version is a class
            for item in items:
                item.user_properties.append((_MACHINE, facts))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One of a test's three phases has ended, here or in a worker."""
        given = [(name, value) for name, value in report.user_properties if name in (_MACHINE, _DEVIATION)]
        if not given:
            return
        for kind, value in given:
            if kind == _MACHINE:
                assert isinstance(value, dict)
                self._machine = value
            else:
                assert isinstance(value, (list, tuple))
                name, number = value
                before = self._deviations.get(name, 0.0)
                # NaN is the worst there is: max keeps it where it comes first
                self._deviations[name] = number if math.isnan(number) else max(before, number)
        if report.failed:
            self._outcomes[report.nodeid] = "failed"
        elif report.when == "call" or report.skipped:
            self._outcomes.setdefault(report.nodeid, report.outcome)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """How the run ended: a file that cannot be imported is in no test's outcome."""
        self._exit_status = int(exitstatus)

    def pytest_unconfigure(self) -> None:
        """Behind everything that pytest prints."""
        if self._machine is None or not self._prints:
            return
        line = json.dumps(self._summary(), allow_nan=False)
        self._config.get_terminal_writer().line(line)
        file = os.environ.get(FILE_VARIABLE)
        if file:
            Path(file).write_text(line + "\n", encoding="utf-8")

    def _summary(self) -> Facts:
        outcomes = list(self._outcomes.values())
        assert self._machine is not None
        return {
            **{outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")},
            "exit_status": self._exit_status,
            "seconds": round(time.perf_counter() - self._started, 3),
            **self._machine,
            "failures": sorted(name for name, outcome in self._outcomes.items() if outcome == "failed"),
            "deviations": {name: _number(value) for name, value in sorted(self._deviations.items())},
        }


def kind_of(dtype: object) -> str:
    """bfloat16 for torch.bfloat16, as part of a name."""
    return str(dtype).removeprefix("torch.")


def recorder(request: pytest.FixtureRequest) -> Record:
    """What the fixture `record` is."""

    def record(name: str, value: float) -> None:
        request.node.user_properties.append((_DEVIATION, [name, float(value)]))

    return record


def _number(value: float) -> float | str:
    """Four digits; JSON has no NaN and no infinity."""
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)
