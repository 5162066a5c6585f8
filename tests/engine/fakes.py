"""An engine whose muscle is the fake device: real scheduling, known tokens, no tensor."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import tokenizers

from octavo.config import CacheConfig, SchedulerConfig
from octavo.core.draft_planner import EachRequest
from octavo.core.messages import ModelOutput, SchedulerOutput
from octavo.core.scheduler import Scheduler
from octavo.engine.engine import Engine
from octavo.engine.request_reader import EngineInfo
from octavo.engine.tokenizer import RustBackend, Tokenizer
from octavo.worker.model_runner import GrammarMasks
from tests.core.fake_device import VOCAB, FakeDevice

BLOCK_SIZE = 4
WORDS = [f" w{index}" for index in range(VOCAB)]


class FakeExecutor:
    """The executor's protocol over a `FakeDevice`. `delay` seconds a step; `fail_at` a step id."""

    def __init__(self, device: FakeDevice, delay: float = 0.0, fail_at: int | None = None) -> None:
        self.device = device
        self.delay = delay
        self.fail_at = fail_at
        self.is_shut_down = False

    def launch(self, out: SchedulerOutput) -> None:
        if self.fail_at is not None and out.step_id >= self.fail_at:
            raise RuntimeError("the device burst into flames")
        self.device.launch(out)

    def provide_masks(self, masks: GrammarMasks) -> None:
        raise AssertionError("the fake device knows no masks")

    def collect(self) -> ModelOutput:
        if self.delay:
            time.sleep(self.delay)
        return self.device.collect()

    def shutdown(self) -> None:
        self.is_shut_down = True


def word_tokenizer() -> Tokenizer:
    """Token i is the text " wi", for every token of the fake device."""
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0])
    rust = tokenizers.Tokenizer(model)
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(" w[0-9]+"), "isolated")
    rust.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(RustBackend(rust))


def fake_engine(
    depth: int = 0,
    *,
    tokenizer: Tokenizer | None = None,
    blocks: int = 200,
    drafts: int = 0,
    max_model_len: int = 100,
    max_num_seqs: int = 8,
    enable_prefix_caching: bool = True,
    eos: tuple[int, ...] = (),
    **executor: Any,
) -> Engine:
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
        max_model_len=max_model_len,
        max_chunk_tokens=1000,
        pipeline_depth=depth,
    )
    scheduler = Scheduler(
        config, CacheConfig(BLOCK_SIZE, blocks, enable_prefix_caching), EachRequest(lambda _: drafts)
    )
    info = EngineInfo(VOCAB, max_model_len, eos, seed=3, enable_prefix_caching=enable_prefix_caching)
    device = FakeDevice(blocks, BLOCK_SIZE)
    return Engine(info, scheduler, FakeExecutor(device, **executor), tokenizer)


class FakeParts:
    """What `AsyncLLM` needs of `EngineParts`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model_path = Path("fake")
        self.generation_defaults: dict[str, Any] = {}

    def close(self) -> None:
        self.engine.shutdown()
