"""Workers without a model: the same text for the same prompt and seed, at once, late, or never."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from octavo.batch.work import WorkersInfo, WorkItem
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import EngineDeadError, OctavoError
from octavo.outputs import CompletionOutput, RequestMetrics, RequestOutput

WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "islet", "jetty")


def fake_info(**changes: Any) -> WorkersInfo:
    """Facts about a model that is not there."""
    facts: dict[str, Any] = {
        "model": "fake",
        "model_path": "/nowhere/fake",
        "tokenizer_path": None,
        "chat_template": None,
        "trust_remote_code": False,
        "max_model_len": 4096,
        "vocab_size": 1000,
        "max_num_seqs": 8,
        "num_replicas": 1,
        "dtype": "float32",
    }
    return WorkersInfo(**{**facts, **changes})


def fake_text(prompt: Any, seed: int | None, index: int, count: int) -> list[str]:
    """`count` words that depend on the prompt, the seed and the sample's index alone."""
    source = random.Random(f"{prompt!r}/{seed}/{index}")
    return [source.choice(WORDS) for _ in range(count)]


class FakeWorkers:
    """`delay` gives the seconds an item takes; `fault` may return an error to be raised for an item.

    `num_open` and `most_open` count items between start and end; `attempts` counts by key.
    """

    def __init__(
        self,
        *,
        delay: Callable[[WorkItem], float] | float = 0.0,
        fault: Callable[[WorkItem, int], Exception | None] | None = None,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        **info: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.num_open = 0
        self.most_open = 0
        self.attempts: Counter[str] = Counter()
        self.items: list[WorkItem] = []
        self.keeps_items = False
        self.is_closed = False
        self._delay = delay if callable(delay) else lambda item: delay
        self._fault = fault
        self._info = fake_info(**info)

    @property
    def info(self) -> WorkersInfo:
        return self._info

    async def run(self, item: WorkItem) -> RequestOutput:
        if self.is_closed:
            raise EngineDeadError("the workers were closed")
        self.attempts[item.key] += self._fault is not None
        if self.keeps_items:
            self.items.append(item)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await asyncio.sleep(self._delay(item))
            fault = self._fault(item, self.attempts[item.key]) if self._fault is not None else None
            if fault is not None:
                raise fault
        finally:
            self.num_open -= 1
        count = item.params.max_tokens or 16
        answers = [
            CompletionOutput(
                index,
                " ".join(fake_text(item.prompt, item.params.seed, index, count)),
                list(range(count)),
                finish_reason="length",
            )
            for index in range(item.params.n)
        ]
        ids: Any = item.prompt
        return RequestOutput(
            item.key, None, ids if isinstance(ids, list) else [], None, answers, True, RequestMetrics(0.0)
        )

    async def close(self) -> None:
        self.is_closed = True


class Flaky(OctavoError):
    """A failure that may not come again."""
