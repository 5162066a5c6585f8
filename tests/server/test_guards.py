"""Keys, sizes, names and lines: the middlewares around the application, and what they let through."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import ConfigError
from octavo.platform.process import hide_arguments
from octavo.server.access_log import AccessLog, LineWriter
from octavo.server.http_protocol import bounded_protocol
from octavo.server.metrics import ServerMetrics
from octavo.server.security import (
    CACHE_OWNER,
    ApiKeys,
    BodyLimit,
    KeyRing,
    load_keys,
    route_path,
    send_json,
)
from octavo.server.settings import ServeSettings


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that tells how many bytes it got, and in how many pieces."""
    sizes, more = [], True
    while more:
        message = await receive()
        sizes.append(len(message.get("body", b"")))
        more = message.get("more_body", False)
    await send_json(send, 200, {"bytes": sum(sizes), "pieces": len(sizes)})


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def get(app: ASGIApp, path: str, **headers: str) -> httpx.Response:
    async def call() -> httpx.Response:
        async with client_of(app) as client:
            return await client.get(path, headers=headers)

    return asyncio.run(call())


# ---------------------------------------------------------------------- keys


def test_only_a_known_key_passes() -> None:
    app = ApiKeys(echo, ["first-key", "second-key"])
    for header in (
        None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-ke", "Bearer first-keyy", "first-key",
        "Basic first-key", "Bearer first-key second-key", "Bearer first\tkey",
    ):  # fmt: skip
        headers = {} if header is None else {"authorization": header}
        answer = get(app, "/v1/models", **headers)
        assert answer.status_code == 401, header
        assert answer.json()["error"]["type"] == "authentication_error"
    for header in ("Bearer first-key", "bearer second-key", "Bearer  first-key"):
        assert get(app, "/v1/models", authorization=header).status_code == 200, header


def test_each_of_several_keys_owns_what_the_engine_remembers() -> None:
    async def tell(scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, CACHE_OWNER.get())

    def owner(app: ASGIApp, key: str) -> str | None:
        found: str | None = get(app, "/v1/models", authorization=f"Bearer {key}").json()
        return found

    several = ApiKeys(tell, ["first-key", "second-key"])
    first, second = owner(several, "first-key"), owner(several, "second-key")
    assert first
    assert second
    assert first != second
    assert owner(several, "first-key") == first
    assert "key" not in first
    for one in (ApiKeys(tell, ["first-key"]), ApiKeys(tell, ["first-key", "first-key"])):
        assert owner(one, "first-key") is None
    assert owner(ApiKeys(tell, []), "") is None


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200), ("/ready", 200), ("/health/", 401), ("//health", 401), ("/health/x", 401),
        ("/Health", 401), ("/v1/../health", 401), ("/metrics", 401), ("/openapi.json", 401), ("/", 401),
    ],
)  # fmt: skip
def test_two_paths_are_open_and_nothing_like_them(path: str, status: int) -> None:
    async def call() -> int:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "root_path": ""}
        await ApiKeys(echo, ["key"])(scope, receive, send)
        found: int = sent[0]["status"]
        return found

    assert asyncio.run(call()) == status


def test_the_metrics_key_opens_metrics_alone() -> None:
    for keys in (["api"], []):
        app = ApiKeys(echo, keys, "figures")
        assert get(app, "/metrics").status_code == 401
        assert get(app, "/metrics", authorization="Bearer figures").status_code == 200
        assert get(app, "/v1/models", authorization="Bearer figures").status_code == (401 if keys else 200)
    assert get(ApiKeys(echo, ["api"], "figures"), "/metrics", authorization="Bearer api").status_code == 200
    assert get(ApiKeys(echo, ["api"], "none"), "/metrics").status_code == 200
    assert get(ApiKeys(echo, ["api"], "none"), "/x", authorization="Bearer none").status_code == 401


def test_without_keys_all_is_open_and_websockets_are_nowhere() -> None:
    assert get(ApiKeys(echo, []), "/v1/models").status_code == 200
    with pytest.raises(RuntimeError):  # the guard must not touch it
        asyncio.run(ApiKeys(_never, [])({"type": "lifespan"}, _no_receive, _no_send))
    asyncio.run(ApiKeys(_never, [])({"type": "websocket", "path": "/"}, _no_receive, _no_send))


async def _never(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("called")


async def _no_receive() -> Message:
    raise AssertionError


async def _no_send(message: Message) -> None:
    raise AssertionError


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    count = 0
    compare = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        nonlocal count
        count += 1
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    ring = KeyRing(["a", "b", "c"])
    for given, found in ((b"a", True), (b"c", True), (b"x", False), (b"", False)):
        count = 0
        assert ring.holds(given) is found
        assert count == 3


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# comment\n  one  \n\ntwo\n")
    file.chmod(0o644)
    keys, warnings = load_keys(ServeSettings(api_key=("zero",), api_key_file=str(file)))
    assert keys == ["zero", "one", "two"]
    assert "chmod 600" in warnings[0]
    file.chmod(0o600)
    assert load_keys(ServeSettings(api_key_file=str(file))) == (["one", "two"], [])
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        load_keys(ServeSettings(api_key_file=str(file)))
    file.write_text("sec ret\n")
    with pytest.raises(ConfigError) as caught:
        load_keys(ServeSettings(api_key_file=str(file)))
    assert "sec ret" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(ServeSettings(api_key_file=str(tmp_path / "none")))


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux")
def test_a_secret_leaves_the_arguments() -> None:
    code = (
        "import sys; from octavo.platform.process import hide_arguments as h; assert h(sys.argv[1:3]); "
        "print(open('/proc/self/cmdline').read().replace(chr(0), ' '))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, "s3cret", "other", "s3cret-s3cret", "open"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "s3cret" not in shown
    assert shown.split()[-4:] == ["xxxxxx", "xxxxx", "xxxxxx-xxxxxx", "open"]
    assert hide_arguments([])


def test_a_proxys_prefix_is_no_part_of_the_path() -> None:
    assert route_path({"path": "/api/health", "root_path": "/api"}) == "/health"
    assert route_path({"path": "/apis/health", "root_path": "/api"}) == "/apis/health"
    assert route_path({"path": "/health", "root_path": ""}) == "/health"


# ---------------------------------------------------------------------- sizes


def test_a_body_may_be_so_large_and_no_larger() -> None:
    async def scenario() -> None:
        async def pieces(count: int) -> AsyncIterator[bytes]:
            for _ in range(count):
                yield b"x" * 10

        async with client_of(BodyLimit(echo, 100, 5)) as client:
            assert (await client.post("/", content=b"x" * 100)).json()["bytes"] == 100
            assert (await client.post("/", content=b"x" * 101)).status_code == 413
            assert (await client.post("/", content=pieces(10))).json() == {"bytes": 100, "pieces": 1}
            refused = await client.post("/", content=pieces(11))
            assert refused.status_code == 413
            assert refused.json()["error"]["code"] == "request_too_large"
            assert refused.headers["connection"] == "close"
            assert (await client.get("/")).json()["bytes"] == 0

    asyncio.run(scenario())


def test_nothing_is_read_of_a_body_that_says_it_is_too_large() -> None:
    async def scenario() -> None:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "headers": [(b"content-length", b"101")]}
        await BodyLimit(_never, 100, 5)(scope, _no_receive, send)
        assert sent[0]["status"] == 413

    asyncio.run(scenario())


def test_a_body_that_never_comes() -> None:
    async def scenario() -> None:
        async def stuck() -> Message:
            await asyncio.sleep(60)
            raise AssertionError

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "headers": [(b"content-length", b"5")]}
        await BodyLimit(_never, 100, 0.05)(scope, stuck, send)
        assert sent[0]["status"] == 408

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def raw_server() -> Iterator[tuple[str, int]]:
    """uvicorn with our protocol, in a thread: heads of up to 2000 bytes, which come within half a second."""
    pytest.importorskip("httptools")
    settings = ServeSettings(max_header_bytes=2000, read_timeout=0.5)
    config = uvicorn.Config(
        BodyLimit(echo, 1000, 0.5), port=0, http=bounded_protocol(settings), lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: server.run([sock]), daemon=True)
    thread.start()
    yield sock.getsockname()[:2]
    server.should_exit = True
    thread.join(10)


def talk(address: tuple[str, int], *pieces: bytes, pause: float = 0.0) -> bytes:
    """Send pieces; everything that comes back until the end, or until nothing does."""
    with socket.create_connection(address, timeout=5) as sock:
        for piece in pieces:
            try:
                sock.sendall(piece)
            except OSError:
                break
            time.sleep(pause)
        found = b""
        try:
            while data := sock.recv(65536):
                found += data
        except (TimeoutError, ConnectionResetError):
            pass
        return found


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\nlong: " + b"a" * 3000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 500 + b"\r\n",
        b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nnever-ends: " + b"a" * 3000,
    ],
)
def test_a_head_may_be_so_large_and_no_larger(raw_server: tuple[str, int], head: bytes) -> None:
    assert talk(raw_server, head).startswith(b"HTTP/1.1 431 ")
    slices = [head[i : i + 500] for i in range(0, len(head), 500)]
    assert talk(raw_server, *slices, pause=0.01).startswith(b"HTTP/1.1 431 ")


def test_heads_of_one_connection_are_counted_one_by_one(raw_server: tuple[str, int]) -> None:
    one = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\nx: " + b"a" * 1000 + b"\r\n\r\n" + b"b" * 900
    answers = talk(raw_server, one * 4 + b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert answers.count(b"HTTP/1.1 200") == 5
    assert answers.count(b'"bytes": 900') == 4


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_never_ends_is_not_waited_for(raw_server: tuple[str, int], start: bytes) -> None:
    began = time.monotonic()
    assert talk(raw_server, start) == b""
    assert time.monotonic() - began < 4


def test_rubbish_is_answered_400(raw_server: tuple[str, int]) -> None:
    assert talk(raw_server, b"\x00\x01\x02 rubbish\r\n\r\n").startswith(b"HTTP/1.1 400 ")


# ---------------------------------------------------------------------- names and lines


class Lines:
    """In place of a file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)


def test_a_line_a_request_without_what_is_private() -> None:
    lines, metrics = Lines(), ServerMetrics()
    app = AccessLog(BodyLimit(echo, 100, 5), lines, metrics)  # type: ignore[arg-type]

    async def scenario() -> None:
        async with client_of(app) as client:
            answer = await client.post(
                "/v1/x?key=secret-query",
                content=b"secret-prompt",
                headers={"authorization": "Bearer secret-key", "x-request-id": "abc-1"},
            )
            assert answer.headers["x-request-id"] == "abc-1"
            await client.get("/health")

    asyncio.run(scenario())
    (line,) = lines.lines
    found = json.loads(line)
    assert (found["id"], found["status"], found["path"]) == ("abc-1", 200, "/v1/x")
    assert found["aborted"] is False
    assert "secret" not in line
    assert metrics.http["POST", "other", 200] == metrics.http["GET", "other", 200] == 1


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "a\tb", "a\\b"])
def test_a_name_that_could_harm_a_log_is_replaced(given: str) -> None:
    app = AccessLog(echo, None, ServerMetrics())
    answer = get(app, "/", **{"x-request-id": given})
    assert answer.headers["x-request-id"] != given
    assert len(answer.headers["x-request-id"]) == 32


def test_a_request_that_fails_or_is_left_has_a_line_too() -> None:
    lines = Lines()

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("secret detail")

    async def left(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None: ...

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": [], "client": ("10.0.0.1", 5)}
    with pytest.raises(ValueError, match="secret"):
        asyncio.run(AccessLog(failing, lines, ServerMetrics())(dict(scope), gone, send))  # type: ignore[arg-type]
    asyncio.run(AccessLog(left, lines, ServerMetrics())(dict(scope), gone, send))  # type: ignore[arg-type]
    first, second = map(json.loads, lines.lines)
    assert (first["error"], first["status"], first["aborted"]) == ("ValueError", 0, True)
    assert (second["status"], second["aborted"], second["client"]) == (200, True, "10.0.0.1")
    assert "secret" not in lines.lines[0]


def test_lines_are_written_beside_the_server_and_dropped_when_they_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = ServerMetrics()
    file = tmp_path / "access.jsonl"
    file.write_text("before\n")
    writer = LineWriter.open(str(file), metrics)
    assert writer is not None
    writer.write("one")
    writer.write("two")
    writer.close()
    assert file.read_text() == "before\none\ntwo\n"
    assert LineWriter.open("off", metrics) is None
    with pytest.raises(ConfigError, match="cannot be written"):
        LineWriter.open(str(tmp_path / "no" / "such"), metrics)

    class Stuck:
        def __init__(self) -> None:
            self.go_on = threading.Event()

        def write(self, text: str) -> None:
            self.go_on.wait(10)

        def flush(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("octavo.server.access_log._MAX_WAITING_LINES", 5)
    stuck: Any = Stuck()
    writer = LineWriter(stuck, metrics)
    began = time.monotonic()
    for _ in range(20):
        writer.write("x")
    assert time.monotonic() - began < 5
    assert 14 <= metrics.dropped_log_lines <= 15
    stuck.go_on.set()
    writer.close()
