"""`octavo plan` with a drafter, on a small checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.cli.conftest import Cli

OPTIONS = ["--dtype", "float32", "--kv-cache-memory", "8MB"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


def test_a_lookup_needs_no_passes(cli: Cli, folder: Path) -> None:
    result = cli("plan", str(folder), *OPTIONS, "--speculative-method", "prompt_lookup")
    assert result.code == 0
    assert "speculation (prompt_lookup)" in result.out
    rows = re.findall(
        r"^ +(\d+) +[\d.]+ ms +- +(?:never|\d+%)(?: +[\d.]+x K=\d+){4}$", result.out, re.MULTILINE
    )
    assert rows == ["1", "8", "64"]
    assert "measured here" in result.out
    assert "contexts of 64 tokens" in result.out  # half of what this model holds
    assert "some steps only" in result.out


def test_a_draft_model_has_its_memory_and_its_passes(cli: Cli, folder: Path) -> None:
    options = [*OPTIONS, "--draft", str(folder), "--num-speculative-tokens", "3", "--max-num-seqs", "8"]
    result = cli("plan", str(folder), *options)
    assert result.code == 0
    assert "draft KV cache" in result.out
    assert "at K=3 drafts" in result.out
    rows = re.findall(r"^ +(\d+) +[\d.]+ ms +[\d.]+ ms .*K=3$", result.out, re.MULTILINE)
    assert rows == ["1", "8"]
    assert "and of a draft pass" in result.out
    assert "some steps only" not in result.out


def test_nothing_is_measured_without_need(cli: Cli, folder: Path) -> None:
    assert "speculation" not in cli("plan", str(folder), *OPTIONS).out
    quick = cli("plan", str(folder), *OPTIONS, "--speculative-method", "suffix", "--no-measure")
    assert quick.code == 0
    assert "speculation" not in quick.out
