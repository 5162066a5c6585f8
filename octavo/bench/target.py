"""What every engine looks like to the workbench.

A target answers requests one by one, as many at the same time as the load sends; how it batches them is its
own affair. It tells an `Answer` about every piece that arrives, at the moment it arrives, so all engines are
timed by the same lines of code.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from octavo.errors import OctavoError


class TargetError(OctavoError):
    """One request was not answered. `kind` groups failures in reports: refused, http_503, cut_off, …"""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class TargetRequest:
    """One request, the same for every engine.

    Engines that take ids get `prompt_token_ids`; a URL gets the messages, or the text, that these were made
    from. `prompt_token_ids` is None only for a URL whose tokenizer is not known.
    """

    index: int
    prompt_id: str
    max_tokens: int
    prompt_token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    text: str | None = None
    cache_salt: str | None = None  # prefix caches are shared within one salt, where the engine knows salts


@dataclass
class Answer:
    """What came back for one request; filled while it comes, so that a failure keeps what was there.

    `arrivals` are (moment on the monotonic clock, tokens). Fields that a target cannot know stay None.
    """

    arrivals: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int | None = None
    generated_tokens: int | None = None  # None: the sum of the arrivals
    tokens_estimated: bool = False
    token_ids: list[int] | None = None
    text: str | None = None
    finish_reason: str | None = None
    first_step_time: float | None = None  # when the engine first worked on it (monotonic clock)
    drafted: int | None = None
    accepted: int | None = None
    num_verifications: int | None = None
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    reached_by_position: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    num_preemptions: int | None = None

    def arrived(self, tokens: int, moment: float | None = None) -> None:
        """A piece of `tokens` tokens came, now or at `moment`."""
        self.arrivals.append((time.monotonic() if moment is None else moment, tokens))

    def verified(self, num_drafted: int, num_accepted: int) -> None:
        """One verification: of `num_drafted` drafts the first `num_accepted` held."""
        self.drafted = (self.drafted or 0) + num_drafted
        self.accepted = (self.accepted or 0) + num_accepted
        self.num_verifications = (self.num_verifications or 0) + 1
        for counts in (self.drafted_by_position, self.accepted_by_position, self.reached_by_position):
            counts.extend([0] * (num_drafted - len(counts)))
        for position in range(num_drafted):
            self.drafted_by_position[position] += 1
            self.accepted_by_position[position] += position < num_accepted
            self.reached_by_position[position] += position <= num_accepted


class Target(Protocol):
    """An engine, opened once, asked many times, closed once.

    `open` raises OctavoError with what to change. `generate` raises TargetError for a request that fails;
    cancelling it must stop the engine's work on the request.
    """

    async def open(self) -> None:
        """Load the model, or reach the server."""
        ...

    async def generate(self, request: TargetRequest, answer: Answer) -> None:
        """Answer one request, telling `answer` of each piece when it is there."""
        ...

    async def counters(self) -> dict[str, float]:
        """What the engine has counted since it began, under the names of COUNTERS and GAUGES; those it
        does not know are left out."""
        ...

    def description(self) -> dict[str, Any]:
        """Versions and settings found out while opening, for the result's effective_config."""
        ...

    def warnings(self) -> Sequence[str]:
        """What the reader of the result must know."""
        ...

    def gpu_ids(self) -> list[int]:
        """The GPUs it really uses, as CUDA counts them; empty on a CPU."""
        ...

    def pids(self) -> list[int]:
        """Processes of its own, for the monitor."""
        ...

    async def close(self) -> None:
        """Give back memory and processes. May be called after a failed `open`."""
        ...


# Names in Target.counters. COUNTERS only grow; GAUGES are momentary.
COUNTERS = (
    "steps",
    "prompt_rows",
    "decode_rows",
    "preemptions",
    "prefix_queries",
    "prefix_hits",
    "drafted",
    "accepted",
    "verifications",
)
GAUGES = ("kv_usage", "running", "waiting")
