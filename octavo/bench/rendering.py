"""From prompts to requests: one chat template and one tokenizer for every engine.

Engines that take token ids all get the same ids, made here by the model's own template and tokenizer. Only a
URL, whose template is its own affair, gets the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.bench.arrivals import Arrival
from octavo.bench.prompts import Prompt
from octavo.bench.spec import RunSpec
from octavo.bench.target import TargetRequest
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.engine.chat_template import ChatTemplate
    from octavo.engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with its chat template; both None for a URL without --tokenizer."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    model_path: str | None = None

    @classmethod
    def of(cls, spec: RunSpec) -> Renderer:
        """Find the model's tokenizer. Raises ModelNotFoundError, or ConfigError where it has none."""
        from octavo import hub
        from octavo.engine.chat_template import ChatTemplate
        from octavo.engine.tokenizer import Tokenizer

        if spec.engine == "url":
            if spec.tokenizer is None:
                return cls(None, None)
            folder = hub.resolve_tokenizer(spec.tokenizer)
        else:
            given = spec.engine_options.get("tokenizer")
            folder = hub.resolve_tokenizer(given) if given else hub.resolve(spec.serving_model)
        remote = bool(spec.engine_options.get("trust_remote_code"))
        tokenizer = Tokenizer.from_folder(folder, remote)
        if tokenizer is None:
            raise ConfigError(
                f"{folder} holds no tokenizer, which the workbench needs: name one (--tokenizer)"
            )
        template = None
        if tokenizer.chat_template:
            template = ChatTemplate.for_tokenizer(tokenizer, spec.engine_options.get("chat_template"))
        return cls(tokenizer, template, str(folder))

    def requests(
        self, spec: RunSpec, prompts: Sequence[Prompt], arrivals: Sequence[Arrival] | None
    ) -> tuple[list[TargetRequest], list[str]]:
        """(requests, warnings): one for each arrival, or for each prompt in a closed load."""
        count = len(prompts) if arrivals is None else len(arrivals)
        made = []
        for index in range(count):
            prompt = prompts[index % len(prompts)]
            limit = arrivals[index].max_tokens if arrivals is not None else None
            made.append(self._request(spec, index, prompt, limit or prompt.max_tokens))
        warnings = []
        if self.tokenizer is not None and self.template is None and any(p.messages for p in prompts):
            warnings.append(
                "the model has no chat template: the contents of messages were joined by blank lines instead"
            )
        if count > len(prompts):
            warnings.append(
                f"{count} requests were made of {len(prompts)} prompts: repeated ones are found in prefix "
                f"caches"
            )
        return made, warnings

    def _request(self, spec: RunSpec, index: int, prompt: Prompt, limit: int | None) -> TargetRequest:
        ids, text = prompt.token_ids, prompt.text
        if ids is None and self.tokenizer is not None:
            if prompt.messages is None:
                ids = tuple(self.tokenizer.encode(text or "", add_special_tokens=True))
            elif self.template is not None:
                rendered = self.template.render(list(prompt.messages))
                ids = tuple(self.tokenizer.encode(rendered, add_special_tokens=False))
            else:
                joined = "\n\n".join(message["content"] for message in prompt.messages)
                ids = tuple(self.tokenizer.encode(joined, add_special_tokens=True))
        if text is None and prompt.messages is None and self.tokenizer is not None:
            text = self.tokenizer.decode(list(ids or ()), skip_special_tokens=False)
        return TargetRequest(
            index, prompt.prompt_id, limit or spec.sampling.max_tokens, ids, prompt.messages, text
        )
