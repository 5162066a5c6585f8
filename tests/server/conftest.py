"""Models and servers that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.server.processes import ServerProcess, server

# Small and quick to load, but good for long answers.
TINY_ARGUMENTS = ("--dtype", "float32", "--max-model-len", "8192", "--kv-cache-memory", "64MB")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of three small layers, with a tokenizer and a chat template."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), tokenizer=True, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def shared_server(tiny_model: Path) -> Iterator[ServerProcess]:
    """One server with the stub application for all tests of a file that leave it as it was."""
    with server(str(tiny_model), *TINY_ARGUMENTS, "--access-log", "-") as process:
        process.wait_ready()
        yield process
