"""The server's own options, checked once.

What the engine is made of is `EngineArgs`; everything that concerns the port, its guards and its log
is here. `octavo serve` has one flag, one environment variable and one key of the configuration file
for each field of both.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from octavo.config import parse_size
from octavo.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")
# The formats of octavo.server.answer.tool_formats, which is not imported here: options are checked early.
TOOL_PARSERS = ("auto", "mistral", "hermes", "llama3_json", "qwen", "llama3", "llama")
REASONING_PARSERS = ("auto", "think", "none")
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_METRIC_PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\Z")


def _option(default: Any, text: str, *, choices: tuple[str, ...] | None = None, secret: bool = False) -> Any:
    return dataclasses.field(
        default=default, repr=not secret, metadata={"help": text, "choices": choices, "secret": secret}
    )


@dataclass(frozen=True)
class ServeSettings:
    """Options of `octavo serve` beside the engine's. Raises ConfigError for a wrong value.

    Sizes are bytes (an int) once the object is made; "16MB" is understood. Times are seconds; 0 switches
    a limit off.
    """

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0 is every network of this machine")
    port: int = _option(8000, "port to listen on; 0 lets the system choose, and prints it")
    served_model_name: tuple[str, ...] = _option((), "name of the model in requests; may be repeated")
    api_key: tuple[str, ...] = _option(
        (), "key that clients must send; may be repeated. Better in a file", secret=True
    )
    api_key_file: str | None = _option(None, "file of such keys, one a line; # begins a comment")
    metrics_key: str | None = _option(
        None, 'key of /metrics alone; "none" opens it to everybody (default: any API key)', secret=True
    )
    # limits
    max_queue: int = _option(1024, "requests that may wait beyond those that run; more are answered 429")
    max_request_bytes: int | str = _option("16MB", "largest body of a request")
    max_header_bytes: int | str = _option("64KB", "largest head of a request: its line and its headers")
    max_prompts: int = _option(2048, "prompts of one completion request")
    max_n: int = _option(128, "largest n and best_of")
    max_logprobs: int = _option(20, "largest logprobs, top_logprobs and prompt_logprobs")
    max_stop: int = _option(64, "stop strings of one request")
    max_tools: int = _option(128, "tools of one request")
    max_schema_bytes: int | str = _option("256KB", "largest JSON schema, regex or grammar")
    max_schema_depth: int = _option(64, "deepest nesting of a JSON schema")
    grammar_timeout: float = _option(10.0, "longest time to compile a schema, regex or grammar")
    request_timeout: float = _option(0.0, "longest time of one request, queue included; 0: no limit")
    read_timeout: float = _option(60.0, "longest wait for the next piece of a request's head or body")
    keep_alive: float = _option(60.0, "how long an idle connection is kept open")
    engine_timeout: float = _option(600.0, "longest step: an engine that says nothing for this long is ended")
    drain_timeout: float = _option(30.0, "how long open requests may go on after SIGTERM")
    # shapes
    tool_parser: str = _option(
        "auto", "how the model writes tool calls; auto: found from its chat template", choices=TOOL_PARSERS
    )
    reasoning_parser: str = _option(
        "auto",
        "think: reasoning stands in <think> tags; auto: if the chat template or the vocabulary has them; "
        "none: leave the text as it is",
        choices=REASONING_PARSERS,
    )
    root_path: str = _option("", "path prefix that a proxy strips")
    # who may ask
    cors_origin: tuple[str, ...] = _option((), "web origin that may ask from a browser; may be repeated; *")
    ssl_certfile: str | None = _option(None, "certificate (PEM) for TLS")
    ssl_keyfile: str | None = _option(None, "its private key (PEM)")
    ssl_keyfile_password: str | None = _option(None, "password of the private key", secret=True)
    ssl_ca_certs: str | None = _option(None, "certificates (PEM) that clients must be signed by")
    # what it tells
    metrics_prefix: str = _option("octavo", "prefix of metric names; vllm fits dashboards made for vLLM")
    access_log: str = _option("-", "file for one JSON line a request; - is stdout, off is none")
    log_level: str = _option("info", "what goes to stderr", choices=LOG_LEVELS)
    in_process: bool = _option(False, "run the engine in the server's own process (for debugging)")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> ServeSettings:
        """Build from keyword arguments; an unknown name is a ConfigError that suggests the nearest."""
        names = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise ConfigError(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        return cls(**kwargs)

    def __post_init__(self) -> None:
        for f in fields(self):
            checked = _CHECKS[str(f.type)](f.name, getattr(self, f.name))
            choices = f.metadata["choices"]
            if choices and checked not in choices:
                raise ConfigError(f"{f.name}={checked!r} is not one of {', '.join(choices)}")
            object.__setattr__(self, f.name, checked)
        if self.port > 65535:
            raise ConfigError(f"port must be at most 65535, not {self.port}")
        for name in ("max_prompts", "max_n", "max_schema_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.host:
            raise ConfigError("host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every network")
        if _METRIC_PREFIX.match(self.metrics_prefix) is None:
            raise ConfigError(
                f"metrics_prefix={self.metrics_prefix!r} is not a name: letters, digits and _, no digit first"
            )
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path must begin with /, not {self.root_path!r}")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("TLS needs both ssl_certfile and ssl_keyfile")
        if self.ssl_certfile is None and (self.ssl_ca_certs or self.ssl_keyfile_password):
            raise ConfigError("ssl_ca_certs and ssl_keyfile_password need ssl_certfile and ssl_keyfile")
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
            given = getattr(self, name)
            if given is not None and not Path(given).is_file():
                raise ConfigError(f"{name}: no such file: {given}")
        for origin in self.cors_origin:
            if origin != "*" and not re.match(r"https?://[^/\s]+\Z", origin):
                raise ConfigError(f"cors_origin must be like https://example.org, or *, not {origin!r}")
        for key in self.api_key:
            check_key(key, "api_key")
        if self.metrics_key is not None:
            check_key(self.metrics_key, "metrics_key")

    @property
    def is_local(self) -> bool:
        """True if only this machine can reach the port."""
        return self.host in _LOCAL_HOSTS

    @property
    def uses_tls(self) -> bool:
        """True if the port speaks HTTPS."""
        return self.ssl_certfile is not None


def check_key(key: str, name: str) -> None:
    """Raise ConfigError for a key that no client could send in a header; the key is not shown."""
    if not key or key != key.strip() or not all("!" <= c <= "~" for c in key):
        raise ConfigError(
            f"{name}: a key is one or more visible ASCII characters, without spaces (one given is not)"
        )


def secret_names() -> frozenset[str]:
    """Fields whose values are never shown."""
    return frozenset(f.name for f in fields(ServeSettings) if f.metadata["secret"])


# ---------------------------------------------------------------------- one check for each annotation


def _wrong(name: str, kind: str, value: Any) -> ConfigError:
    shown = "(hidden)" if name in secret_names() else repr(value)
    return ConfigError(f"{name} must be {kind}, not {shown} ({type(value).__name__})")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a text", value)
    return value


def _text_or_none(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(name, "a whole number of at least 0", value)
    return value


def _seconds(name: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise _wrong(name, "a number of seconds of at least 0", value)
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    members = (value,) if isinstance(value, str) else value
    if not isinstance(members, (list, tuple)):
        raise _wrong(name, "a text or a list of texts", value)
    for member in members:
        if not isinstance(member, str) or not member:
            raise _wrong(name, "texts that are not empty", value)
    return tuple(members)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "str": _text,
    "str | None": _text_or_none,
    "int": _whole,
    "int | str": lambda name, value: parse_size(value, name),
    "float": _seconds,
    "bool": _flag,
    "tuple[str, ...]": _texts,
}
