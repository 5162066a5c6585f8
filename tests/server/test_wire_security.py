"""TLS and other web origins, against a real server: what a client sees on the wire."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.processes import PATIENCE, ServerProcess, server

TINY_ARGUMENTS = ("--max-model-len", "256", "--max-num-seqs", "4", "--kv-cache-memory", "8MB")
SHORT: dict[str, Any] = {"prompt_ids": [1, 2, 3], "max_tokens": 3}


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key) that vouch for themselves and for 127.0.0.1."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
               "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}",
               "-addext", "subjectAltName=IP:127.0.0.1"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make certificates")
def test_tls_with_and_without_a_clients_certificate(tiny_model: Path, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "server")
    known = certificate(tmp_path, "known")
    unknown = certificate(tmp_path, "unknown")
    arguments = ("--ssl-certfile", str(cert), "--ssl-keyfile", str(key))
    trusting = ssl.create_default_context(cafile=str(cert))
    with server(str(tiny_model), *TINY_ARGUMENTS, *arguments) as process:
        url = process.wait_ready()
        assert url.startswith("https://127.0.0.1:")
        answer = httpx.post(f"{url}/generate", json=SHORT, verify=trusting, timeout=PATIENCE)
        assert answer.status_code == 200
        assert answer.json()["reason"] == "length"
        with httpx.stream(
            "POST", f"{url}/generate", json={**SHORT, "stream": True}, verify=trusting
        ) as stream:
            assert len(list(stream.iter_lines())) >= 1
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            httpx.get(f"{url}/health", timeout=PATIENCE)  # nobody vouches for it
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200" not in plain.recv(100)
    with server(str(tiny_model), *TINY_ARGUMENTS, *arguments, "--ssl-ca-certs", str(known[0])) as process:
        url = process.url()
        for shown, is_let_in in ((known, True), (unknown, False), (None, False)):
            context = ssl.create_default_context(cafile=str(cert))
            if shown is not None:
                context.load_cert_chain(*map(str, shown))
            try:
                status = httpx.get(f"{url}/health", verify=context, timeout=PATIENCE).status_code
            except httpx.TransportError:
                status = None
            assert status == (200 if is_let_in else None)


@pytest.mark.slow
def test_only_named_origins_may_ask_from_a_browser(tiny_model: Path) -> None:
    ours, other = "https://ours.example", "https://other.example"
    arguments = ("--cors-origin", ours, "--api-key", "key")
    with server(str(tiny_model), *TINY_ARGUMENTS, *arguments) as process:
        url = process.wait_ready()

        def ask(method: str, origin: str, **headers: str) -> httpx.Response:
            sent = {"origin": origin, **{name.replace("_", "-"): value for name, value in headers.items()}}
            return httpx.request(method, f"{url}/generate", json=SHORT, headers=sent, timeout=PATIENCE)

        asked = {
            "access_control_request_method": "POST",
            "access_control_request_headers": "authorization,content-type",
        }
        before = ask("OPTIONS", ours, **asked)  # a browser asks first, and without the key
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == ours
        assert "authorization" in before.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in before.headers
        refused = ask("OPTIONS", other, **asked)
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        answer = ask("POST", ours, authorization="Bearer key")
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == ours
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        assert "access-control-allow-origin" not in ask("POST", other, authorization="Bearer key").headers
        assert ask("POST", ours).status_code == 401  # an origin is no key


def test_a_certificate_that_is_not_there_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    process = ServerProcess(str(tiny_model), "--ssl-certfile", str(tmp_path / "none.pem"),
                            "--ssl-keyfile", str(tmp_path / "none.key"))  # fmt: skip
    assert process.wait_end() in (1, 2)
    assert "none.pem" in process.err[-1]
    assert not any("Traceback" in line for line in process.err)
    process.assert_no_orphans()
