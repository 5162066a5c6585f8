"""What lm-eval measures through the server is what it measures with transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import strict
from tests.server.serving import Server, serving_model

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a banana, of course."),
    ("Two plus two makes", " four, and three plus three makes six."),
    ("El perro come", " la comida.\n\nThe dog"),
]
TOLERANCE = 2e-3  # of a sum of log-probabilities, both computed in float32


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[Server]:
    """SmolLM2 in float32, so that only the order of sums differs from transformers."""
    options = {"dtype": "float32", "kv_cache_memory": "64MB", "max_model_len": 1024, "max_num_seqs": 8}
    with serving_model(str(smollm2_path), **options) as running:
        yield running


Reference = Callable[[list[int], list[int]], tuple[float, bool]]


@pytest.fixture(scope="module")
def requests(server: Server) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) as token ids."""
    return [split(server, context, continuation) for context, continuation in PAIRS]


def split(server: Server, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As lm-eval does it: the whole is tokenized, and cut where the context ends."""
    tokenizer = server.app.state.octavo.served.tokenizer
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    length = len(tokenizer.encode(context, add_special_tokens=False))
    return whole[:length], whole[length:]


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Reference:
    """(log-likelihood of a continuation, is it the greedy one), by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(smollm2_path), dtype=torch.float32)
    model.eval()

    def likelihood(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        with torch.inference_mode():
            logits = model(torch.tensor([context + continuation])).logits[0]
        logprobs = torch.log_softmax(logits[len(context) - 1 : -1].double(), dim=-1)
        wanted = torch.tensor(continuation)
        total = logprobs.gather(1, wanted[:, None]).sum().item()
        return total, bool((logprobs.argmax(-1) == wanted).all())

    return likelihood


@pytest.mark.parametrize("limit", [0, 1])
def test_echo_gives_transformers_loglikelihoods(
    server: Server,
    requests: list[tuple[list[int], list[int]]],
    reference: Reference,
    limit: int,
) -> None:
    """As lm-eval's local-completions asks, and reads the answer."""
    body = {
        "prompt": [context + continuation for context, continuation in requests],
        "temperature": 0,
        "max_tokens": limit,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = httpx.post(server.url + "/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        context, continuation = requests[choice["index"]]
        lists: Any = choice["logprobs"]
        end = len(context) + len(continuation)
        assert len(lists["tokens"]) == end + limit
        own = lists["token_logprobs"][len(context) : end]
        tops = lists["top_logprobs"][len(context) : end]
        is_greedy = all(one == max(top.values()) for one, top in zip(own, tops, strict=True))
        total, greedy = reference(context, continuation)
        assert sum(own) == pytest.approx(total, abs=TOLERANCE)
        assert is_greedy == greedy
        text = server.app.state.octavo.served.tokenizer.decode(context + continuation)
        assert choice["text"].startswith(text)
    assert reference(*requests[0])[1], "one of the pairs should be what the model would say"
    assert not reference(*requests[1])[1]


def test_a_real_answer_whole_and_streamed(server: Server) -> None:
    """Through the real engine, detokenizer and all: the same text, tokens and log-probabilities."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Write one short sentence about the sea 🌊."}],
        "temperature": 0,
        "max_tokens": 24,
        "logprobs": True,
        "top_logprobs": 2,
    }
    url = server.url + "/v1/chat/completions"
    whole = strict.chat(httpx.post(url, json=body, timeout=120).json())
    chunks = strict.chat_chunks(httpx.post(url, json={**body, "stream": True}, timeout=120).text)
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == whole.choices[0].message.content
    content = whole.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    streamed = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content or []]
    assert [entry.token for entry in streamed] == [entry.token for entry in content.content]
    assert "".join(entry.token for entry in content.content).startswith(text)


def test_required_calls_and_forms_are_enforced(server: Server) -> None:
    """Whatever a small model would rather say."""
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Bern"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "How is the weather in Rome?"}],
        "tools": [tool],
        "temperature": 0,
        "max_tokens": 200,
        "parallel_tool_calls": False,
    }
    url = server.url + "/v1/chat/completions"
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = httpx.post(url, json={**body, "tool_choice": choice}, timeout=120)
        assert answer.status_code == 200, answer.text
        told = strict.chat(answer.json()).choices[0]
        assert told.finish_reason == "tool_calls"
        assert told.message.tool_calls is not None
        function = answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]
        assert function["name"] == "get_weather"
        assert json.loads(function["arguments"])["city"] in ("Rome", "Bern")


@pytest.mark.slow
def test_lm_eval_itself(server: Server, smollm2_path: Path, tmp_path: Path, reference: Reference) -> None:
    """A task of our own, local, through lm-eval's local-completions."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install 'octavo[clients]'")
    rows = [{"question": context, "good": good, "bad": " because"} for context, good in PAIRS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = f"""
        task: octavo_small
        dataset_path: json
        dataset_kwargs:
          data_files:
            test: {tmp_path}/rows.jsonl
        test_split: test
        output_type: multiple_choice
        doc_to_text: question
        doc_to_choice: "{{{{[good, bad]}}}}"
        doc_to_target: 0
        target_delimiter: ""
        metric_list:
          - metric: acc
    """
    (tmp_path / "octavo_small.yaml").write_text(textwrap.dedent(task))
    program = f"""
        import json, warnings
        warnings.simplefilter("ignore")
        import lm_eval
        from lm_eval.tasks import TaskManager
        tasks = TaskManager(include_path={str(tmp_path)!r}, include_defaults=False)
        args = dict(model={server.app.state.octavo.served.name!r}, num_concurrent=2,
            base_url={server.url + "/v1/completions"!r}, tokenizer={str(smollm2_path)!r},
            tokenizer_backend="huggingface")
        result = lm_eval.simple_evaluate(model="local-completions", model_args=args, tasks=["octavo_small"],
            task_manager=tasks, bootstrap_iters=0)
        samples = sorted(result["samples"]["octavo_small"], key=lambda s: s["doc_id"])
        print(json.dumps([s["filtered_resps"] for s in samples]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == len(rows)
    for row, answers in zip(rows, found, strict=True):
        for continuation, (total, is_greedy) in zip((row["good"], row["bad"]), answers, strict=True):
            expected, greedy = reference(*split(server, row["question"], continuation))
            assert float(total) == pytest.approx(expected, abs=TOLERANCE)
            assert is_greedy in (greedy, str(greedy))
