"""What the server's front end costs, and how soon it is ready.

    python benchmarks/server.py frontend [--streams 64] [--tokens 2000] [--repeat 5]
    python benchmarks/server.py paced [--streams 64] [--rate 50] [--seconds 10]
    python benchmarks/server.py ready [--model smollm2] [--repeat 5]
    python benchmarks/server.py served [--model smollm2] [--requests 64]

Each prints one JSON line. `frontend` and `paced` serve /v1/completions to streaming clients from an
engine that only counts; the front end (HTTP, protocol, guards, access log, metrics; the engine's
messages encoded *and* decoded, although in earnest another process encodes them) is pinned to the
first core, the clients to the second.

frontend: the engine emits as fast as the event loop turns. Tokens a second, and tokens a chunk: a
    chunk carries several tokens where the reader is behind.
paced: each stream gets a token at its turn of a step, `rate` steps a second. Every token is the time
    at which the engine made it, so the client knows how long it was on its way: the added latency.
ready: from the start of the process to the first 200 of /ready, and the front end's memory then.
served: tokens a second of `octavo serve` against those of `LLM.generate` for the same requests, one
    after the other, with the processor time that the clients took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT_IDS = [5, 6, 7, 8]
_STAMP = re.compile(rb'"text": ?" (\d{10,})')


def main() -> None:
    """Run the scenario that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scenario", choices=("frontend", "paced", "ready", "served", "serve-fake", "clients"))
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=50.0, help="steps a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fd", type=int, default=-1)
    options = parser.parse_args()
    run = {
        "frontend": frontend,
        "paced": paced,
        "ready": ready,
        "served": served,
        "serve-fake": serve_fake,
        "clients": clients,
    }[options.scenario]
    run(options)


def frontend(options: argparse.Namespace) -> None:
    """Tokens a second through the front end, the engine without a pace."""
    rates, per_chunk, seconds = [], [], []
    with fake_server(interval=0.0) as (port, server):
        for _ in range(options.repeat + 1):
            before = cpu_seconds(server)
            found = run_clients(port, options.streams, options.tokens)
            rates.append(found["tokens"] / found["seconds"])
            per_chunk.append(found["tokens"] / found["chunks"])
            seconds.append(1e6 * (cpu_seconds(server) - before) / found["chunks"])
    show(
        scenario="frontend",
        streams=options.streams,
        tokens_per_second=round(statistics.median(rates[1:])),
        least=round(min(rates[1:])),
        tokens_per_chunk=round(statistics.median(per_chunk[1:]), 2),
        server_cpu_us_per_chunk=round(statistics.median(seconds[1:]), 1),
    )


def paced(options: argparse.Namespace) -> None:
    """Latency that the front end adds to each token."""
    count = round(options.rate * options.seconds)
    results = []
    with fake_server(interval=1 / options.rate) as (port, server):
        run_clients(port, options.streams, 20)
        for _ in range(options.repeat):
            before = cpu_seconds(server)
            found = run_clients(port, options.streams, count)
            found["server_cpu"] = (cpu_seconds(server) - before) / found["seconds"]
            results.append(found)
    show(
        scenario="paced",
        streams=options.streams,
        rate=options.rate,
        tokens_per_chunk=round(results[0]["tokens"] / results[0]["chunks"], 3),
        added_ms={
            name: round(statistics.median(r["delays"][name] for r in results), 2)
            for name in ("p50", "p99", "max")
        },
        p99_of_each_run=[round(r["delays"]["p99"], 2) for r in results],
        server_cpu_share=round(statistics.median(r["server_cpu"] for r in results), 2),
    )


def ready(options: argparse.Namespace) -> None:
    """Seconds until /ready says so, and the front end's memory."""
    times, memory = [], []
    for _ in range(options.repeat):
        began = time.monotonic()
        with real_server(options.model) as (port, process):
            wait_ready(port)
            times.append(time.monotonic() - began)
            memory.append(resident_bytes(process.pid) / 1e6)
    show(
        scenario="ready",
        model=options.model,
        seconds=round(statistics.median(times), 2),
        each=[round(t, 2) for t in times],
        front_end_rss_mb=round(max(memory), 1),
    )


def served(options: argparse.Namespace) -> None:
    """Throughput of the same requests, offline and through the server."""
    requests = [
        {"prompt": [(17 * i + j) % 5000 + 100 for j in range(32 + 3 * i)], "max_tokens": 128}
        for i in range(options.requests)
    ]
    offline, online = [], []
    code = (
        "import json,sys,time; from octavo import LLM, SamplingParams as S; r=json.load(sys.stdin); "
        f"llm=LLM({options.model!r}, max_model_len=2048, enable_prefix_caching=False); "
        "p=[x['prompt'] for x in r]; "
        "s=[S(temperature=0,ignore_eos=True,max_tokens=x['max_tokens']) for x in r]; "
        "llm.generate(p[:4],s[:4],use_tqdm=False); t=[]\n"
        f"for _ in range({options.repeat}):\n"
        "  b=time.perf_counter(); o=llm.generate([{'prompt_token_ids':x} for x in p],s,use_tqdm=False)\n"
        "  t.append(sum(len(x.outputs[0].token_ids) for x in o)/(time.perf_counter()-b))\n"
        "print(json.dumps(t))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    offline = json.loads(done.stdout.splitlines()[-1])
    shares = []
    # Both with a cold prefix cache: the repeats would find their prompts in a warm one.
    cold = ("--max-model-len", "2048", "--no-enable-prefix-caching")
    with real_server(options.model, *cold) as (port, _):
        wait_ready(port)
        run_clients(port, 4, 8)
        for _ in range(options.repeat):
            found = run_clients(port, requests=requests)
            online.append(found["tokens"] / found["seconds"])
            shares.append(found["client_cpu"] / found["seconds"])
    show(
        scenario="served",
        model=options.model,
        requests=options.requests,
        offline_tokens_per_second=round(statistics.median(offline)),
        served_tokens_per_second=round(statistics.median(online)),
        ratio=round(statistics.median(online) / statistics.median(offline), 3),
        client_cpu_share_of_a_core=round(statistics.median(shares), 3),
    )


def show(**figures: Any) -> None:
    """One line for machines and people."""
    print(json.dumps(figures), flush=True)


# ---------------------------------------------------------------------- servers


@contextlib.contextmanager
def fake_server(interval: float) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """This file's `serve-fake` on the first core: its port and its process."""
    rate = 1 / interval if interval else 0.0
    command = [sys.executable, __file__, "serve-fake", "--rate", str(rate)]
    yield from _listening(command, cores(0))


@contextlib.contextmanager
def real_server(model: str, *arguments: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """`octavo serve` on all cores."""
    options = ["--served-model-name", "fake", "--access-log", "off", *arguments]
    command = [sys.executable, "-m", "octavo", "serve", model, *options]
    yield from _listening(command, set(), "--port")


def _listening(
    command: list[str], pinned: set[int], flag: str = "--port"
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, flag, str(port)],
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


def serve_fake(options: argparse.Namespace) -> None:
    """The front end before an engine that stamps each token with the time, until a signal comes."""
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


# ---------------------------------------------------------------------- clients


def run_clients(
    port: int, streams: int = 0, tokens: int = 0, requests: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """All streams at once, from a process on the second core; what they saw."""
    if requests is None:
        requests = [{"prompt": PROMPT_IDS, "max_tokens": tokens}] * streams
    command = [sys.executable, __file__, "clients", "--port", str(port)]
    done = subprocess.run(
        command, input=json.dumps(requests).encode(), capture_output=True, check=True, cwd=ROOT
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def clients(options: argparse.Namespace) -> None:
    """Ask all that stands on stdin at once; print what came back."""
    os.sched_setaffinity(0, cores(-1))
    requests = json.load(sys.stdin)
    import uvloop

    print(json.dumps(uvloop.run(_ask_all(options.port, requests))))


async def _ask_all(port: int, requests: list[dict[str, Any]]) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    readers = []
    for _ in requests:
        _, reader = await loop.create_connection(_Reader, "127.0.0.1", port)
        readers.append(reader)
    cpu = time.process_time()
    began = time.monotonic()
    for reader, request in zip(readers, requests, strict=True):
        reader.ask({"temperature": 0, "ignore_eos": True, "stream": True, **request})
    await asyncio.gather(*(reader.ended for reader in readers))
    seconds = time.monotonic() - began
    delays = sorted(delay for reader in readers for delay in reader.delays)
    tokens = sum(request["max_tokens"] for request in requests)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "chunks": sum(reader.num_chunks for reader in readers),
        "client_cpu": time.process_time() - cpu,
        "delays": {
            "p50": 1e3 * delays[len(delays) // 2],
            "p99": 1e3 * delays[int(len(delays) * 0.99)],
            "max": 1e3 * delays[-1],
        }
        if delays
        else {},
    }


class _Reader(asyncio.Protocol):
    """One streaming request: its chunks counted, its stamps read."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_chunks = 0
        self.delays: list[float] = []
        self._rest = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, body: dict[str, Any]) -> None:
        content = json.dumps({"model": "fake", **body}).encode()
        self._transport.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(content) + content
        )

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.num_chunks += data.count(b"data: {")
        for stamp in _STAMP.findall(data):
            self.delays.append((now - int(stamp[:20])) / 1e9)
        if self.num_chunks == 0 and b" 200 " not in data[:20]:
            self.ended.set_exception(RuntimeError(data.decode(errors="replace")))
            self._transport.close()
        if b"[DONE]" in self._rest + data:
            self._transport.close()
            if not self.ended.done():
                self.ended.set_result(None)
        self._rest = data[-8:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server closed the connection"))


def cores(index: int) -> set[int]:
    """One of the cores this process may use."""
    return {sorted(os.sched_getaffinity(0))[index]}


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
    main()
