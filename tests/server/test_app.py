"""What holds for every route: one form of errors, models, disconnects, an engine that fails, rubbish."""

from __future__ import annotations

import json
import random
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from octavo import __version__
from octavo.errors import QueueFullError, RequestError, RequestTimeoutError
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.server.base_client import OpenRequest
from octavo.server.output_stream import OutputStream
from octavo.server.settings import ServeSettings
from tests.server.serving import HERMES, Server, serving, tokens
from tests.server.test_chat import HI, last_request, post

GENERATING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HI}),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 4000}),
    ("/v1/completions", {"prompt": ["Hello", "you"], "max_tokens": 4000}),
    ("/v1/responses", {"input": "Hello"}),
]
LONG = "word " * 3000


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """A server that answers everything."""
    with serving(template=HERMES, served_model_names=("fake", "org/fake")) as server:
        yield server


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error object, checked."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    return error


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.01)


# ---------------------------------------------------------------------- small routes


def test_models(plain: Server) -> None:
    listed = httpx.get(plain.url + "/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["fake", "org/fake"]
    assert httpx.get(plain.url + "/v1/models/org/fake").json()["id"] == "org/fake"
    missing = httpx.get(plain.url + "/v1/models/gpt-4o")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "model_not_found"
    for path, body in GENERATING:
        assert post(plain, path, **body, model="org/fake").json()["model"] == "fake"
        unknown = post(plain, path, **body, model="x" * 1000)
        assert unknown.status_code == 404
        assert error_of(unknown)["param"] == "model"
        assert len(unknown.text) < 400


def test_version_and_page(plain: Server) -> None:
    assert httpx.get(plain.url + "/version").json() == {"version": __version__}
    page = httpx.get(plain.url + "/openapi.json").json()
    for path, _ in GENERATING:
        assert "post" in page["paths"][path]
        assert "422" not in page["paths"][path]["post"]["responses"]
    assert httpx.get(plain.url + "/docs").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/fake", 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", 501, "not_implemented"),
        ("POST", "/rerank", 501, "not_implemented"),
        ("POST", "/score", 501, "not_implemented"),
        ("POST", "/pooling", 501, "not_implemented"),
        ("GET", "/v1/files", 501, "not_implemented"),
        ("GET", "/v1/responses/resp-1", 501, "not_implemented"),
        ("POST", "/v1/load_lora_adapter", 501, "not_implemented"),
    ],
)
def test_wrong_ways(plain: Server, method: str, path: str, status: int, code: str) -> None:
    answer = httpx.request(method, plain.url + path, json={} if method == "POST" else None)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/v1/completions", "did you mean /v1/completions?"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/nowhere", "GET /docs lists what there is"),
        ("/x\u202e" + "y" * 500, "GET /docs"),
    ],
)
def test_a_url_that_does_not_exist_is_shown_with_the_nearest(plain: Server, path: str, hint: str) -> None:
    answer = httpx.post(plain.url + path, json={})
    assert answer.status_code == 404
    message = error_of(answer)["message"]
    assert hint in message
    assert message.isprintable()
    assert len(message) < 200


def test_what_is_not_here_says_what_to_do_instead(plain: Server) -> None:
    answer = httpx.post(plain.url + "/v1/batches", json={})
    assert answer.status_code == 501
    assert answer.headers["x-should-retry"] == "false"
    assert "not in this version of Octavo; octavo batch openai" in error_of(answer)["message"]


def test_a_body_of_other_bytes_is_told_as_such(plain: Server) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(plain.url + "/v1/completions", content=b'{"prompt": "\xff"}', headers=headers)
    assert "not UTF-8" in error_of(answer)["message"]
    answer = httpx.post(plain.url + "/v1/completions", content=b"[" * 100_000, headers=headers)
    assert "the body is not JSON" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": [{"role": "user"}',
        b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"prompt": "\\ud800", "input": "\\ud800", "messages": 1}',
        b'{"prompt": 1e999, "input": 1, "messages": "x"}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(plain: Server, body: bytes) -> None:
    paths = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
    kinds = ["text/plain", "application/x-www-form-urlencoded"]
    ways = [(path, "application/json") for path in paths] + [(paths[0], kind) for kind in kinds]
    with httpx.Client(base_url=plain.url, timeout=120) as client:
        for path, kind in ways:
            answer = client.post(path, content=body, headers={"content-type": kind})
            assert answer.status_code == 400, (path, answer.text)
            assert error_of(answer)["type"] == "invalid_request_error"


# ---------------------------------------------------------------------- clients that go away


@pytest.mark.parametrize(("path", "body"), GENERATING, ids=["chat", "completion", "batch", "response"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_frees_its_request(path: str, body: dict[str, Any], streams: bool) -> None:
    with serving(LONG, interval=0.01) as server:
        data = json.dumps({**body, "stream": streams}).encode()
        host = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host[0], int(host[1]))) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            wait_for(lambda: server.engine.num_open > 0)
            if streams:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: server.engine.num_open == 0, seconds=2.0)
        wait_for(lambda: len(server.engine.cancelled) == len(server.engine.requests))
        assert post(server, "/v1/completions", prompt="x", max_tokens=1).status_code == 200


# ---------------------------------------------------------------------- an engine that fails


def failing(error: BaseException, after: int) -> Callable[[OpenRequest], Any]:
    """A script that lets each request fail once it has said `after` tokens."""

    def script(request: OpenRequest) -> list[Any]:
        stream, count = request.stream, 0

        def put(output: RequestOutput) -> None:
            nonlocal count
            count += 1
            type(stream).put(stream, output)
            if count == after:
                stream.fail(error)

        if after == 0 or request.kind == "final":
            stream.fail(error)
        request.stream = Tapped(stream, put)  # type: ignore[assignment]
        return tokens(LONG)

    return script


class Tapped:
    """A stream of outputs with something in between."""

    def __init__(self, stream: OutputStream, put: Callable[[RequestOutput], None]) -> None:
        self.put = put
        self.fail = stream.fail


@pytest.mark.parametrize(("path", "body"), GENERATING, ids=["chat", "completion", "batch", "response"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("the prompt is too long", "prompt"), 400),
        (QueueFullError("full", 7), 429),
        (RequestTimeoutError("too slow"), 504),
        (RuntimeError("secret of the house"), 500),
    ],
    ids=["request", "queue", "timeout", "bug"],
)
def test_errors_before_the_first_token_have_their_status(
    path: str, body: dict[str, Any], error: BaseException, status: int
) -> None:
    with serving(failing(error, 0), interval=0.05) as server:
        for streams in (False, True):
            answer = post(server, path, **body, stream=streams)
            assert answer.status_code == status
            assert "secret" not in error_of(answer)["message"]
            if status == 429:
                assert answer.headers["retry-after"] == "7"
        assert server.engine.num_open == 0


@pytest.mark.parametrize(("path", "body"), GENERATING, ids=["chat", "completion", "batch", "response"])
def test_errors_in_the_middle_of_a_stream(path: str, body: dict[str, Any]) -> None:
    with serving(failing(RequestTimeoutError("too slow"), 3), interval=0.01) as server:
        answer = post(server, path, **body, stream=True)
        assert answer.status_code == 200
        *_, last = answer.text.removesuffix("\n\n").split("\n\n")
        data = json.loads(last.split("data: ")[1])
        if path == "/v1/responses":
            assert data["type"] == "response.failed"
            assert data["response"]["error"]["message"] == "too slow"
        else:
            assert data["error"]["message"] == "too slow"
            assert data["error"]["code"] == "timeout"
            assert "[DONE]" not in answer.text
        assert post(server, path, **body).status_code == 504


def test_an_answer_that_cannot_be_finished() -> None:
    def script(request: OpenRequest) -> str:
        broken = CompletionOutput(0, "", [], finish_reason="error", error="the grammar is too complex")
        request.stream.put(RequestOutput("x", None, request.prompt_ids, None, [broken], finished=True))
        return LONG

    with serving(script, interval=0.05) as server:
        for path, body in (GENERATING[0], GENERATING[1], GENERATING[3]):
            answer = post(server, path, **body)
            assert answer.status_code == 500
            assert error_of(answer)["message"] == "the grammar is too complex"
            assert "the grammar is too complex" in post(server, path, **body, stream=True).text


def test_a_dead_engine_answers_every_open_request() -> None:
    with serving(LONG, interval=0.01) as server:

        async def die() -> None:
            server.engine.die("the device burst into flames")

        with httpx.stream(
            "POST", server.url + "/v1/chat/completions", json={"messages": HI, "stream": True}
        ) as s:
            parts = s.iter_text()
            next(parts)
            server.call(die())
            assert "burst into flames" in "".join(parts)
        answer = post(server, messages=HI)
        assert answer.status_code == 500
        assert error_of(answer)["code"] == "engine_dead"


def test_a_stream_begins_even_if_the_engine_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    import octavo.server.chat
    import octavo.server.streaming

    monkeypatch.setattr(octavo.server.chat, "FIRST_OUTPUT_SECONDS", 0.05)
    monkeypatch.setattr(octavo.server.streaming, "WAITING_SECONDS", 0.05)
    with serving("one", interval=0.4) as server:
        answer = post(server, messages=HI, stream=True)
        assert answer.text.startswith(": waiting\n\n: waiting\n\n")
        assert answer.text.endswith("data: [DONE]\n\n")


# ---------------------------------------------------------------------- rubbish

WORDS: list[Any] = [
    None, True, False, 0, 1, -1, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "é" * 50, "auto", "required", [],
    {}, [[]], [1, 2], ["a"], [None], {"type": "function"}, {"type": "json_object"}, "{% for %}",
    {"role": "user", "content": "x"}, [{"role": "user", "content": "x"}], {"include_usage": True},
    [{"type": "function", "function": {"name": "f"}}], "\ud800", "\x00", "<|eot|>", {"regex": "("},
    {"json": {"type": "object"}}, [[1, 2], [3]],
]  # fmt: skip
PLAUSIBLE: dict[str, list[Any]] = {
    "stream": [True, False], "n": [1, 3], "temperature": [0, 0.7], "top_p": [0.5], "stop": ["x", ["y", "z"]],
    "logprobs": [True, 2], "top_logprobs": [2], "echo": [True], "max_tokens": [1, 50, 0], "seed": [-3],
    "tools": [[{"type": "function", "function": {"name": "f"}}]], "tool_choice": ["required", "none"],
    "response_format": [{"type": "json_object"}], "prompt": ["a", ["b", "c"], [1, 2], [[3], [4]]],
    "stream_options": [{"include_usage": True}], "messages": [HI * 3], "input": ["x"], "tokens": [[5, 6]],
}  # fmt: skip


def rubbish(chance: random.Random, names: list[str], base: dict[str, Any]) -> bytes:
    """A request with some fields gone, some of another kind, and sometimes with broken bytes."""
    body = dict(base)
    for name in chance.sample(names, min(len(names), chance.randint(1, 4))):
        value = chance.choice(WORDS)
        if chance.random() < 0.6:
            value = chance.choice(PLAUSIBLE.get(name, [None]))
        elif chance.random() < 0.3:
            value = [value, chance.choice(WORDS)] if chance.random() < 0.5 else {"type": value, "name": value}
        body[name] = value
    if chance.random() < 0.1:
        body.pop(chance.choice(list(body)))
    data = json.dumps(body).encode()
    if chance.random() < 0.1:
        at = chance.randrange(len(data))
        data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if chance.random() < 0.03:
        data = data[: chance.randrange(len(data))]
    return data


def send_rubbish(count: int) -> None:
    with serving("fine", template=HERMES, max_model_len=2048) as server:
        page = server.app.openapi()["components"]["schemas"]
        models: list[tuple[str, str, dict[str, Any]]] = [
            ("/v1/chat/completions", "ChatRequest", {"messages": HI}),
            ("/v1/completions", "CompletionRequest", {"prompt": "Hello"}),
            ("/v1/responses", "ResponsesRequest", {"input": "Hello"}),
            ("/tokenize", "TokenizeRequest", {"prompt": "Hello"}),
            ("/detokenize", "DetokenizeRequest", {"tokens": [1]}),
        ]
        chance = random.Random(5)
        statuses: dict[int, int] = {}
        memory = 0
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for number in range(count):
                path, model, base = models[number % len(models)]
                data = rubbish(chance, list(page[model]["properties"]), base)
                answer = client.post(path, content=data, headers={"content-type": "application/json"})
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                assert answer.status_code in (200, 400, 404), (answer.status_code, path, data, answer.text)
                if answer.status_code != 200:
                    error_of(answer)
                if number == count // 2:
                    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert client.post("/v1/chat/completions", json={"messages": HI}).status_code == 200
        assert statuses[200] > count / 50, statuses
        assert statuses[400] > count / 4, statuses
        assert server.engine.num_open == 0
        assert not server.engine._at
        if count > 5000:  # kilobytes; the first half has filled every cache
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20_000


def test_rubbish() -> None:
    send_rubbish(400)


@pytest.mark.slow
def test_ten_thousand_malformed_requests() -> None:
    send_rubbish(10_000)


WHOLE_NUMBERS = [
    "n", "best_of", "top_k", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens",
    "priority", "prompt_logprobs", "truncate_prompt_tokens", "num_speculative_tokens", "top_logprobs",
]  # fmt: skip


@pytest.mark.parametrize("value", [10**400, -(10**400), 2**63, -(2**63) - 1])
@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/responses", {"input": "Hello"}),
    ],
)
def test_numbers_without_end(plain: Server, path: str, base: dict[str, Any], value: int) -> None:
    """More than a float, or a message to the engine's process, can hold."""
    with httpx.Client(base_url=plain.url, timeout=120) as client:  # one connection: it must stay open
        for name in WHOLE_NUMBERS:
            answer = client.post(path, json={**base, name: value})
            if answer.status_code != 200 or f"{name}: unknown" not in answer.headers["x-octavo-warnings"]:
                assert answer.status_code == 400, (name, answer.text)
                assert error_of(answer)["param"] == name
        for name in ("stop_token_ids", "allowed_token_ids"):
            answer = client.post(path, json={**base, name: [value]})
            assert answer.status_code == 400 or f"{name}: unknown" in answer.headers["x-octavo-warnings"]


def test_bounds_are_the_settings(plain: Server) -> None:
    options = {"max_n": 2, "max_logprobs": 3, "max_stop": 1, "max_tools": 1, "max_prompts": 1}
    assert ServeSettings.from_kwargs(**options).max_n == 2
    with serving(template=HERMES, settings=options) as server:
        for body in (
            {"n": 3},
            {"logprobs": True, "top_logprobs": 4},
            {"stop": ["a", "b"]},
            {"tools": [{"type": "function", "function": {"name": n}} for n in "ab"]},
        ):
            assert post(server, messages=HI, **body).status_code == 400
        assert post(server, "/v1/completions", prompt=["a", "b"]).status_code == 400
        assert post(server, messages=HI, n=2, stop=["a"], logprobs=True, top_logprobs=3).status_code == 200
        assert last_request(server).params.n == 2
