"""What is noted of one HTTP request while it is served, for the access log and the metrics.

The access log puts a record in the context of each request; the engine client, deep below the route,
finds it there and adds what the engine did. Never prompts, answers or keys.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request. Times are seconds of the monotonic clock."""

    request_id: str
    method: str
    path: str
    start: float = field(default_factory=time.monotonic)
    status: int = 0  # 0: nothing was answered
    route: str = ""  # the path as the application knows it, with names for its variable parts
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_generations: int = 0  # prompts that were sent to the engine
    ttft: float | None = None  # from `start` to the first token of any of them
    finish_reasons: list[str] = field(default_factory=list)
    aborted: bool = False  # the client went away before the end
    error: str | None = None  # class of the error that ended it

    def note_first_token(self) -> None:
        """The first token of the first answer has come."""
        if self.ttft is None:
            self.ttft = time.monotonic() - self.start


CURRENT_RECORD: ContextVar[RequestRecord | None] = ContextVar("octavo_request_record", default=None)
