"""The server's view of an engine, wherever it runs.

Routes know this protocol and nothing behind it. `ProcessEngineClient` is what `octavo serve` uses:
the engine is a child process, so the front end's Python never waits for a step of the model and the
step never waits for the front end. `InProcessEngineClient` puts the same face on an `AsyncLLM`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from octavo.engine.engine_stats import EngineStats
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

# loading: not ready yet. ready: serves. draining: finishes open requests and takes no new ones.
# dead: every request gets an EngineDeadError.
ClientState = Literal["loading", "ready", "draining", "dead"]
StreamKind = Literal["delta", "final"]


@dataclass(frozen=True)
class EngineClientInfo:
    """What the front end must know of the engine and its model; plain data."""

    model: str  # as the user named it
    served_model_names: tuple[str, ...]  # names that requests may use; the first one is reported
    model_path: str
    tokenizer_path: str | None  # None: the engine works on token ids only
    chat_template: str | None  # the engine's option, as given; None is the model's own
    trust_remote_code: bool  # of the tokenizer's folder
    max_model_len: int
    vocab_size: int  # of the logits; prompts may hold ids below it
    eos_token_ids: tuple[int, ...]
    dtype: str
    max_num_seqs: int
    block_size: int
    num_blocks: int
    speculative_method: str | None  # None: no speculation, and `prediction` is refused
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)  # for SamplingParams.with_defaults
    notes: tuple[str, ...] = ()  # slow paths taken, and why


@dataclass(frozen=True)
class LoadProgress:
    """How far loading has come."""

    stage: str  # in plain words, such as "reading weights"
    fraction: float | None = None  # 0 to 1 of the whole, where it can be told


class EngineClient(Protocol):
    """One engine, for one event loop. Everything but `generate` and `stats` returns at once."""

    @property
    def info(self) -> EngineClientInfo:
        """Facts about the loaded engine. Raises EngineDeadError before it is ready."""
        ...

    @property
    def state(self) -> ClientState:
        """Loading, ready, draining or dead."""
        ...

    @property
    def progress(self) -> LoadProgress:
        """What loading is at; the last stage once it is ready."""
        ...

    @property
    def is_alive(self) -> bool:
        """False once the engine has ended, whatever the reason."""
        ...

    @property
    def num_open(self) -> int:
        """Requests that were taken in and have not ended."""
        ...

    async def wait_ready(self) -> EngineClientInfo:
        """Wait until the model is loaded. Raises the error that ended the loading (a ConfigError,
        ModelError or InsufficientMemoryError as an engine in this process would raise it)."""
        ...

    async def wait_found(self) -> str | None:
        """Wait until it is known where the tokenizer lies (its folder; None: there is none), which is long
        before the engine is ready. Raises as wait_ready does."""
        ...

    async def wait_dead(self) -> BaseException | None:
        """Wait until the engine has ended; None if it was asked to, otherwise why."""
        ...

    def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        arrival_time: float,
        kind: StreamKind = "delta",
        continue_prompt: bool = True,
        prompt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as they come; the last has `finished` True, and metrics.

        kind: "delta": each output holds what is new since the one before (text, token ids, logprobs);
            when the reader is behind, one output carries several steps. "final": one output, at the end;
            cheaper where nobody streams, and the only kind that allows best_of.
        arrival_time: time.monotonic() when the request came in.
        continue_prompt: the text goes on from the prompt's, leading space included (completions); False
            for a chat answer, which stands alone.
        prompt: text of the prompt, only to be found again in the outputs.

        request_id is for logs and outputs; two requests may have the same one. Closing the iterator, or
        cancelling the task that waits in it, aborts the request in the engine within two steps.

        Raises, at the first output at the earliest: RequestError (the request cannot be served: 400),
        QueueFullError (429, with `retry_after`), RequestTimeoutError (504), ServerDrainingError (503),
        EngineDeadError (the engine is gone, for every open request: 500).
        """
        ...

    async def stats(self, *, check_integrity: bool = False) -> EngineStats:
        """What the engine holds and has done, taken between two steps.

        check_integrity: also assert that every block is accounted for; slow with many blocks, for tests.
        Raises EngineDeadError.
        """
        ...

    def drain(self) -> None:
        """Take no new requests; open ones go on."""
        ...

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        """Drain for up to `drain_seconds`, answer what is still open with an EngineDeadError, and end
        the engine. May be called twice."""
        ...
