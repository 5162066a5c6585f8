"""What every test may ask for: the default model's folder, an empty cache, and few threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu_report import GpuReport

# A test run must not depend on the machine's size, nor on a tokenizer's threads after a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    """One torch thread, unless OCTAVO_TEST_THREADS says otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OCTAVO_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)


def _do_not_end(code: int) -> None:
    raise AssertionError(
        f"an offline job would have ended the process with code {code}, and the tests with it: run it in a "
        "process of its own"
    )


@pytest.fixture(scope="session", autouse=True)
def _tests_outlive_their_jobs() -> Iterator[None]:
    """`octavo batch` ends its process where it leaves a model half-loaded; no test means this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.batch.run._end_process", _do_not_end)
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct: OCTAVO_TEST_MODEL if set, else fetched once into the cache."""
    given = os.environ.get("OCTAVO_TEST_MODEL")
    if given:
        return Path(given)
    from octavo import hub

    return Path(hub.resolve("smollm2"))


def pytest_configure(config: pytest.Config) -> None:
    """Tests on a GPU end with a line of JSON."""
    config.pluginmanager.register(GpuReport(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none. torch is asked only if such a test was collected."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
