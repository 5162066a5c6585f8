"""The server as a process: it loads, serves, drains, fails and ends, and nobody is left waiting."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import TINY_ARGUMENTS
from tests.server.processes import PATIENCE, ServerProcess, server

LONG = {"prompt_ids": [5, 6, 7], "max_tokens": 8000, "ignore_eos": True, "temperature": 0.0}
SHORT = {**LONG, "max_tokens": 4}


class Stream:
    """A streaming request in a thread: `lines` grows as they come."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.status = 0
        self._url, self._body = url, {**body, "stream": True}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with (
                httpx.Client(timeout=PATIENCE) as client,
                client.stream("POST", f"{self._url}/generate", json=self._body) as answer,
            ):
                self.status = answer.status_code
                for line in answer.iter_lines():
                    self.lines.append(json.loads(line))
        except Exception as error:
            self.error = error

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while len(self.lines) < count:
            assert time.monotonic() < deadline, f"{len(self.lines)} lines, error {self.error!r}"
            time.sleep(0.01)

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the stream has no end"


def stats(url: str) -> dict[str, int]:
    """The engine's statistics, its blocks and slots checked."""
    answer = httpx.get(f"{url}/stats", timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    found: dict[str, int] = answer.json()
    return found


def wait_idle(url: str) -> dict[str, int]:
    deadline = time.monotonic() + PATIENCE
    while True:
        found = stats(url)
        if not (found["running"] or found["waiting"] or found["used"] or found["open"]):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


@pytest.fixture
def own_server(tiny_model: Path) -> Iterator[ServerProcess]:
    with server(str(tiny_model), *TINY_ARGUMENTS, "--drain-timeout", "20") as process:
        process.wait_ready()
        yield process


# ---------------------------------------------------------------------- serving


def test_answers_whole_and_streamed_are_the_same(shared_server: ServerProcess) -> None:
    url = shared_server.wait_ready()
    body = {**LONG, "max_tokens": 50}
    whole = httpx.post(f"{url}/generate", json=body, timeout=PATIENCE).json()
    assert len(whole["ids"]) == 50
    assert whole["reason"] == "length"
    stream = Stream(url, body)
    stream.join()
    assert "".join(line["text"] for line in stream.lines) == whole["text"]
    assert [token for line in stream.lines for token in line["ids"]] == whole["ids"]
    assert [line["reason"] for line in stream.lines][-1] == "length"


def test_the_front_end_holds_no_torch(shared_server: ServerProcess) -> None:
    shared_server.wait_ready()
    maps = Path(f"/proc/{shared_server.process.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert "libtorch" not in maps.read_text()
    assert "libtorch" in Path(f"/proc/{shared_server.engine.pid}/maps").read_text()


def test_a_wrong_request_is_the_callers_alone(shared_server: ServerProcess) -> None:
    url = shared_server.wait_ready()
    for body, word in (
        ({"prompt_ids": [], "max_tokens": 1}, "empty"),
        ({"prompt_ids": [999999], "max_tokens": 1}, "999999"),
        ({"prompt_ids": [1] * 9000, "max_tokens": 1}, "8192"),
        ({"prompt_ids": [1], "max_tokens": 1, "structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"prompt_ids": [1], "max_tokens": 1, "stop": ["\ud800"]}, "surrogate"),
    ):
        answer = httpx.post(f"{url}/generate", content=json.dumps(body), timeout=PATIENCE)
        assert answer.status_code == 400, answer.text
        assert word in answer.json()["error"]
    assert httpx.post(f"{url}/generate", json=SHORT, timeout=PATIENCE).status_code == 200
    assert wait_idle(url)["open"] == 0


def test_a_grammar_is_compiled_in_the_engines_process(shared_server: ServerProcess) -> None:
    pytest.importorskip("llguidance")
    url = shared_server.wait_ready()
    body = {**SHORT, "max_tokens": 8, "structured_outputs": {"regex": "[ab]{5}"}, "ignore_eos": False}
    text = httpx.post(f"{url}/generate", json=body, timeout=PATIENCE).json()["text"]
    assert len(text) == 5
    assert set(text) <= set("ab")


def test_a_client_that_goes_frees_its_request(shared_server: ServerProcess) -> None:
    url = shared_server.wait_ready()
    wait_idle(url)
    leave_early(url, "/generate", {**LONG, "stream": True})
    before = stats(url)["steps"]
    after = wait_idle(url)["steps"]
    assert after - before < 2000, "the engine went on to the end of the answer"


def test_every_request_has_a_line_and_a_name(shared_server: ServerProcess) -> None:
    url = shared_server.wait_ready()
    answer = httpx.post(
        f"{url}/generate?secret=1", json=SHORT, headers={"x-request-id": "mine-17"}, timeout=PATIENCE
    )
    assert answer.headers["x-request-id"] == "mine-17"
    given = httpx.post(f"{url}/generate", json=SHORT, headers={"x-request-id": "a b"}, timeout=PATIENCE)
    assert given.headers["x-request-id"] not in ("a b", "")
    deadline = time.monotonic() + PATIENCE
    while not (lines := [line for line in shared_server.log() if line["id"] == "mine-17"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (line,) = lines
    assert line["route"] == line["path"] == "/generate"
    assert (line["status"], line["prompt_tokens"], line["output_tokens"]) == (200, 3, 4)
    assert line["finish_reason"] == "length"
    assert line["aborted"] is False
    assert 0 < line["ttft"] <= line["latency"]


@pytest.mark.parametrize("extra", [(), ("--in-process",)], ids=["child", "in-process"])
def test_the_real_application(tiny_model: Path, extra: tuple[str, ...]) -> None:
    """The same life with OpenAI's routes, which watch their clients whether they stream or not."""
    arguments = (*TINY_ARGUMENTS, "--served-model-name", "tiny", *extra)
    with server(str(tiny_model), *arguments, stub=False) as process:
        url = process.wait_ready()
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 5
        assert httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"][0]["id"] == "tiny"
        for count, stream in enumerate((True, False), start=1):
            long = {**body, "max_tokens": 8000, "ignore_eos": True, "stream": stream}
            leave_early(url, "/v1/chat/completions", long)
            wanted = {
                "num_requests_running": 0.0,
                "kv_cache_usage_perc": 0.0,
                'request_success_total{finished_reason="abort"}': float(count),
            }
            deadline = time.monotonic() + PATIENCE
            while not wanted.items() <= (found := figures(url)).items():
                assert time.monotonic() < deadline, found
                time.sleep(0.02)


def leave_early(url: str, path: str, body: dict[str, Any]) -> None:
    """Ask, wait until the engine is at it, and close the connection."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(head.encode() + content)
        deadline = time.monotonic() + PATIENCE
        while figures(url)["num_requests_running"] != 1:
            assert time.monotonic() < deadline


def figures(url: str) -> dict[str, float]:
    """The metrics page: name without prefix (and without the labels that all have) -> value."""
    page = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
    found = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = re.sub(r'(engine|model_name)="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")
            found[name.removeprefix("octavo:")] = float(value)
    return found


# ---------------------------------------------------------------------- the end


def test_sigterm_lets_open_requests_finish(own_server: ServerProcess) -> None:
    url = own_server.wait_ready()
    stream = Stream(url, {**LONG, "max_tokens": 400})
    stream.wait_for(1)
    own_server.signal()
    stream.join()
    assert stream.error is None
    assert stream.lines[-1]["reason"] == "length"
    assert sum(len(line["ids"]) for line in stream.lines) == 400
    assert own_server.wait_end() == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health", timeout=5)


def test_a_second_sigterm_ends_at_once_and_says_so(own_server: ServerProcess) -> None:
    url = own_server.wait_ready()
    stream = Stream(url, LONG)
    stream.wait_for(1)
    own_server.signal()
    time.sleep(0.3)
    assert own_server.process.poll() is None
    own_server.signal()
    assert own_server.wait_end() == 0
    stream.join()
    assert stream.lines[-1]["kind"] == "EngineDeadError"
    assert "shutting down" in stream.lines[-1]["error"]


@pytest.mark.slow
def test_the_drain_has_an_end(tiny_model: Path) -> None:
    with server(str(tiny_model), *TINY_ARGUMENTS, "--drain-timeout", "1.5") as process:
        url = process.wait_ready()
        streams = [Stream(url, LONG) for _ in range(16)]
        for stream in streams:
            stream.wait_for(1)
        process.signal()
        assert process.wait_end() == 0
        for stream in streams:
            stream.join()
            assert stream.lines[-1].get("kind") == "EngineDeadError" or stream.lines[-1]["reason"]


def test_a_killed_engine_ends_the_server_and_every_request_hears_of_it(own_server: ServerProcess) -> None:
    url = own_server.wait_ready()
    streams = [Stream(url, LONG) for _ in range(8)]
    for stream in streams:
        stream.wait_for(1)
    own_server.engine.kill()
    began = time.monotonic()
    assert own_server.wait_end() == 1
    assert time.monotonic() - began < 15
    for stream in streams:
        stream.join()
        assert stream.error is None
        assert stream.lines[-1]["kind"] == "EngineDeadError"
        assert "SIGKILL" in stream.lines[-1]["error"]
    assert any("SIGKILL" in line for line in own_server.err)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_killed_server_takes_the_engine_with_it(own_server: ServerProcess) -> None:
    url = own_server.wait_ready()
    stream = Stream(url, LONG)  # in the middle of work
    stream.wait_for(1)
    engine = own_server.engine
    own_server.signal(signal.SIGKILL)
    own_server.wait_end()
    engine.wait(10)
    assert not engine.is_running()


def test_the_end_of_the_socket_ends_the_engine(tiny_model: Path) -> None:
    """Where the kernel does not say that the parent died: here nobody did."""
    from octavo.server.engine_child import EngineChild

    child = EngineChild.start({"model": str(tiny_model), "dtype": "float32", "kv_cache_memory": "64MB"})
    try:
        child.sock.close()
        assert child.process.wait(PATIENCE) != 0
    finally:
        child.kill()


@pytest.mark.slow
def test_sigterm_while_the_model_loads(tiny_model: Path) -> None:
    with server(str(tiny_model), *TINY_ARGUMENTS) as process:
        url = process.url()
        answer = httpx.get(f"{url}/ready", timeout=10)
        assert answer.status_code in (200, 503)
        process.signal()
        assert process.wait_end() == 0


# ---------------------------------------------------------------------- before anything is loaded


def test_health_and_ready_are_answered_while_loading(tiny_model: Path) -> None:
    # A child that is stopped loads for ever.
    with server(str(tiny_model), *TINY_ARGUMENTS) as process:
        url = process.url()
        process.engine.suspend()
        try:
            assert httpx.get(f"{url}/health", timeout=10).json() == {"status": "loading"}
            ready = httpx.get(f"{url}/ready", timeout=10)
            assert ready.status_code == 503
            assert ready.json()["status"] == "loading"
            assert "stage" in ready.json()
            refused = httpx.post(f"{url}/generate", json=SHORT, timeout=10)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "5"
            assert refused.json()["error"]["code"] == "loading"
        finally:
            process.engine.resume()
        process.wait_ready()


def test_a_port_in_use(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = ServerProcess(str(tiny_model), "--port", str(port))
        assert process.wait_end() == 1
    assert process.err == [
        f"octavo: error: port {port} on 127.0.0.1 is in use; "
        "choose another one with --port, or end what uses it"
    ]
    process.assert_no_orphans()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    process = ServerProcess(str(tmp_path / "nothing"))
    assert process.wait_end() == 1
    errors = [line for line in process.err if "error" in line]
    assert len(errors) == 1
    assert "nothing" in errors[0]
    assert not any("Traceback" in line for line in process.err)
    process.assert_no_orphans()


@pytest.mark.slow
def test_memory_that_is_not_there(tiny_model: Path) -> None:
    process = ServerProcess(str(tiny_model), "--kv-cache-memory", "900TB")
    assert process.wait_end() == 1
    assert not any("Traceback" in line for line in process.err), process.err
    assert any("octavo: error:" in line for line in process.err)
    process.assert_no_orphans()


# ---------------------------------------------------------------------- limits


@pytest.mark.slow
def test_a_flood_is_answered_429(tiny_model: Path) -> None:
    arguments = (*TINY_ARGUMENTS, "--max-num-seqs", "2", "--max-queue", "2")
    with server(str(tiny_model), *arguments) as process:
        url = process.wait_ready()
        streams = [Stream(url, LONG) for _ in range(4)]
        deadline = time.monotonic() + PATIENCE
        while stats(url)["open"] < 4:
            assert time.monotonic() < deadline
        answer = httpx.post(f"{url}/generate", json=SHORT, timeout=PATIENCE)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert len(streams) == 4


@pytest.mark.slow
def test_a_request_has_a_longest_time(tiny_model: Path) -> None:
    with server(str(tiny_model), *TINY_ARGUMENTS, "--request-timeout", "0.5") as process:
        url = process.wait_ready()
        answer = httpx.post(f"{url}/generate", json=LONG, timeout=PATIENCE)
        assert answer.status_code == 504
        stream = Stream(url, LONG)
        stream.join()
        assert stream.lines[-1]["kind"] == "RequestTimeoutError"
        wait_idle(url)


@pytest.mark.slow
def test_an_engine_that_hangs_is_ended(tiny_model: Path) -> None:
    with server(str(tiny_model), *TINY_ARGUMENTS, "--engine-timeout", "3") as process:
        url = process.wait_ready()
        stream = Stream(url, LONG)
        stream.wait_for(1)
        os.kill(process.engine.pid, signal.SIGSTOP)  # alive, and silent
        assert process.wait_end() == 1
        stream.join()
        assert stream.lines[-1]["kind"] == "EngineDeadError"
        assert "silent" in stream.lines[-1]["error"]


# ---------------------------------------------------------------------- keys


def test_keys_guard_everything_and_are_shown_nowhere(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# two keys\nfrom-file-1\n\nfrom-file-2\n")
    file.chmod(0o600)
    arguments = (*TINY_ARGUMENTS, "--api-key", "from-flag", "--api-key-file", str(file))
    environment = {"OCTAVO_METRICS_KEY": "only-metrics"}
    with server(str(tiny_model), *arguments, env=environment) as process:
        url = process.wait_ready()

        def status(path: str, key: str | None) -> int:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return httpx.get(f"{url}{path}", headers=headers, timeout=PATIENCE).status_code

        for path in ("/stats", "/docs", "/openapi.json", "/metrics", "/nothing"):
            assert status(path, None) == 401, path
            assert status(path, "wrong") == 401, path
        for key in ("from-flag", "from-file-1", "from-file-2"):
            assert status("/stats", key) == 200
        assert status("/metrics", "only-metrics") == 200
        assert status("/stats", "only-metrics") == 401
        assert status("/health", None) == status("/ready", None) == 200
        refused = httpx.get(f"{url}/stats", timeout=PATIENCE)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        cmdline = Path(f"/proc/{process.process.pid}/cmdline")
        if cmdline.exists():
            assert b"from-flag" not in cmdline.read_bytes()
            assert b"xxxxxxxxx" in cmdline.read_bytes()
            environ = Path(f"/proc/{process.engine.pid}/environ").read_bytes()
            assert b"only-metrics" not in environ
    shown = "\n".join([*process.out, *process.err])
    for key in ("from-flag", "from-file", "only-metrics"):
        assert key not in shown


# ---------------------------------------------------------------------- the long form


@pytest.mark.slow
def test_sixty_four_clients_who_come_and_go(smollm2_path: Path) -> None:
    """For a minute, and many of them leave early; then the engine is idle and nothing is in use."""
    import asyncio
    import random

    rng = random.Random(17)
    with server(str(smollm2_path), "--max-model-len", "1024", "--kv-cache-memory", "256MB") as process:
        url = process.wait_ready()
        end = time.monotonic() + 60

        async def one(client: httpx.AsyncClient) -> None:
            while time.monotonic() < end:
                body = {
                    "prompt_ids": [rng.randrange(1000) for _ in range(rng.randrange(1, 200))],
                    "max_tokens": rng.randrange(1, 60),
                    "temperature": 1.0,
                    "stream": rng.random() < 0.7,
                }
                leaves_at = rng.choice([None, 0, 1, 5])
                try:
                    async with client.stream("POST", f"{url}/generate", json=body) as answer:
                        assert answer.status_code == 200
                        count = 0
                        async for _ in answer.aiter_lines():
                            if leaves_at is not None and count >= leaves_at:
                                break
                            count += 1
                except httpx.ReadTimeout:
                    raise
                await asyncio.sleep(0)

        async def all_of_them() -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(timeout=PATIENCE, limits=limits) as client:
                await asyncio.gather(*(one(client) for _ in range(64)))

        asyncio.run(all_of_them())
        found = wait_idle(url)
        assert found["steps"] > 50
