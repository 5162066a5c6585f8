"""One batch file from beginning to end: what is left to do, the work, the results, the summary."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from octavo import __version__
from octavo.batch.journal import Journal
from octavo.batch.openai.lines import BadLine, RequestLine, read_facts, read_lines
from octavo.batch.progress import Progress
from octavo.batch.run import unless_stopped
from octavo.batch.work import Workers, run_window, window_of
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import ConfigError, OctavoError

_NEEDED = ("fastapi", "pydantic")


class TokenizingWorkers(Workers, Protocol):
    """Workers that know their model's tokenizer."""

    tokenizer: Tokenizer | None


OpenWorkers = Callable[[], Awaitable[TokenizingWorkers]]


@dataclass(frozen=True)
class OpenAIJob:
    """What is to be done, and how."""

    input_file: Path
    output_file: Path
    names: tuple[str, ...]  # of the model in requests; answers carry the first one
    shaping: dict[str, Any]  # the model, and options of the engine that results depend on
    seed: int = 0
    max_retries: int = 2
    overwrite: bool = False
    retry_failed: bool = False
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    quiet: bool = False


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    total: int  # lines of the input
    num_done: int  # of them have a record by now
    num_failed: int  # records that hold no answer, of all runs
    run: dict[str, Any]  # what this run did
    was_stopped: bool

    @property
    def all_succeeded(self) -> bool:
        """True if every line has its answer."""
        return self.num_done == self.total and self.num_failed == 0


async def run_openai_job(
    job: OpenAIJob, open_workers: OpenWorkers, stop: asyncio.Event, stream: TextIO | None = None
) -> Summary:
    """Do what is left of a job. The model is loaded only if anything is.

    Raises ConfigError before anything is loaded for files that cannot be used, whatever loading raises,
    and EngineDeadError when the engine ends in the middle; what is finished by then is kept.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OctavoError(f"octavo batch openai needs {', '.join(missing)}: pip install 'octavo[server]'")
    from octavo.batch.openai.answers import is_engine_failure, is_failed, key_of

    if _is_same_file(job.input_file, job.output_file):
        raise ConfigError(f"input and output are the same file, {job.input_file}; name another output")
    facts = read_facts(job.input_file)
    described = {
        "kind": "openai",
        "input_sha256": facts.sha256,
        "names": list(job.names),
        "seed": job.seed,
        "tool_parser": job.tool_parser,
        "reasoning_parser": job.reasoning_parser,
        **job.shaping,
    }
    journal = Journal.open(
        job.output_file,
        described,
        key_of=key_of,
        overwrite=job.overwrite,
        drop=is_engine_failure if job.retry_failed else None,
    )
    with journal:
        num_before = journal.num_done
        num_failed = sum(map(is_failed, journal.records()))
        progress = Progress(facts.num_lines, num_before, stream=stream, quiet=True)
        num_cached = num_retries = 0
        load_seconds = 0.0
        try:
            if num_before < facts.num_lines and not stop.is_set():
                began = time.monotonic()
                workers = await unless_stopped(open_workers(), stop)
                load_seconds = time.monotonic() - began
                progress = Progress(facts.num_lines, num_before, stream=stream, quiet=job.quiet)
                if workers is not None:
                    try:
                        async for answer in _answers(job, workers, journal, stop):
                            journal.append(answer.record)
                            progress.note(answer.num_tokens, failed=answer.failed)
                            num_cached += answer.num_cached
                            num_retries += answer.num_attempts - 1
                    finally:
                        await workers.close()
        finally:
            run = progress.close()
            run |= {
                "version": __version__,
                "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "input_file": str(job.input_file.resolve()),
                "load_seconds": round(load_seconds, 3),
                "cached_prompt_tokens": num_cached,
                "retries": num_retries,
            }
            journal.note(run)
    return Summary(
        facts.num_lines, journal.num_done, num_failed + progress.num_failed, run, was_stopped=stop.is_set()
    )


async def _answers(job: OpenAIJob, workers: TokenizingWorkers, journal: Journal, stop: asyncio.Event) -> Any:
    from octavo.batch.openai.answers import Answerer
    from octavo.server.settings import ServeSettings

    settings = ServeSettings.from_kwargs(tool_parser=job.tool_parser, reasoning_parser=job.reasoning_parser)
    answerer = Answerer(
        workers, workers.tokenizer, job.names, seed=job.seed, max_retries=job.max_retries, settings=settings
    )
    todo: Iterator[RequestLine | BadLine] = (
        line for line in read_lines(job.input_file, job.names) if line.key not in journal
    )
    async for answer in run_window(answerer.answer, todo, window_of(workers.info), stop):
        yield answer


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
