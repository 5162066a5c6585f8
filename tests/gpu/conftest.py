"""What tests on the card may ask for beside tests/conftest.py."""

from __future__ import annotations

import pytest

from tests.gpu_report import Record, recorder


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """record(name, value): a deviation, of which the run's last line shows the largest."""
    return recorder(request)
