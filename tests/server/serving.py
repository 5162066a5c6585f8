"""The real application on a real port, in a thread, in front of a fake engine that follows a script.

The tokenizer is a small byte-level one with a chat template, so prompts are rendered and tokenized as in
earnest; what the engine says to them is up to the test.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import uvicorn

from octavo.engine.detokenizer import IncrementalDetokenizer
from octavo.engine.tokenizer import RustBackend, Tokenizer
from octavo.server.access_log import AccessLog
from octavo.server.app import create_app
from octavo.server.base_client import Limits, OpenRequest
from octavo.server.in_process_client import InProcessEngineClient
from octavo.server.launch import guard
from octavo.server.metrics import ServerMetrics
from octavo.server.settings import ServeSettings
from octavo.server.state import ServedModel, ServerState
from tests.engine.sample_tokenizers import byte_level
from tests.server.fake_engine import FakeEngineClient, Piece

T = TypeVar("T")

PLAIN = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
HERMES = (
    "{% if tools %}<|start|>system\n<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools> "
    "Call with <tool_call>.<|eot|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|eot|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MISTRAL = HERMES.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "")
LLAMA = HERMES.replace("<tool_call>", "<|python_tag|>").replace("</tool_call>", "")
THINKING = (
    PLAIN.replace("<|start|>assistant\n", "<|start|>assistant\n<think>\n")
    + "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
)

Script = str | Callable[[OpenRequest], "str | Sequence[Piece]"]


@lru_cache
def tokenizer(template: str = PLAIN) -> Tokenizer:
    """A small byte-level tokenizer with this chat template."""
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
    return Tokenizer(RustBackend(byte_level()), special, template)


def tokens(text: str, template: str = PLAIN) -> list[Piece]:
    """A text as an engine gives it: token by token, characters whole."""
    known = tokenizer(template)
    detokenizer = IncrementalDetokenizer(known, skip_special_tokens=False)
    ids = known.encode(text, add_special_tokens=False)
    return [(detokenizer.append([i], index == len(ids) - 1), i) for index, i in enumerate(ids)]


class Server:
    """A running server. `engine` is its client, which lives in the server's thread."""

    def __init__(self, url: str, engine: Any, loop: asyncio.AbstractEventLoop, app: Any) -> None:
        self.url = url
        self.engine = engine
        self.app = app
        self.stopped = asyncio.Event()
        self._loop = loop

    def stop(self) -> None:
        """Ask it to end."""
        self._loop.call_soon_threadsafe(self.stopped.set)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in the server's event loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


@contextmanager
def serving(
    script: Script = "one two three",
    *,
    template: str | None = PLAIN,
    interval: float = 0.0,
    settings: dict[str, Any] | None = None,
    **info: Any,
) -> Iterator[Server]:
    """A server whose engine answers with `script`, or with what it makes of the request."""
    options = ServeSettings.from_kwargs(**(settings or {}))
    known = tokenizer(template) if template is not None else None
    facts = {"vocab_size": known.vocab_size if known is not None else 1000, **info}

    def pieces(request: OpenRequest) -> Sequence[Piece]:
        said = script(request) if callable(script) else script
        return tokens(said, template or PLAIN) if isinstance(said, str) else said

    async def make(metrics: ServerMetrics) -> tuple[FakeEngineClient, ServedModel]:
        engine = FakeEngineClient(pieces, interval=interval, metrics=metrics, **facts)
        return engine, ServedModel.of(engine.info, options, known)

    with _running(make, options) as server:
        yield server


@contextmanager
def serving_model(path: str, **engine_args: Any) -> Iterator[Server]:
    """A server with a real engine, in its own process."""
    options = ServeSettings()

    async def make(metrics: ServerMetrics) -> tuple[InProcessEngineClient, ServedModel]:
        engine = InProcessEngineClient(Limits(), metrics)
        await engine.load({"model": path, **engine_args})
        return engine, ServedModel.load(await engine.wait_ready(), options)

    with _running(make, options) as server:
        yield server


@contextmanager
def _running(
    make: Callable[[ServerMetrics], Coroutine[Any, Any, tuple[Any, ServedModel]]], options: ServeSettings
) -> Iterator[Server]:
    """The application around an engine, in a thread, until the end of the block."""
    started = threading.Event()
    made: list[Server] = []
    failed: list[BaseException] = []

    async def run() -> None:
        metrics = ServerMetrics()
        engine, model = await make(metrics)
        app = create_app(ServerState(engine, options, model))
        whole = AccessLog(guard(app, engine, options, [], metrics), None, metrics)
        sock = socket.socket(proto=socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle's delays on
        sock.bind(("127.0.0.1", 0))
        http = uvicorn.Server(
            uvicorn.Config(
                whole,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=2,
                timeout_keep_alive=600,
            )
        )
        serve = asyncio.ensure_future(http.serve(sockets=[sock]))
        while not http.started and not serve.done():
            await asyncio.sleep(0.005)
        server = Server(f"http://127.0.0.1:{sock.getsockname()[1]}", engine, asyncio.get_running_loop(), app)
        made.append(server)
        started.set()
        await server.stopped.wait()
        http.should_exit = True
        await serve
        await engine.shutdown()

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=main, name="test-server", daemon=True)
    thread.start()
    started.wait(120)
    if failed:
        raise failed[0]
    try:
        yield made[0]
    finally:
        made[0].stop()
        thread.join(30)
    if failed:
        raise failed[0]
