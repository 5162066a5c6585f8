"""A small application in place of the OpenAI routes, so that what surrounds them can be tested alone."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from octavo.errors import BusyError, OctavoError, QueueFullError, RequestError, RequestTimeoutError
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.engine_client import EngineClient
from octavo.server.request_record import CURRENT_RECORD
from octavo.server.settings import ServeSettings


def make_stub_app(client: EngineClient, settings: ServeSettings) -> FastAPI:
    """POST /generate {"prompt_ids": [...], "stream": bool, ...sampling parameters}; GET /stats."""
    app = FastAPI()

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        prompt_ids, stream = body.pop("prompt_ids"), body.pop("stream", False)
        record = CURRENT_RECORD.get()
        outputs = client.generate(
            prompt_ids,
            SamplingParams(**body),
            request_id=record.request_id if record is not None else "?",
            arrival_time=time.monotonic(),
            kind="delta" if stream else "final",
        )
        try:
            first = await anext(outputs)
        except OctavoError as error:
            return _error(error)
        if not stream:
            return JSONResponse(_record(first))
        return StreamingResponse(_lines(first, outputs), media_type="application/x-ndjson")

    @app.get("/stats")
    async def stats() -> Response:
        found = await client.stats(check_integrity=True)
        return JSONResponse(
            {
                "running": found.num_running,
                "waiting": found.num_waiting,
                "used": found.num_used_blocks,
                "steps": found.num_steps,
                "open": client.num_open,
            }
        )

    return app


async def _lines(first: RequestOutput, rest: Any) -> AsyncIterator[str]:
    yield json.dumps(_record(first)) + "\n"
    try:
        async for output in rest:
            yield json.dumps(_record(output)) + "\n"
    except OctavoError as error:
        yield json.dumps({"error": str(error), "kind": type(error).__name__}) + "\n"
    finally:
        await rest.aclose()


def _record(output: RequestOutput) -> dict[str, Any]:
    answer = output.outputs[0]
    return {"text": answer.text, "ids": answer.token_ids, "reason": answer.finish_reason}


def _error(error: OctavoError) -> Response:
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, BusyError) else {}
    status = 500
    for kind, code in (
        (RequestError, 400),
        (QueueFullError, 429),
        (BusyError, 503),
        (RequestTimeoutError, 504),
    ):
        if isinstance(error, kind):
            status = code
            break
    return JSONResponse({"error": str(error), "kind": type(error).__name__}, status, headers)
