"""The real thing, killed again and again: its final output is that of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.batch.normal import chat, completion, normal_records, write_lines

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 10
TOPICS = ("the sea", "bread", "a lighthouse", "chess", "rivers", "glass", "winter", "trains")


def requests(total: int) -> list[Any]:
    """Chats and completions, greedy and drawn, with prompts that begin alike; two lines are bad."""
    lines: list[Any] = []
    for i in range(total):
        length = 16 + 7 * i % 48
        topic = TOPICS[i % len(TOPICS)]
        if i % 2:
            lines.append(
                chat(f"r{i}", f"Tell me about {topic}.", max_tokens=length, temperature=float(i % 4 > 1))
            )
        else:
            body = {"max_tokens": length, "n": 1 + i % 3, "temperature": 0.8, "model": "fake"}
            lines.append(completion(f"r{i}", f"A story about {topic}, {'very ' * (i % 40)}long:", **body))
    lines[total // 2] = "{torn"
    lines[total // 3] = completion("r1", "again")
    return lines


def start(source: Path, target: Path, model: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "octavo", "batch", "openai", "-i", str(source), "-o", str(target)]
    options = ["--model", str(model), "--served-model-name", "fake", "--max-num-seqs", "8", "--seed", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *options, "--kv-cache-memory", "256MB", "--quiet", *more], cwd=ROOT, env=environment
    )


def count(path: Path) -> int:
    """Results that are there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_killed_at_ten_random_moments(tmp_path: Path, smollm2_path: Path, replicas: int) -> None:
    source = write_lines(tmp_path / "in", requests(160))
    target = tmp_path / "out"
    more = ("--data-parallel-size", str(replicas))
    moments = random.Random(17 + replicas)
    kills_by_count = []
    for number in range(NUM_KILLS):
        process = start(source, target, smollm2_path, *more)
        before = count(target)
        if number in (0, 4):  # while it loads
            time.sleep(moments.random() * 2)
        else:
            wanted = before + moments.randrange(1, 12)
            while process.poll() is None and count(target) < wanted:
                time.sleep(0.01)
            time.sleep(moments.random() * 0.3)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        kills_by_count.append(count(target))
    assert 0 < kills_by_count[-1] < 160
    assert start(source, target, smollm2_path, *more).wait() == 1  # two lines have no answer
    undisturbed = tmp_path / "undisturbed"
    assert start(source, undisturbed, smollm2_path).wait() == 1
    assert normal_records(target) == normal_records(undisturbed)
    assert len(normal_records(target)) == 160
