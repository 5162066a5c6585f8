"""Octavo in the workbench's own process, through the public `AsyncLLM`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from octavo.bench.spec import RunSpec
from octavo.bench.target import Answer, TargetError, TargetRequest
from octavo.errors import OctavoError
from octavo.sampling_params import SamplingParams


class OctavoTarget:
    """One AsyncLLM: its engine runs in a thread beside the load's event loop."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._llm: Any = None

    async def open(self) -> None:
        """Load the model."""
        from octavo import AsyncLLM

        # In a thread, so that the terminal and the monitor go on.
        self._llm = await asyncio.to_thread(AsyncLLM, **self._spec.octavo_kwargs())

    async def generate(self, request: TargetRequest, answer: Answer) -> None:
        """One request, by token ids."""
        sampling = self._spec.sampling
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=request_seed(sampling.seed, request.index),
            max_tokens=request.max_tokens,
            ignore_eos=sampling.ignore_eos,
            cache_salt=request.cache_salt,
        )
        if request.prompt_token_ids is None:
            raise TargetError("prompt", "this engine needs token ids")
        answer.token_ids, answer.text = [], ""
        outputs = self._llm.generate(
            {"prompt_token_ids": list(request.prompt_token_ids)}, params, kind="delta"
        )
        last = None
        try:
            async for output in outputs:
                last = output
                delta = output.outputs[0]
                if delta.token_ids:
                    answer.arrived(len(delta.token_ids))
                    answer.token_ids += delta.token_ids
                answer.text += delta.text
        except OctavoError as error:
            raise TargetError(type(error).__name__, str(error)) from error
        finally:
            await outputs.aclose()
        if last is not None:
            _note_end(last, answer)

    async def counters(self) -> dict[str, float]:
        """From the engine's statistics."""
        stats = await self._llm.stats()
        found: dict[str, float] = {
            "steps": stats.num_steps,
            "prompt_rows": stats.num_chunk_rows,
            "decode_rows": stats.num_verify_rows,
            "preemptions": stats.num_preemptions,
            "prefix_queries": stats.num_prefix_queries,
            "prefix_hits": stats.num_prefix_hits,
            "kv_usage": stats.kv_usage,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
        }
        if stats.speculation is not None:
            found["drafted"] = stats.speculation.drafted
            found["accepted"] = stats.speculation.accepted
            found["verifications"] = stats.speculation.num_steps
        return found

    def description(self) -> dict[str, Any]:
        """Version, model folder, and what the engine settled by itself."""
        import octavo

        return {"engine_version": octavo.__version__, "model_path": self._llm.model_path}

    def warnings(self) -> Sequence[str]:
        """None of its own: what the engine has to say goes to its log."""
        return ()

    def gpu_ids(self) -> list[int]:
        """The first GPU, if the engine runs on one."""
        from octavo.platform import detect

        device = detect(self._spec.engine_options.get("device") or "auto").device
        return [0] if device == "cuda" else []

    def pids(self) -> list[int]:
        """None beside this process."""
        return []

    async def close(self) -> None:
        """Free the model."""
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)


def request_seed(seed: int, index: int) -> int:
    """Each request draws from a seed of its own, the same for every engine that takes one."""
    return (seed * 1_000_003 + index) & 0x7FFFFFFF


def _note_end(output: Any, answer: Answer) -> None:
    """What the last output tells: how it ended, and what it cost."""
    final = output.outputs[0]
    if final.error is not None:
        raise TargetError("engine", final.error)
    answer.finish_reason = final.finish_reason
    metrics = output.metrics
    if metrics is None:
        return
    answer.prompt_tokens = metrics.num_prompt_tokens
    answer.first_step_time = metrics.first_scheduled_time
    answer.cached_tokens = metrics.num_cached_tokens
    answer.num_preemptions = metrics.num_preemptions
    told = metrics.speculation
    if told is not None:
        answer.drafted, answer.accepted, answer.num_verifications = (
            told.drafted,
            told.accepted,
            told.num_steps,
        )
        answer.drafted_by_position = list(told.drafted_by_position)
        answer.accepted_by_position = list(told.accepted_by_position)
        answer.reached_by_position = list(told.reached_by_position)
