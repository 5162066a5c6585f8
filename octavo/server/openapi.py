"""The OpenAPI page: what requests hold comes from the models, what answers look like is said here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, events.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"id": {"type": "string"}, "object": {"type": "string"}},
                    "required": ["id", "object"],
                }
            },
            "text/event-stream": {},
        },
        "headers": {
            "X-Octavo-Warnings": {
                "description": "Fields of the request that had no effect, and why.",
                "schema": {"type": "string"},
            }
        },
    }
}


def describe(app: FastAPI) -> None:
    """Errors of validation have status 400 here, so FastAPI's own 422 is taken out of the page."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generate()
            for methods in schema["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema.get("components", {}).get("schemas", {}).pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
