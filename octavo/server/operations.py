"""What operators ask: /health, /ready, /metrics.

The first two are answered from the moment the port is open, by the gate in `launch.py`, while the
model still loads; all three stand in the application as well, so that its OpenAPI page shows them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from octavo.engine.engine_stats import EngineStats
from octavo.errors import EngineDeadError
from octavo.server.engine_client import EngineClient
from octavo.server.metrics import MetricsPage

STATS_PATIENCE = 5.0  # seconds that a scrape waits for the engine to end its step


def health(client: EngineClient) -> tuple[int, dict[str, Any]]:
    """(status, body) of /health: 200 as long as there is an engine, or will be."""
    state = client.state
    return (503 if state == "dead" else 200), {"status": state}


def readiness(client: EngineClient) -> tuple[int, dict[str, Any]]:
    """(status, body) of /ready: 200 while requests are taken; how far loading has come before that."""
    state = client.state
    body: dict[str, Any] = {"status": state}
    if state == "loading":
        progress = client.progress
        body["stage"] = progress.stage
        body["progress"] = None if progress.fraction is None else round(progress.fraction, 3)
    return (200 if state == "ready" else 503), body


def router(client: EngineClient, page: MetricsPage) -> APIRouter:
    """The three routes."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/health", summary="Is the server alive?")
    async def get_health() -> JSONResponse:
        status, body = health(client)
        return JSONResponse(body, status)

    @routes.get("/ready", summary="Does it take requests?", responses={503: {"description": "Not now."}})
    async def get_ready() -> JSONResponse:
        status, body = readiness(client)
        return JSONResponse(body, status)

    @routes.get(
        "/metrics",
        summary="Figures for Prometheus.",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def get_metrics(request: Request) -> Response:
        stats: EngineStats | None = None
        info = None
        if client.state in ("ready", "draining"):
            info = client.info
            try:
                stats = await asyncio.wait_for(client.stats(), STATS_PATIENCE)
            except (EngineDeadError, asyncio.TimeoutError):
                stats = None  # the server's own figures all the same
        is_up = client.state == "ready"
        accept = request.headers.get("accept", "")
        body, content_type = page.render(info, stats, num_open=client.num_open, is_up=is_up, accept=accept)
        return Response(body, headers={"content-type": content_type})

    return routes
