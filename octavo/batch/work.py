"""What every offline job is made of: items of work, who does them, and the results as they finish.

A job is an iterator of `WorkItem`s, which may be endless as far as memory is concerned: `run_items`
keeps so many of them in flight that the engine is never short of requests, and no more. `Workers` is
the seam behind which an engine in this process, replicas in processes of their own, another library,
or a fake does the work. Results come in the order in which they finish.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from octavo.config import EngineArgs
from octavo.errors import EngineDeadError, OctavoError, RequestError
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

# Options of the engine that change what it answers.
_SHAPING = (
    "model", "tokenizer", "dtype", "max_model_len", "device", "attention_backend", "deterministic",
    "load_format", "skip_tokenizer_init", "chat_template", "trust_remote_code", "speculative", "quantization",
    "enable_lora", "lora_configs",
)  # fmt: skip

Messages = list[dict[str, Any]]
RETRY_SECONDS = 0.5  # before the first retry; doubled for each that follows
MAX_RETRY_SECONDS = 30.0
ITEMS_AT_ONCE = 16  # taken before the requests among them get a turn


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request of a job.

    key: names it within the job; the same in every run of the job.
    prompt: a text, token ids, or the messages of a conversation (which go through the chat template).
    group: items of one group begin alike, so they are best done by the same replica, one after another.
    tag: whatever the job wants to find again in the result.
    """

    key: str
    prompt: str | list[int] | Messages
    params: SamplingParams
    group: str | None = None
    add_special_tokens: bool = True  # to a text; a conversation's template writes its own
    tag: Any = None


@dataclass(slots=True)
class Result:
    """How an item ended. Exactly one of `output` and `error` is None."""

    item: WorkItem
    output: RequestOutput | None
    error: OctavoError | None
    seconds: float  # from its first submission
    num_attempts: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens that were generated."""
        if self.output is None:
            return 0
        return sum(len(answer.token_ids) for answer in self.output.outputs)


@dataclass(frozen=True)
class WorkersInfo:
    """What a job must know of those who work for it; plain data."""

    model: str  # as the user named it
    model_path: str
    tokenizer_path: str | None  # None: token ids only
    chat_template: str | None  # the option, as given; None is the model's own
    trust_remote_code: bool
    max_model_len: int
    vocab_size: int
    max_num_seqs: int  # sequences that run at the same time, over all replicas
    num_replicas: int
    dtype: str
    speculative_method: str | None = None
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    block_size: int = 16
    num_blocks: int = 0
    notes: tuple[str, ...] = ()


class Workers(Protocol):
    """Whoever turns items into outputs. Made, used and closed in one event loop."""

    @property
    def info(self) -> WorkersInfo:
        """Facts about the model and its engine."""
        ...

    async def run(self, item: WorkItem) -> RequestOutput:
        """The finished output of one item; many may run at once. Cancelling it aborts the request.

        Raises RequestError for an item that cannot be served, EngineDeadError if nobody is left to work,
        another OctavoError for a failure that a second attempt may not have.
        """
        ...

    async def close(self) -> None:
        """Free the model; open items get an EngineDeadError. May be called twice."""
        ...


class AnswerFailedError(OctavoError):
    """The engine began with an item and could not finish it; another attempt may succeed."""


def window_of(info: WorkersInfo) -> int:
    """Items to keep in flight: as many as can run, and some that wait for a place that becomes free."""
    return info.max_num_seqs + max(8, info.max_num_seqs // 4)


def shaping_options(args: EngineArgs) -> dict[str, Any]:
    """The engine's options that results depend on, as plain data: what an offline job is known by.

    What concerns only speed and memory is left out: a job may go on with less of either.
    """
    found = {name: getattr(args, name) for name in _SHAPING}
    if found["chat_template"] is not None and os.path.isfile(found["chat_template"]):
        found["chat_template"] = Path(found["chat_template"]).read_text(encoding="utf-8", errors="replace")
    return found


def seed_of(*parts: str | int) -> int:
    """A seed that depends on `parts` alone, on every machine and in every version.

    53 bits, so that a reader of JSON that knows only floating-point numbers gets it whole.
    """
    text = "\x00".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 11


async def run_items(
    workers: Workers,
    items: Iterable[WorkItem],
    *,
    window: int | None = None,
    max_retries: int = 2,
    stop: asyncio.Event | None = None,
    stop_seconds: float = 5.0,
) -> AsyncGenerator[Result, None]:
    """Do all items, at most `window` at a time, and yield each result when it is there.

    An item is taken from `items` only when a place is free. A failure that is not the item's own fault is
    tried again `max_retries` times, later each time. After `stop` is set no item is taken any more; what
    runs may go on for `stop_seconds`, and what is then unfinished is aborted and yields nothing.
    Raises EngineDeadError once nobody is left to work; closing the generator aborts what is open.
    """

    async def work(item: WorkItem) -> Result:
        return await _attempt(workers, item, max_retries)

    async for result in run_window(work, items, window or window_of(workers.info), stop, stop_seconds):
        yield result


async def run_window(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    window: int,
    stop: asyncio.Event | None = None,
    stop_seconds: float = 5.0,
) -> AsyncGenerator[Any, None]:
    """`await work(item)` for every item, at most `window` at a time, yielded as they finish.

    See `run_items` for `stop`. An exception of `work` ends everything.
    """
    source = iter(items)
    open_tasks: set[asyncio.Task[Any]] = set()
    ended: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()  # None: told to stop
    stop = stop or asyncio.Event()
    stopping = asyncio.ensure_future(stop.wait())
    stopping.add_done_callback(lambda _: ended.put_nowait(None))
    deadline = math.inf
    is_exhausted = False
    try:
        while True:
            while not (is_exhausted or stop.is_set()) and len(open_tasks) < window:
                try:
                    item = next(source)
                except StopIteration:
                    is_exhausted = True
                    break
                task = asyncio.ensure_future(work(item))
                open_tasks.add(task)
                task.add_done_callback(ended.put_nowait)
                if len(open_tasks) % ITEMS_AT_ONCE == 0:
                    await asyncio.sleep(0)  # reading a file must not keep the requests from starting
            if not open_tasks:
                return
            try:
                waited = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
                done = (
                    await asyncio.wait_for(ended.get(), waited) if waited is not None else await ended.get()
                )
            except asyncio.TimeoutError:  # the time after a stop is over
                return
            if done is None:
                deadline = time.monotonic() + stop_seconds
                continue
            open_tasks.discard(done)
            yield done.result()
    finally:
        stopping.cancel()
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(stopping, *open_tasks, return_exceptions=True)


async def _attempt(workers: Workers, item: WorkItem, max_retries: int) -> Result:
    began = time.monotonic()
    pause = RETRY_SECONDS
    attempt = 1
    while True:
        try:
            output = await workers.run(item)
            error = output.error
            if error is None:
                return Result(item, output, None, time.monotonic() - began, attempt)
            raise AnswerFailedError(error)
        except EngineDeadError:
            raise
        except RequestError as error_of_item:
            return Result(item, None, error_of_item, time.monotonic() - began, attempt)
        except OctavoError as failure:
            if attempt > max_retries:
                return Result(item, None, failure, time.monotonic() - began, attempt)
        await asyncio.sleep(pause)
        pause = min(MAX_RETRY_SECONDS, pause * 2)
        attempt += 1
