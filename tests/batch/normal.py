"""Batch results as far as two runs must agree on them: without ids, times and the order of lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def normal_records(path: Path) -> list[str]:
    """Every record, sorted, each as JSON without its ids and times. Fails on a line that is none."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        del record["id"]
        response = record.get("response")
        if response is not None:
            del response["request_id"]
            response["body"].pop("id", None)
            response["body"].pop("created", None)
        found.append(json.dumps(record))
    return sorted(found)


def write_lines(path: Path, lines: list[Any]) -> Path:
    """Lines of JSON; texts are written as they are."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def completion(custom_id: str, prompt: Any = (1, 2, 3), **body: Any) -> dict[str, Any]:
    """A line that asks for a completion."""
    given = {"model": "fake", "prompt": list(prompt) if isinstance(prompt, tuple) else prompt, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": given}


def chat(custom_id: str, text: str = "hello", **body: Any) -> dict[str, Any]:
    """A line that asks for an answer."""
    given = {"model": "fake", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": given}
