"""From the start of a process to the first byte of its answer, as a user at a terminal sees it.

Octavo is measured as `octavo generate MODEL --prompt … --max-tokens 1`, with its own defaults;
transformers, which has no such command, as the shortest script that prints one token; the others
as their runner's job "first". Two forms:

    warm    started before: files are in the page cache, compiled and downloaded things in the caches
    first   right after installation: a copy of the package without byte code, and an empty cache
            (Octavo only; the packages it needs were byte-compiled when pip installed them)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.children import Finished, run_child

PROMPT = "The three largest cities of Portugal are Lisbon,"

TRANSFORMERS_SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
inputs = tokenizer(sys.argv[2], return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]), flush=True)
"""


def octavo_command(model: Path) -> list[str]:
    """`octavo generate`, by the Python that runs this."""
    options = ["--prompt", PROMPT, "--max-tokens", "1", "--temperature", "0", "--ignore-eos"]
    return [sys.executable, "-m", "octavo", "generate", str(model), *options]


def transformers_command(model: Path) -> list[str]:
    """The script above."""
    return [sys.executable, "-c", TRANSFORMERS_SCRIPT, str(model), PROMPT]


def first_start(model: Path, root: Path, env: dict[str, str], timeout: float) -> Finished:
    """Octavo's first start: from a copy of the package that has never run, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(
            root / "octavo", Path(folder) / "octavo", ignore=shutil.ignore_patterns("__pycache__")
        )
        env = env | {"OCTAVO_CACHE": str(Path(folder) / "cache"), "PYTHONPATH": folder}
        return run_child(octavo_command(model), Path(folder), env, timeout=timeout)
