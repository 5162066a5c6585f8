"""transformers' generate, as its users run it: static batches, and assisted generation one at a time.

generate() is synchronous, so it runs in one thread that takes what waits: up to BATCH_SIZE requests at once,
padded on the left to the longest. A batch runs until its last request is done, and only then is the next one
begun; that is static batching, and its waiting is in the latencies. Speculation (a draft model, or prompt
lookup) is refused by transformers for more than one request, so those run alone.

Tokens are stamped by a streamer, which generate() calls with each step's tokens once they are on the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from octavo.bench.spec import RunSpec
from octavo.bench.target import Answer, TargetError, TargetRequest
from octavo.bench.targets.octavo_engine import request_seed
from octavo.bench.targets.transformers_rows import Row, Stopping, Streamer, length, listen, padded

OPTIONS = ("dtype", "device", "trust_remote_code", "tokenizer", "chat_template", "max_model_len")
GATHER_SECONDS = 0.01  # requests that come together are one batch; part of their latency
_DTYPES = {"half": "float16"}


class TransformersTarget:
    """One model, and a drafter where the method has one."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._model: Any = None
        self._drafter: Any = None
        self._tokenizer: Any = None
        self._eos: frozenset[int] = frozenset()
        self._rows: queue.Queue[Row | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._counts = {"steps": 0.0, "prompt_rows": 0.0, "decode_rows": 0.0}
        self._in_prompt = False
        self._warnings: list[str] = []
        self._description: dict[str, Any] = {}
        self._devices: list[int] = []

    # ------------------------------------------------------------------ loading

    async def open(self) -> None:
        """Load the model or models."""
        await asyncio.to_thread(self._load)
        self._thread = threading.Thread(target=self._serve, name="transformers-engine", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        from octavo import hub, platform

        platform.prepare_environment()
        import transformers

        from octavo.bench.targets.placement import load_model
        from octavo.engine.tokenizer import Tokenizer
        from octavo.models.config import ModelConfig

        spec, options = self._spec, self._spec.engine_options
        path = hub.resolve(spec.serving_model)
        device = platform.detect(options.get("device") or "auto").device
        dtype = options.get("dtype") or "auto"
        dtype = _DTYPES.get(dtype, dtype)
        remote = bool(options.get("trust_remote_code"))
        quiet: Any = transformers.utils.logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        self._model = load_model(path, dtype, device, spec.placement, "target", trust_remote_code=remote)
        self._eos = (
            frozenset()
            if spec.sampling.ignore_eos
            else frozenset(ModelConfig.from_folder(path).eos_token_ids)
        )
        self._tokenizer = Tokenizer.from_folder(path, remote)
        self._configure(self._model)
        if spec.method == "speculative":
            assert spec.drafter is not None
            folder = hub.resolve(spec.drafter)
            self._drafter = load_model(
                folder, dtype, device, spec.placement, "drafter", trust_remote_code=remote
            )
            self._configure(self._drafter, drafts=spec.drafts)
        self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._devices = _cuda_devices(self._model, self._drafter)
        self._description = {
            "engine_version": transformers.__version__,
            "model_path": str(path),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._model.device),
            "attention": self._model.config._attn_implementation,
            "batching": f"static, up to {self.batch_size}",
        }

    def _configure(self, model: Any, drafts: int | str | None = None) -> None:
        """Replace the model's own generation settings: sampling is the run's, for every engine."""
        import transformers

        sampling = self._spec.sampling
        settings: dict[str, Any] = {"do_sample": sampling.temperature > 0, "use_cache": True}
        if sampling.temperature > 0:
            settings |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": max(sampling.top_k, 0),
            }
        settings["eos_token_id"] = sorted(self._eos) or None
        settings["pad_token_id"] = min(self._eos, default=0)
        if drafts is not None:
            settings |= {
                "num_assistant_tokens": drafts,
                "num_assistant_tokens_schedule": "constant",
                "assistant_confidence_threshold": 0.0,
            }
        make: Any = transformers.GenerationConfig
        model.generation_config = make(**settings)
        model.eval()

    @property
    def batch_size(self) -> int:
        """The most requests of one generate()."""
        return self._spec.static_batch_size

    # ------------------------------------------------------------------ callers

    async def generate(self, request: TargetRequest, answer: Answer) -> None:
        """Queue one request and wait for its batch."""
        if not request.prompt_token_ids:
            raise TargetError("prompt", "this engine needs at least one token id")
        loop = asyncio.get_running_loop()
        row = Row(request, answer, loop.create_future(), loop, self._eos)
        self._rows.put(row)
        try:
            await row.done
        except asyncio.CancelledError:
            row.cancelled = True
            raise
        answer.token_ids = row.ids
        answer.finish_reason = row.finish_reason
        if self._tokenizer is not None:
            answer.text = self._tokenizer.decode(row.ids)

    async def counters(self) -> dict[str, float]:
        """Forward passes of the target model, and their rows, padding included."""
        return {**self._counts, "waiting": float(self._rows.qsize())}

    def description(self) -> dict[str, Any]:
        """Version, device and how it batches."""
        return self._description

    def warnings(self) -> Sequence[str]:
        """What was noticed."""
        return self._warnings

    def gpu_ids(self) -> list[int]:
        """Where the models' parameters lie."""
        return self._devices

    def pids(self) -> list[int]:
        """None beside this process."""
        return []

    async def close(self) -> None:
        """End the thread (after the batch it is in) and free the models."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._rows.put(None)
            await asyncio.to_thread(thread.join)
        self._model = self._drafter = None
        if self._devices:
            import gc

            import torch

            gc.collect()
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        held: Row | None = None
        while True:
            first = held if held is not None else self._rows.get()
            if first is None:
                return
            batch, held, ends = self._gather(first)
            rows = [row for row in batch if not row.cancelled]
            if rows:
                self._run(rows)
            if ends:
                return

    def _gather(self, first: Row) -> tuple[list[Row], Row | None, bool]:
        """(batch, a request that did not fit in, whether the target was closed)."""
        batch, limit = [first], self._spec.batch.max_length
        if self.batch_size == 1 or length(first) > limit:
            return batch, None, False
        if self._rows.qsize() < self.batch_size - 1:
            time.sleep(GATHER_SECONDS)
        while len(batch) < self.batch_size:
            try:
                row = self._rows.get_nowait()
            except queue.Empty:
                break
            if row is None:
                return batch, None, True
            if length(row) > limit:
                return batch, row, False
            batch.append(row)
        return batch, None, False

    def _run(self, rows: list[Row]) -> None:
        """One generate(); what it raises is the failure of its requests."""
        error: Exception | None = None
        try:
            self._generate(rows)
        except Exception as raised:
            error = TargetError(type(raised).__name__, str(raised))
        for row in rows:
            failed = error
            if failed is None and row.finish_reason is None and not row.cancelled:
                failed = TargetError("engine", "generate() ended before the request was done")
            row.tell(failed)

    def _generate(self, rows: list[Row]) -> None:
        import torch

        began = time.monotonic()
        for row in rows:
            row.answer.first_step_time = began
        ids, mask = padded([list(row.request.prompt_token_ids or ()) for row in rows], self._model.device)
        stamps, over = Streamer(rows), Stopping(rows, ids.shape[1])
        arguments: dict[str, Any] = {
            "attention_mask": mask,
            "max_new_tokens": max(row.request.max_tokens for row in rows),
            "streamer": stamps,
            "stopping_criteria": [over],
        }
        if self._drafter is not None:
            arguments["assistant_model"] = self._drafter
        elif self._spec.method == "prompt_lookup":
            arguments["prompt_lookup_num_tokens"] = self._spec.drafts
        sampling = self._spec.sampling
        torch.manual_seed(request_seed(sampling.seed, rows[0].request.index))
        self._in_prompt = True
        with torch.inference_mode(), self._acceptance(rows[0].answer):
            self._model.generate(ids, **arguments)

    @contextlib.contextmanager
    def _acceptance(self, answer: Answer) -> Iterator[None]:
        """Listen to the candidate generator, which alone knows what was drafted and what held."""
        if not self._spec.speculates:
            yield
            return
        make = getattr(self._model, "_get_candidate_generator", None)
        if make is None:  # a private name: another version may not have it
            self._warn("this version of transformers does not tell its acceptance: it is null")
            yield
            return

        def wrapped(*positional: Any, **named: Any) -> Any:
            return listen(make(*positional, **named), answer)

        self._model._get_candidate_generator = wrapped
        try:
            yield
        finally:
            del self._model._get_candidate_generator

    def _count(self, _: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", positional[0] if positional else None)
        if ids is None:
            return
        self._counts["steps"] += 1
        self._counts["prompt_rows" if self._in_prompt else "decode_rows"] += ids.numel()
        self._in_prompt = False

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)


def _cuda_devices(*models: Any) -> list[int]:
    found = {
        parameter.device.index or 0
        for model in models
        if model is not None
        for parameter in model.parameters()
        if parameter.device.type == "cuda"
    }
    return sorted(found)
