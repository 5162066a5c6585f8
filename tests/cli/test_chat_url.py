"""`octavo chat --url` against a small server of our own, which also says what none should."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from octavo.bench.openai_stream import server_root
from octavo.errors import ConfigError
from tests.cli.conftest import Cli

USAGE = {"usage": {"prompt_tokens": 9, "completion_tokens": 5}, "choices": []}


def delta(**fields: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


class Stub(ThreadingHTTPServer):
    """Answers every conversation with `chunks`; remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.chunks: list[Any] = [
            delta(role="assistant", content=""),
            delta(content="one "),
            delta(content="two"),
        ]
        self.ends = True
        self.status, self.refusal = 200, b""
        self.models: Any = {"data": [{"id": "served"}, {"id": "other"}]}
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.waits = False
        self.left = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._head(200)
        self.wfile.write(json.dumps(self.server.models).encode())

    def do_POST(self) -> None:
        stub = self.server
        stub.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        stub.keys.append(self.headers["authorization"])
        self._head(stub.status)
        if stub.status != 200:
            self.wfile.write(stub.refusal)
            return
        for chunk in stub.chunks:
            text = chunk if isinstance(chunk, str) else json.dumps(chunk)
            self.wfile.write(f"data: {text}\n\n".encode())
        if stub.waits:
            self.connection.settimeout(60)
            if self.rfile.read(1) == b"":  # the client has gone
                stub.left.set()
        elif stub.ends:
            self.wfile.write(f"data: {json.dumps(USAGE)}\n\ndata: [DONE]\n\n".encode())

    def _head(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_answer(cli: Cli, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    result = cli(
        "chat", "--url", stub.url, "--prompt", "hi", "--temperature", "0", "--stop", "x", "--system", "s"
    )
    assert (result.code, result.out) == (0, "one two\n")
    assert "9 prompt tokens, 5 tokens in" in result.err
    assert stub.keys == ["Bearer secret"]
    assert stub.bodies == [
        {
            "model": "served",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "stop": ["x"],
        }
    ]


def test_a_conversation_remembers_what_was_said(cli: Cli, stub: Stub) -> None:
    stub.chunks[:0] = [delta(reasoning_content="hm")]
    result = cli("chat", "mine", "--url", stub.url + "/v1/", stdin="first\nsecond\n")
    assert (result.code, result.out) == (0, "hm\n\none two\n" * 2)
    assert [body["model"] for body in stub.bodies] == ["mine", "mine"]
    assert [message["content"] for message in stub.bodies[1]["messages"]] == ["first", "one two", "second"]
    assert stub.keys == [None, None]


def test_an_error_leaves_the_conversation_as_it_was(cli: Cli, stub: Stub) -> None:
    stub.status, stub.refusal = 400, b'{"error": {"message": "too long", "code": null}}'
    result = cli("chat", "--url", stub.url, stdin="first\nsecond\n")
    assert result.code == 0
    assert result.err.count("octavo: error: the server answered 400: too long") == 2
    assert [len(body["messages"]) for body in stub.bodies] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 401, "refusal": b"{}"}, "answered 401: Unauthorized; OPENAI_API_KEY holds the key"),
        ({"status": 502, "refusal": b"<html>"}, "answered 502: Bad Gateway"),
        ({"ends": False}, "ended the answer in the middle"),
        ({"chunks": ["[1]"]}, "stream cannot be read: an event is no object"),
        ({"chunks": ["{"]}, "stream cannot be read: an event is not JSON"),
        ({"chunks": [{"error": {"message": "the engine died"}}]}, "the engine died"),
        ({"models": {"data": []}}, "serves no model"),
        ({"models": {}}, "/v1/models does not answer as OpenAI's servers do"),
    ],
)
def test_what_a_server_may_do_wrong(cli: Cli, stub: Stub, change: dict[str, Any], message: str) -> None:
    for name, value in change.items():
        setattr(stub, name, value)
    result = cli("chat", "--url", stub.url, "--prompt", "hi")
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err


def test_nobody_listens(cli: Cli, stub: Stub) -> None:
    closed = Stub()
    closed.server_close()
    result = cli("chat", "--url", closed.url, "--prompt", "hi")
    assert result.code == 1
    assert f"{closed.url}/v1 cannot be reached: Connection refused" in result.err


def test_ctrl_c_ends_the_request_over_there(cli: Cli, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.waits = True
    seen = iter(range(len(stub.chunks)))

    def interrupt_at_the_last(*_: object) -> None:
        if next(seen) == len(stub.chunks) - 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("octavo.cli.remote._count", interrupt_at_the_last)
    result = cli("chat", "--url", stub.url, "--prompt", "hi")
    assert (result.code, result.out) == (130, "one two\n")
    assert stub.left.wait(60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-cache-memory", "1GB"], "no engine here to be told --kv-cache-memory"),
        (["--show-drafts"], "no engine here to be told --show-drafts"),
        (["--url", "ftp://x"], "--url must be like http://127.0.0.1:8000"),
    ],
)
def test_options_that_do_not_fit(cli: Cli, arguments: list[str], message: str) -> None:
    result = cli("chat", "--url", "http://127.0.0.1:1", "--prompt", "hi", *arguments)
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize(
    "url",
    ["h:8000", "http://h:8000", "http://h:8000/", "http://h:8000/v1/", "http://h:8000/v1/chat/completions"],
)
def test_urls_may_be_written_in_several_ways(url: str) -> None:
    assert server_root(url) == "http://h:8000"
    assert server_root("https://h/prefix") == "https://h/prefix"


@pytest.mark.parametrize("url", ["", "http://", "ftp://h", "http://h:none", "http://h:99999"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url must be like"):
        server_root(url)
