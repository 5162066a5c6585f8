"""llama.cpp's llama-server (`--llamacpp-server`, `--llamacpp-gguf`), on its native endpoint.

That endpoint takes token ids. The server runs on the loopback address and ends with the runner.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.engines import job

READY_SECONDS = 120


class LlamaServer:
    """A running server."""

    def __init__(self, options: dict[str, Any]) -> None:
        context = options["slots"] * options["longest_request"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        threads = str(options["threads"])
        command = [options["server"], "-m", options["gguf"], "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["-t", threads, "-tb", threads, "-np", str(options["slots"]), "-c", str(context)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._server = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait()
            self.version = f"llama.cpp {self._get('/props').get('build_info', 'of unknown build')}"
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while self._server.poll() is None and time.monotonic() < deadline:
            try:
                if self._get("/health").get("status") == "ok":
                    return
            except OSError:
                pass  # it does not listen yet
            time.sleep(0.01)
        self._log.seek(0)
        raise RuntimeError(f"llama-server did not come up:\n{self._log.read()[-2000:]}")

    def _get(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def _ask(self, request: job.Request, arrived: job.Arrived) -> None:
        """One completion; in a stream every event brings the ids of its tokens."""
        body = {
            "prompt": request.prompt,
            "n_predict": request.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": True,
            "stream": True,
            "return_tokens": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"llama-server: {response.status} {response.read()[:500]!r}")
            for line in response:
                if line.startswith(b"data: "):
                    arrived(len(json.loads(line[6:]).get("tokens") or ()))
        finally:
            connection.close()

    def stream(self, request: job.Request, arrived: job.Arrived) -> None:
        """One streamed completion."""
        self._ask(request, arrived)

    def complete(self, requests: Sequence[job.Request]) -> int:
        """All of them at the same time; the server queues what has no slot."""
        made = [0] * len(requests)

        def ask(index: int) -> None:
            def arrived(count: int) -> None:
                made[index] += count

            self._ask(requests[index], arrived)

        with ThreadPoolExecutor(len(requests)) as pool:
            list(pool.map(ask, range(len(requests))))
        return sum(made)

    def close(self) -> None:
        """Stop the server."""
        self._server.terminate()
        try:
            self._server.wait(20)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._log.close()


if __name__ == "__main__":
    job.run(LlamaServer)
