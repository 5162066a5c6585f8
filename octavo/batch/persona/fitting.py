"""From a draft to token ids that leave room for the answer.

The texts go through the model's chat template where it has one; a model without one gets them as a
plain text to continue. What is too long loses whole turns, the oldest first, and as few as will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.batch.persona.data import Item
from octavo.batch.persona.datasets import Ablation, Dataset
from octavo.batch.persona.prompts import Draft, draft, num_turns
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import RequestError

_PROBE = "OCTAVO PROBES THE TEMPLATE"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent to the engine."""

    token_ids: list[int]
    num_dropped: int  # turns that had to be left out


class PromptMaker:
    """Makes the prompts of one job.

    max_tokens: of a prompt; the context less what the answer may take.
    """

    def __init__(
        self,
        dataset: Dataset,
        ablation: Ablation,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        max_tokens: int,
    ) -> None:
        self._dataset = dataset
        self._ablation = ablation
        self._tokenizer = tokenizer
        self._template = template if template is not None and template.sources else None
        self._max_tokens = max_tokens
        self._has_system_role = self._template is not None and _takes_system_role(self._template)

    @property
    def uses_chat_template(self) -> bool:
        """False for a model that has none."""
        return self._template is not None

    def make(self, item: Item, history: Sequence[Item]) -> Prompt:
        """The prompt of an item. Raises RequestError if it is too long with its last turn alone."""
        token_ids = self._encode(item, history, 0)
        if len(token_ids) <= self._max_tokens:
            return Prompt(token_ids, 0)
        # Fewest turns to drop: between `low`, which is too few, and `high`, which will do.
        low, high = 0, num_turns(self._ablation, item, history)
        token_ids = self._encode(item, history, high)
        if len(token_ids) > self._max_tokens:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens even without all turns that can be left out, and "
                f"{self._max_tokens} fit beside the answer; raise --max-model-len or lower --max-tokens"
            )
        while high - low > 1:
            middle = (low + high) // 2
            attempt = self._encode(item, history, middle)
            if len(attempt) <= self._max_tokens:
                high, token_ids = middle, attempt
            else:
                low = middle
        return Prompt(token_ids, high)

    def text(self, item: Item, history: Sequence[Item], num_dropped: int = 0) -> str:
        """The prompt as a text, as the model sees it."""
        return self._render(draft(self._dataset, self._ablation, item, history, num_dropped))

    def _encode(self, item: Item, history: Sequence[Item], num_dropped: int) -> list[int]:
        text = self.text(item, history, num_dropped)
        return self._tokenizer.encode(text, add_special_tokens=self._template is None)

    def _render(self, texts: Draft) -> str:
        if self._template is None:
            prefix = f" {texts.answer_prefix}" if texts.answer_prefix else ""
            return f"{texts.instructions}\n\n{texts.request}\n\n{texts.cue}{prefix}"
        if self._has_system_role:
            messages = [
                {"role": "system", "content": texts.instructions},
                {"role": "user", "content": texts.request},
            ]
        else:
            messages = [{"role": "user", "content": f"{texts.instructions}\n\n{texts.request}"}]
        # A model that thinks aloud would spend the answer's tokens on it.
        return self._template.render(messages, enable_thinking=False) + texts.answer_prefix


def _takes_system_role(template: ChatTemplate) -> bool:
    """False for templates that refuse a system message, or leave it out."""
    probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
    try:
        return _PROBE in template.render(probe, enable_thinking=False)
    except RequestError:
        return False
