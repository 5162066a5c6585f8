"""The port, bound before anything is loaded: a port in use is known at once and not after minutes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from octavo.errors import OctavoError
from octavo.server.settings import ServeSettings

_BACKLOG = 2048
_WANTED_FILES = 65536


def bind(settings: ServeSettings) -> socket.socket:
    """A socket bound to the host and port. Raises OctavoError with one line that says what to change.

    Nobody is answered before uvicorn listens on it.
    """
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OctavoError(
            f"host {host!r} is no address of this machine ({error.strerror}); try --host 127.0.0.1"
        ) from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            with contextlib.suppress(OSError):  # :: serves IPv4 too, where the system can
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise OctavoError(_reason(host, port, error)) from None
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket, settings: ServeSettings) -> str:
    """The address to type, of a bound socket."""
    host, port = sock.getsockname()[:2]
    scheme = "https" if settings.uses_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def allow_many_files() -> None:
    """Raise the number of open files (connections among them) as far as the system lets us."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _reason(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; choose another one with --port, or end what uses it"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges that this user has not; choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"host {host!r} is no address of this machine; try --host 127.0.0.1, or 0.0.0.0 for every network"
        )
    return f"cannot listen on {host}:{port}: {error.strerror or os.strerror(error.errno or 0)}"
