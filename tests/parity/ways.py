"""The same requests, run in many ways that must not show in the result.

A way is a set of engine options, and two things that are no options: `blocks` makes the KV cache
hold that many blocks, so that requests are preempted; `rebuild` drops every slot of the device at
every third step boundary and has it built again from what the host knows. Both are checked to have
happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.engine.engine import Engine
from octavo.llm import LLM
from octavo.models.config import ModelConfig
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

LEAST_PREEMPTIONS = LEAST_REBUILDS = 2


def ways(blocks: int) -> dict[str, dict[str, Any]]:
    """All of them; the first is the plain one. `blocks` is a KV cache that is too small."""
    return {
        "together": {},
        "alone": {"max_num_seqs": 1},
        "chunks-of-1": {"max_chunk_tokens": 1},
        "chunks-of-7": {"max_chunk_tokens": 7},
        "chunks-of-64": {"max_chunk_tokens": 64},
        "tiny-budget": {"max_num_batched_tokens": 9, "max_num_seqs": 8},
        "no-prefix-caching": {"enable_prefix_caching": False},
        "preempted": {"blocks": blocks},
        "rebuilt": {"rebuild": True},
        "one-step-late": {"pipeline_depth": 1},
        "all-at-once": {"pipeline_depth": 1, "blocks": blocks, "max_chunk_tokens": 7, "rebuild": True},
    }


def run(
    folder: Path,
    prompts: Sequence[list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    way: dict[str, Any],
    **options: Any,
) -> list[RequestOutput]:
    """The outputs of one way; `options` hold for all ways, unless the way says otherwise."""
    options = {"max_num_seqs": 64, "kv_cache_memory": "4MB", "dtype": "float32", **options, **way}
    blocks, rebuild = options.pop("blocks", None), options.pop("rebuild", False)
    if blocks is not None:
        options["kv_cache_memory"] = blocks * block_bytes(folder, options["dtype"])
    with LLM(str(folder), skip_tokenizer_init=True, **options) as llm:
        engine = llm._engine_parts().engine
        rebuilds = _rebuild_now_and_then(engine) if rebuild else []
        outputs = llm.generate(list(prompts), params, use_tqdm=False)
        engine.scheduler.check_integrity()
        if blocks is not None:
            assert engine.scheduler.stats.num_preemptions >= LEAST_PREEMPTIONS, "the cache was not too small"
        if rebuild:
            assert len(rebuilds) >= LEAST_REBUILDS, "hardly anything was rebuilt"
        return outputs


def assert_same_bits(outputs: Sequence[RequestOutput], plain: Sequence[RequestOutput], way: str) -> None:
    """Tokens, log-probabilities and sums equal to the last bit; params should ask for logprobs."""
    for number, (output, expected) in enumerate(zip(outputs, plain, strict=True)):
        for one, other in zip(output.outputs, expected.outputs, strict=True):
            if one.token_ids != other.token_ids:
                at = next(
                    i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b
                )
                raise AssertionError(f"{way}: request {number} has another token {at}")
            assert one.cumulative_logprob is not None, "ask for logprobs: tokens alone hide small differences"
            assert one.logprobs == other.logprobs, f"{way}: request {number} has other log-probabilities"
            assert one.cumulative_logprob == other.cumulative_logprob, f"{way}: request {number}"


def _rebuild_now_and_then(engine: Engine) -> list[int]:
    """Drop the device's state at every third step; returns a list that grows with the slots rebuilt."""
    plain_step, counted = engine.step, 0
    rebuilds: list[int] = []

    def step() -> list[RequestOutput]:
        nonlocal counted
        counted += 1
        outputs: list[RequestOutput] = []
        if counted % 3 == 2:
            while engine.scheduler.num_unread_steps:  # one step late: read what is launched first
                outputs += engine._process(engine.executor.collect())
            if engine.scheduler.running:
                rebuilds.append(len(engine.scheduler.running))
            engine.scheduler.drop_device_state()
        return outputs + (plain_step() if engine.has_work() else [])

    engine.step = step  # type: ignore[method-assign]
    return rebuilds


def block_bytes(folder: Path, dtype: str) -> int:
    """Bytes of one block of 16 tokens in all layers."""
    config = ModelConfig.from_folder(folder)
    # The C kernels round the head size up; the most any layout takes is asked for here.
    head_dim = -(-config.head_dim // 16) * 16
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    return 2 * config.num_layers * config.num_kv_heads * head_dim * itemsize * 16
