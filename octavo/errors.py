"""Every error Octavo raises on purpose, as one tree.

    OctavoError                     anything raised by Octavo itself
    ├── ConfigError                 an option is unknown, malformed or contradicts another one
    │   └── NotInThisVersionError   a known feature that this version does not have
    ├── RequestError                one request cannot be served; other requests are not touched
    ├── ModelError                  the model cannot be used
    │   ├── ModelNotFoundError      no such folder, file, alias or hub id
    │   ├── UnsupportedModelError   the architecture is not supported
    │   └── CheckpointError         the files are damaged, incomplete or do not fit the config
    ├── InsufficientMemoryError     the memory plan does not fit; names the knobs that would help
    ├── BusyError                   a server cannot take a request now; later it may
    │   ├── QueueFullError          its queue is full; says when to try again
    │   └── ServerDrainingError     it is about to end and takes no new requests
    ├── RequestTimeoutError         a request took longer than the server allows
    └── EngineDeadError             the engine stopped; carries the first cause

A message is one readable block: what is wrong, and what to change. The command line prints it
without a traceback; HTTP turns it into a status and an OpenAI error object.
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base of every error raised on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(OctavoError, ValueError):
    """An option is unknown, malformed, or contradicts another one."""

    exit_code = 2


class NotInThisVersionError(ConfigError):
    """A feature that is known and planned, and refused before anything is loaded.

    `instead` says what to do, where leaving the feature out is not the answer.
    """

    def __init__(self, feature: str, instead: str = "") -> None:
        super().__init__(f"{feature} is not in this version of Octavo" + (f"; {instead}" if instead else ""))
        self.feature = feature


class RequestError(OctavoError, ValueError):
    """One request cannot be served. `param` names the offending field, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelError(OctavoError):
    """The model cannot be used."""


class ModelNotFoundError(ModelError):
    """No such folder, file, alias or hub id."""


class UnsupportedModelError(ModelError):
    """The architecture, or a feature of it, is not supported."""


class CheckpointError(ModelError):
    """The checkpoint's files are damaged, incomplete, or do not fit its config."""


class InsufficientMemoryError(OctavoError):
    """The memory plan does not fit. The message names the knobs and values that would."""


class BusyError(OctavoError):
    """A server cannot take a request now. `retry_after` is a guess, in whole seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(BusyError):
    """As many requests wait as the server lets wait (HTTP 429)."""


class ServerDrainingError(BusyError):
    """The server is about to end: open requests are finished, new ones refused (HTTP 503)."""


class RequestTimeoutError(OctavoError):
    """A request took longer than the server allows, and was aborted (HTTP 504)."""


class EngineDeadError(OctavoError):
    """The engine stopped working; every open request gets this error with the first cause."""
