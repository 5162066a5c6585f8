"""uvicorn's HTTP protocol with bounds on the head of a request.

uvicorn with httptools takes a request line and headers of any length and waits for their end for ever;
a few hundred such connections are enough to stop a server. Here a head has a largest size (431) and a
longest wait (the connection is closed). Bodies are bounded in `security.py`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from octavo.config import parse_size
from octavo.server.settings import ServeSettings

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 33\r\nconnection: close\r\n\r\nThe head of this request is long."
)


def bounded_protocol(settings: ServeSettings) -> type[HttpToolsProtocol]:
    """The protocol class for these settings."""

    class Bounded(BoundedHttpTools):
        max_head_bytes = parse_size(settings.max_header_bytes, "max_header_bytes")
        head_timeout = settings.read_timeout

    return Bounded


class BoundedHttpTools(HttpToolsProtocol):
    """One connection. `head_timeout` 0 is no limit."""

    max_head_bytes = 65536
    head_timeout = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0  # that have come in
        self._parsed_bytes = 0  # of these, in whole headers: of this request alone
        self._is_too_large = False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._start_head_timer()
        super().data_received(data)
        if self._in_head and self._head_bytes > self.max_head_bytes and not self.transport.is_closing():
            self._is_too_large = True
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._parsed_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to a head it cannot read, or we to one that is too large."""
        if self._is_too_large:
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > self.max_head_bytes:
            self._is_too_large = True
            raise ValueError("the head is too large")  # the parser stops, and send_400_response is called

    def _start_head_timer(self) -> None:
        if self.head_timeout:
            self._head_timer = self.loop.call_later(self.head_timeout, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
