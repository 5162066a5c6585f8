"""`octavo serve` with the stub application: python -m tests.server.serve_stub [arguments of serve]."""

from __future__ import annotations

import sys
from typing import Any

from octavo.cli import main, serve
from octavo.server.engine_client import EngineClient
from octavo.server.settings import ServeSettings


async def _make_app(client: EngineClient, settings: ServeSettings) -> Any:
    from tests.server.stub_app import make_stub_app

    await client.wait_ready()
    return make_stub_app(client, settings)


if __name__ == "__main__":
    serve._make_app = _make_app
    sys.exit(main.main(["serve", *sys.argv[1:]]))
