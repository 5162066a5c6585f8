"""The servers that the server benchmark measures: `octavo serve`, and the front end before a fake engine.

python benchmarks/server_processes.py --port PORT --rate STEPS_A_SECOND     # the latter
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def fake_server(interval: float) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """This file's own server on the first core: its port and its process."""
    rate = 1 / interval if interval else 0.0
    command = [sys.executable, __file__, "--rate", str(rate)]
    yield from _listening(command, {min(os.sched_getaffinity(0))})


@contextlib.contextmanager
def real_server(model: str, *arguments: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """`octavo serve` on all cores."""
    options = ["--served-model-name", "fake", "--access-log", "off", *arguments]
    command = [sys.executable, "-m", "octavo", "serve", model, *options]
    yield from _listening(command, set())


def _listening(command: list[str], pinned: set[int]) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if pinned:
        os.sched_setaffinity(process.pid, pinned)
    try:
        wait_ready(port)
        yield port, process
    finally:
        process.terminate()
        process.wait(30)


def wait_ready(port: int) -> None:
    """Until GET /ready is answered 200."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            if b" 200 " in sock.recv(100):
                return
        time.sleep(0.01)
    raise TimeoutError("the server is not ready")


def serve_fake() -> None:
    """The front end before an engine that stamps each token with the time, until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.0, help="steps a second; 0: as fast as it goes")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from fastapi import FastAPI

    from octavo.engine import wire
    from octavo.server.app import create_app
    from octavo.server.base_client import Limits
    from octavo.server.engine_client import EngineClient
    from octavo.server.launch import serve
    from octavo.server.listener import bind
    from octavo.server.metrics import ServerMetrics
    from octavo.server.settings import ServeSettings
    from octavo.server.state import ServedModel, ServerState
    from tests.server.fake_engine import FakeEngineClient

    class Stamped(FakeEngineClient):
        """All tokens of a step travel as from another process."""

        def _emit(self, outputs: Sequence[Any]) -> None:
            text = f" {time.monotonic_ns()}"
            sent = []
            for request, output in outputs:
                for answer in output.outputs:
                    if answer.text:
                        answer.text = text
                sent.append(wire.output_to_wire(request.key, output, False))
            (body,) = wire.FrameReader().feed(wire.frame(wire.Outputs(sent)))
            message = wire.read_from_engine(body)
            assert isinstance(message, wire.Outputs)
            for output in message.outputs:
                request = self._open.get(output.key)
                if request is not None:
                    request.stream.put(
                        wire.output_from_wire(output, request.request_id, request.prompt, request.prompt_ids)
                    )

    pieces = [(" x", 100)]
    settings = ServeSettings(port=options.port, access_log=os.devnull)

    async def make_client(metrics: ServerMetrics) -> EngineClient:
        interval = 1 / options.rate if options.rate else 0.0
        return Stamped(
            lambda request: pieces * (request.params.max_tokens or 1),
            interval=interval,
            limits=Limits(),
            metrics=metrics,
            max_model_len=1 << 20,
            max_num_seqs=1024,
        )

    async def make_app(client: EngineClient, settings: ServeSettings) -> FastAPI:
        info = await client.wait_ready()
        return create_app(ServerState(client, settings, ServedModel.load(info, settings)))

    serve(make_client, make_app, bind(settings), settings, ())


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """Processor time of a process so far."""
    with open(f"/proc/{process.pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    serve_fake()
