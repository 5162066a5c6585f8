"""The life of a server: port open, model loading, serving, draining, gone.

The port is open from the first moment. Until the engine is ready a gate answers /health and /ready and
refuses the rest; then the application takes over. SIGTERM (or Ctrl-C) ends in order: the port is
closed, open requests may finish for `drain_timeout` seconds, and what is still open then is answered
with an error; a second signal ends without waiting. An engine that ends by itself ends the server
with code 1, after every open request was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.errors import OctavoError
from octavo.server.access_log import AccessLog, LineWriter
from octavo.server.engine_client import EngineClient
from octavo.server.http_protocol import bounded_protocol
from octavo.server.listener import url_of
from octavo.server.metrics import MetricsPage, ServerMetrics
from octavo.server.operations import health, readiness, router
from octavo.server.security import ApiKeys, BodyLimit, route_path, send_error, send_json
from octavo.server.settings import ServeSettings

logger = logging.getLogger("octavo")

ANSWER_SECONDS = 3.0  # for open requests to be told that there is no engine any more

MakeClient = Callable[[ServerMetrics], Awaitable[EngineClient]]
# Called when the engine begins to load: it may get things ready while it waits for the engine.
MakeApp = Callable[[EngineClient, ServeSettings], Awaitable[FastAPI]]


class Gate:
    """The application that uvicorn knows. Until `app` is there, it says how far loading has come."""

    def __init__(self, client: EngineClient) -> None:
        self.app: ASGIApp | None = None
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            path = route_path(scope)
            if path == "/health":
                await send_json(send, *health(self._client))
            elif path == "/ready":
                status, body = readiness(self._client)
                if status == 200:  # the engine is, we are not
                    status = 503
                    body = {"status": "loading", "stage": "starting the front end", "progress": None}
                await send_json(send, status, body)
            else:
                retry = [(b"retry-after", b"5")]
                text = "the model is still loading; GET /ready tells how far it has come"
                await send_error(send, 503, text, "service_unavailable", "loading", retry)


def guard(
    app: FastAPI, client: EngineClient, settings: ServeSettings, keys: Sequence[str], metrics: ServerMetrics
) -> ASGIApp:
    """An application with its operators' routes, behind the guards."""
    app.include_router(router(client, MetricsPage(metrics)))
    assert isinstance(settings.max_request_bytes, int)
    guarded: ASGIApp = BodyLimit(app, settings.max_request_bytes, settings.read_timeout)
    guarded = ApiKeys(guarded, keys, settings.metrics_key)
    if settings.cors_origin:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id"],
        )
    return guarded


def serve(
    make_client: MakeClient,
    make_app: MakeApp,
    sock: socket.socket,
    settings: ServeSettings,
    keys: Sequence[str],
) -> int:
    """Run until the end; the exit code. Raises what ended the loading of the model."""
    return _run(_Server(make_client, make_app, sock, settings, keys).run)


class _Server:
    def __init__(
        self,
        make_client: MakeClient,
        make_app: MakeApp,
        sock: socket.socket,
        settings: ServeSettings,
        keys: Sequence[str],
    ) -> None:
        self._make_client = make_client
        self._make_app = make_app
        self._sock = sock
        self._settings = settings
        self._keys = keys
        self._metrics = ServerMetrics(settings.metrics_prefix)
        self._began = time.monotonic()
        self._num_signals = 0
        self._signalled = asyncio.Event()

    async def run(self) -> int:
        settings = self._settings
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        writer = LineWriter.open(settings.access_log, self._metrics)
        client = await self._make_client(self._metrics)
        gate = Gate(client)
        http = _Uvicorn(_uvicorn_config(AccessLog(gate, writer, self._metrics), settings))
        url = url_of(self._sock, settings)
        logger.info("%s is open; loading the model", url)
        serving = loop.create_task(http.serve(sockets=[self._sock]))
        opening = loop.create_task(self._open(gate, client, url))
        dying = loop.create_task(client.wait_dead())
        ending = loop.create_task(self._signalled.wait())
        try:
            await asyncio.wait({serving, opening, dying, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not (serving.done() or dying.done() or ending.done()):
                opening.result()  # raises what ended the loading
                await asyncio.wait({serving, dying, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                await self._drain(client, http, serving)
                return 0
            return await self._report_end(client, http, serving, opening, dying)
        finally:
            for task in (opening, dying, ending):
                task.cancel()
            await client.shutdown()
            http.should_exit = http.force_exit = True
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(serving, ANSWER_SECONDS)
            if writer is not None:
                writer.close()

    async def _open(self, gate: Gate, client: EngineClient, url: str) -> None:
        """Make the application, and let it take over once the engine is ready."""
        app = await self._make_app(client, self._settings)
        info = await client.wait_ready()
        gate.app = guard(app, client, self._settings, self._keys, self._metrics)
        gc.freeze()  # what lives for ever by now is never looked through again: that took up to 50 ms
        seconds = time.monotonic() - self._began
        logger.info("ready after %.1f s: %s/v1 serves %s", seconds, url, ", ".join(info.served_model_names))

    async def _drain(self, client: EngineClient, http: _Uvicorn, serving: asyncio.Task[None]) -> None:
        """Close the port; wait for open requests, then for their errors to be sent."""
        timeout = self._settings.drain_timeout if self._num_signals < 2 else 0.0
        if client.num_open:
            logger.info("ending: %d open requests may take up to %g s", client.num_open, timeout)
        else:
            logger.info("ending")
        self._signalled.clear()
        http.should_exit = True
        again = asyncio.get_running_loop().create_task(self._signalled.wait())
        await asyncio.wait({serving, again}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        client.drain()  # only now: requests that had come in by the signal are taken
        await asyncio.wait(
            {serving, again}, timeout=max(0.0, timeout - 1.0), return_when=asyncio.FIRST_COMPLETED
        )
        again.cancel()
        if not serving.done():
            logger.info("ending now: %d open requests are answered with an error", client.num_open)
            await client.shutdown()
            await asyncio.wait({serving}, timeout=ANSWER_SECONDS)

    async def _report_end(
        self,
        client: EngineClient,
        http: _Uvicorn,
        serving: asyncio.Task[None],
        opening: asyncio.Task[None],
        dying: asyncio.Task[BaseException | None],
    ) -> int:
        """The engine has ended by itself, or HTTP has."""
        if not dying.done():
            serving.result()
            raise OctavoError("the HTTP server has stopped by itself")
        cause = dying.result()
        if not _was_opened(opening):
            raise cause or OctavoError("the engine ended while it was loading")
        logger.critical("the engine has stopped, and so does the server: %s", cause)
        http.should_exit = True
        await asyncio.wait({serving}, timeout=ANSWER_SECONDS)
        return 1

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._signalled.set()


def _was_opened(opening: asyncio.Task[None]) -> bool:
    """True if the application had taken over."""
    return opening.done() and not opening.cancelled() and opening.exception() is None


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: the end is ours to arrange."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _uvicorn_config(app: ASGIApp, settings: ServeSettings) -> uvicorn.Config:
    assert isinstance(settings.max_header_bytes, int)
    http: Any = "h11"
    with contextlib.suppress(ImportError):
        import httptools  # noqa: F401

        http = bounded_protocol(settings)
    tls: dict[str, Any] = {}
    if settings.uses_tls:
        import ssl

        tls = {
            "ssl_certfile": settings.ssl_certfile,
            "ssl_keyfile": settings.ssl_keyfile,
            "ssl_keyfile_password": settings.ssl_keyfile_password,
            "ssl_ca_certs": settings.ssl_ca_certs,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
        }
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a malformed request is no event
    return uvicorn.Config(
        app,
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        root_path=settings.root_path,
        timeout_keep_alive=max(1, round(settings.keep_alive)),
        timeout_graceful_shutdown=None,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        **tls,
    )


def _run(main: Callable[[], Awaitable[int]]) -> int:
    """In uvloop's event loop where it is installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop

    async def start() -> int:
        return await main()

    # asyncio.run, which has no loop_factory before Python 3.12
    loop = factory() if factory is not None else asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(start())
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()
