"""The same job through transformers' generate(): one request at a time, or static batches.

It is what a job is compared with, so it is done as well as that library allows: the same prompts as
token ids, the library's own filters for temperature, top-k and top-p, its fastest attention here, padding
on the left, and the end of a batch when its last row has ended. One thing is our own, the draw: each
row has a generator of its own, started from the sample's seed, so that a sample can be named by its seed
here too.

Which samples share a batch is decided by the job's order alone. A batch of which some samples are
missing is done again as a whole, so that an interrupted job ends as an undisturbed one does: the rounding
of a row depends on how far it is padded.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from octavo import platform
from octavo.batch.persona.job import Sample
from octavo.batch.work import run_window
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import ConfigError, EngineDeadError, OctavoError
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.platform import process
from octavo.sampling_params import SamplingParams


@dataclass(frozen=True)
class BaselineSettings:
    """How the model is loaded, in each process."""

    model_path: str
    dtype: str  # torch's name
    device: str  # "cpu" or "cuda"
    threads: int  # of one process, on a CPU
    eos_token_ids: tuple[int, ...]
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One sample with its prompt."""

    sample: Sample
    token_ids: list[int]
    num_dropped: int


@dataclass(slots=True)
class BatchDone:
    """A batch that has ended; `error` is None or says why none of it could be made."""

    rows: list[Row]
    outputs: list[RequestOutput]
    error: str | None


class TransformersModel:
    """A causal model of transformers."""

    def __init__(self, settings: BaselineSettings, device_index: int = 0) -> None:
        try:
            import transformers
        except ImportError:
            raise ConfigError(
                "--engine transformers needs transformers: pip install 'octavo[transformers]'"
            ) from None
        import torch

        if settings.device == "cpu":
            torch.set_num_threads(settings.threads)
        self._torch: Any = torch
        self._transformers: Any = transformers
        self._device = f"cuda:{device_index}" if settings.device == "cuda" else "cpu"
        self._eos = list(settings.eos_token_ids)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            settings.model_path,
            dtype=getattr(torch, settings.dtype),
            trust_remote_code=settings.trust_remote_code,
        )
        self._model = model.to(self._device).eval()
        # Nothing of the checkpoint's own generation config: the parameters are the job's.
        self._model.generation_config = self._transformers.GenerationConfig()

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], params: SamplingParams
    ) -> list[tuple[list[int], str]]:
        """(new token ids, finish_reason) of each prompt; an end token is not among the ids."""
        torch = self._torch
        width = max(map(len, prompts))
        padding = self._eos[0] if self._eos else 0
        ids = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        assert params.max_tokens is not None
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=torch.tensor(ids, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                generation_config=self._transformers.GenerationConfig(
                    do_sample=False,  # the draw is the last of the processors
                    max_new_tokens=params.max_tokens,
                    eos_token_id=None if params.ignore_eos or not self._eos else self._eos,
                    pad_token_id=padding,
                ),
                logits_processor=self._processors(seeds, params),
            )
        return [self._ended(row, params) for row in output[:, width:].tolist()]

    def _ended(self, token_ids: list[int], params: SamplingParams) -> tuple[list[int], str]:
        if not params.ignore_eos:
            for at, token in enumerate(token_ids):
                if token in self._eos:
                    return token_ids[:at], "stop"
        return token_ids, "length"

    def _processors(self, seeds: Sequence[int], params: SamplingParams) -> Any:
        """The library's filters in its own order, and the draw behind them."""
        library = self._transformers
        processors = library.LogitsProcessorList()
        if params.is_greedy:
            return processors
        if params.temperature != 1.0:
            processors.append(library.TemperatureLogitsWarper(params.temperature))
        if params.top_k > 0:
            processors.append(library.TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            processors.append(library.TopPLogitsWarper(params.top_p))
        processors.append(_DrawByRow(self._torch, seeds, params.top_k))
        return processors


class _DrawByRow:
    """Draws each row with its own generator (Gumbel's maximum), and leaves only the token drawn."""

    def __init__(self, torch: Any, seeds: Sequence[int], top_k: int) -> None:
        self._torch = torch
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._top_k = top_k

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        torch = self._torch
        scores = scores.float()
        count = self._top_k if self._top_k > 0 else scores.shape[-1]
        kept, ids = scores.topk(min(count, scores.shape[-1]), dim=-1)
        noise = torch.stack([torch.empty(kept.shape[-1]).exponential_(generator=g) for g in self._generators])
        # No noise is 0 or less, and exp(-inf) is not drawn.
        drawn = (kept - noise.to(kept.device).log()).argmax(dim=-1, keepdim=True)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(-1, ids.gather(-1, drawn), 0.0)


# The model of a child process, which is started for nothing else.
_model_here: TransformersModel | None = None


def _load_here(settings: BaselineSettings, numbers: Any, all_loaded: Any, parent: int) -> None:
    """Begin a child process. It is ready when all of them are, so that the clock starts for all alike."""
    global _model_here
    process.die_with_parent(parent)
    platform.prepare_environment()
    with numbers.get_lock():
        number = numbers.value
        numbers.value += 1
    _model_here = TransformersModel(settings, number)
    all_loaded.wait()


def _generate_here(
    prompts: list[list[int]], seeds: list[int], params: SamplingParams
) -> list[tuple[list[int], str]]:
    assert _model_here is not None
    return _model_here.generate(prompts, seeds, params)


def _is_loaded() -> bool:
    return _model_here is not None


class Baseline:
    """One model in this process, or one in each of several processes. Make it with `open`."""

    def __init__(
        self,
        pool: concurrent.futures.Executor,
        model: TransformersModel | None,
        tokenizer: Tokenizer,
        num_replicas: int,
    ) -> None:
        self._pool = pool
        self._model = model
        self._tokenizer = tokenizer
        self._num_replicas = num_replicas

    @classmethod
    def open(cls, settings: BaselineSettings, tokenizer: Tokenizer, num_replicas: int = 1) -> Baseline:
        """Load. Raises ConfigError without transformers, OctavoError if the model cannot be loaded."""
        if num_replicas == 1:
            try:
                model = TransformersModel(settings)
            except (OSError, ValueError, RuntimeError) as error:
                raise OctavoError(f"transformers cannot load {settings.model_path}: {error}") from error
            return cls(concurrent.futures.ThreadPoolExecutor(1), model, tokenizer, 1)
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(
            num_replicas,
            context,
            initializer=_load_here,
            initargs=(settings, context.Value("i", 0), context.Barrier(num_replicas), os.getpid()),
        )
        try:
            # A call starts a process: as many as there shall be.
            for future in [pool.submit(_is_loaded) for _ in range(num_replicas)]:
                future.result()
        except concurrent.futures.BrokenExecutor as error:
            raise OctavoError(
                f"a process of transformers ended while it loaded {settings.model_path}; the log says why"
            ) from error
        return cls(pool, None, tokenizer, num_replicas)

    async def run(
        self,
        batches: Iterable[list[Row]],
        params: SamplingParams,
        stop: asyncio.Event | None = None,
        stop_seconds: float = 60.0,
    ) -> AsyncGenerator[BatchDone, None]:
        """Do all batches and yield each when it has ended. Raises EngineDeadError if a process ended."""

        async def work(rows: list[Row]) -> BatchDone:
            return await self._one(rows, params)

        async for done in run_window(work, batches, self._num_replicas, stop, stop_seconds):
            yield done

    async def _one(self, rows: list[Row], params: SamplingParams) -> BatchDone:
        loop = asyncio.get_running_loop()
        prompts = [row.token_ids for row in rows]
        seeds = [row.sample.seed for row in rows]
        call = _generate_here if self._model is None else self._model.generate
        try:
            found = await loop.run_in_executor(self._pool, call, prompts, seeds, params)
        except concurrent.futures.BrokenExecutor as error:
            raise EngineDeadError("a process of transformers ended; start the same command again") from error
        except (RuntimeError, ValueError, MemoryError) as error:  # out of memory, for one
            return BatchDone(rows, [], f"transformers failed: {error}")
        outputs = [self._output(row, *answer) for row, answer in zip(rows, found, strict=True)]
        return BatchDone(rows, outputs, None)

    def _output(self, row: Row, token_ids: list[int], finish_reason: Any) -> RequestOutput:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        answer = CompletionOutput(0, text, token_ids, finish_reason=finish_reason)
        return RequestOutput(row.sample.key, None, row.token_ids, outputs=[answer], finished=True)

    def close(self) -> None:
        """Free the model."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._model = None


def in_batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """`size` at a time, in their order."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
