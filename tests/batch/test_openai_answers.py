"""A line is answered as the server would answer it over HTTP: the same model, once behind each."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from octavo.batch.openai.answers import Answerer
from octavo.batch.openai.lines import RequestLine
from octavo.batch.workers import EngineWorkers
from octavo.config import EngineArgs
from octavo.engine.setup import build_engine
from octavo.server.app import create_app
from octavo.server.base_client import Limits
from octavo.server.in_process_client import InProcessEngineClient
from octavo.server.metrics import ServerMetrics
from octavo.server.settings import ServeSettings
from octavo.server.state import ServedModel, ServerState
from tests.batch.fakes import FakeWorkers
from tests.checkpoints import make_checkpoint
from tests.server import serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "hello"}]

REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO, "max_tokens": 8, "seed": 1}),
    (CHAT, {"messages": HELLO, "max_tokens": 5, "seed": 1, "n": 3, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": HELLO, "seed": 2, "max_completion_tokens": 6, "user": "me", "unknown": 1}),
    (CHAT, {"messages": HELLO, "seed": 2, "max_tokens": 20, "tools": [TOOL], "tool_choice": "required"}),
    (CHAT, {"messages": HELLO, "seed": 3, "max_tokens": 30, "response_format": {"type": "json_object"}}),
    (CHAT, {"messages": HELLO, "seed": 3, "max_tokens": 3, "metadata": {"a": "b"}}),
    (CHAT, {"messages": [], "seed": 3}),
    (CHAT, {"messages": HELLO, "temperature": "hot"}),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}], "seed": 3, "max_tokens": 2}),
    (CHAT, {"messages": HELLO, "n": 1000}),
    (CHAT, {"messages": [{"role": "user", "content": "long " * 500}], "seed": 1}),
    (COMPLETIONS, {"prompt": ["one", "two"], "n": 2, "best_of": 3, "max_tokens": 4, "seed": 5}),
    (COMPLETIONS, {"prompt": "one", "echo": True, "logprobs": 2, "max_tokens": 0, "seed": 5}),
    (COMPLETIONS, {"prompt": [5, 6], "stop": ["a"], "max_tokens": 30, "seed": 6, "return_token_ids": True}),
    (COMPLETIONS, {"prompt": "", "seed": 6}),
    (COMPLETIONS, {"seed": 6}),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}),
]


def test_every_field_means_what_it_means_over_http(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = str(make_checkpoint(tmp_path_factory.mktemp("m"), tokenizer=True, max_position_embeddings=256))
    kwargs = {"dtype": "float32", "kv_cache_memory": "16MB", "device": "cpu", "model": model}

    async def over_http() -> list[tuple[int, dict[str, Any], str]]:
        parts = await asyncio.to_thread(build_engine, EngineArgs.from_kwargs(**kwargs))
        client = InProcessEngineClient(Limits(), ServerMetrics(), served_model_names=("m",))
        client.serve(parts)
        settings = ServeSettings()
        app = create_app(
            ServerState(client, settings, ServedModel.of(client.info, settings, parts.engine.tokenizer))
        )
        found = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            for url, body in REQUESTS:
                answer = await http.post(url, content=json.dumps(body), headers=JSON)
                found.append((answer.status_code, answer.json(), answer.headers.get("x-octavo-warnings", "")))
        await client.shutdown()
        return found

    async def in_a_batch() -> list[dict[str, Any]]:
        workers = await EngineWorkers.open(kwargs)
        answerer = Answerer(
            workers, workers.tokenizer, ("m",), seed=0, max_retries=0, settings=ServeSettings()
        )
        lines = [RequestLine(i, f"r{i}", url, body) for i, (url, body) in enumerate(REQUESTS)]
        answers = await asyncio.gather(*(answerer.answer(line) for line in lines))
        await workers.close()
        assert [answer.key for answer in answers] == [line.key for line in lines]
        for answer in answers:
            usage = answer.record["response"]["body"].get("usage") or {"completion_tokens": 0}
            assert answer.num_tokens == usage["completion_tokens"]
        return [answer.record["response"] for answer in answers]

    by_http = asyncio.run(over_http())
    assert {status for status, _, _ in by_http} == {200, 400}  # both kinds are among them
    for request, (status, body, warnings), response in zip(
        REQUESTS, by_http, asyncio.run(in_a_batch()), strict=True
    ):
        assert response["status_code"] == status, request
        assert "; ".join(response.get("warnings", [])) == warnings, request
        assert comparable(response["body"]) == comparable(body), request


def comparable(body: dict[str, Any]) -> dict[str, Any]:
    """A body without what is drawn, timed, or of the run."""
    kept = {name: value for name, value in body.items() if name not in ("id", "created")}
    usage = kept.get("usage")
    if usage is not None:
        of_the_run = ("prompt_tokens_details", "energy_joules")
        kept["usage"] = {name: value for name, value in usage.items() if name not in of_the_run}
    for choice in kept.get("choices", []):
        for call in choice.get("message", {}).get("tool_calls", []):
            del call["id"]
    return kept


def test_the_engine_is_asked_as_the_server_asks_it() -> None:
    """A completion's text goes on from its prompt (a leading space is kept), a chat answer stands alone."""
    tokenizer = serving.tokenizer()

    async def main() -> list[bool]:
        workers = FakeWorkers(tokenizer=tokenizer)
        workers.keeps_items = True
        answerer = Answerer(workers, tokenizer, ("m",), seed=0, max_retries=0, settings=ServeSettings())
        asked: list[tuple[str, dict[str, Any]]]
        asked = [(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "x"})]
        for number, (url, body) in enumerate(asked):
            answer = await answerer.answer(RequestLine(number, f"r{number}", url, body))
            assert not answer.failed
        return [item.add_special_tokens for item in workers.items]

    assert asyncio.run(main()) == [False, True]


def test_ids_are_the_same_in_every_run_and_calls_of_the_model_have_the_line_s(tmp_path: Any) -> None:
    async def main(seed: int) -> dict[str, Any]:
        answerer = Answerer(FakeWorkers(), None, ("m",), seed=seed, max_retries=0, settings=ServeSettings())
        line = RequestLine(1, "a", COMPLETIONS, {"prompt": [1]})
        return (await answerer.answer(line)).record

    one, two, other = (asyncio.run(main(seed)) for seed in (1, 1, 2))
    assert one["id"] == two["id"] != other["id"]
    name = one["id"].removeprefix("batch_req_")
    assert one["response"]["request_id"] == f"req-{name}"
    assert one["response"]["body"]["id"] == f"cmpl-{name}"
