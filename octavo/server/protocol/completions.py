"""The request of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from octavo.errors import RequestError
from octavo.server.protocol.base import Whole
from octavo.server.protocol.generation import COMMON_REFUSED, GenerationRequest
from octavo.server.settings import ServeSettings


class CompletionRequest(GenerationRequest):
    """Prompts to be continued."""

    REFUSED: ClassVar = {**COMMON_REFUSED, "suffix": "text cannot be inserted; put it into the prompt"}

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, token ids, or a list of either; the choices come in its order"
    )
    logprobs: Whole | None = None

    def check(self, settings: ServeSettings) -> list[str]:
        """See GenerationRequest."""
        warnings = super().check(settings)
        if self.logprobs is not None and not 0 <= self.logprobs <= settings.max_logprobs:
            raise RequestError(
                f"logprobs must be from 0 to {settings.max_logprobs}, not {self.logprobs}", "logprobs"
            )
        prompts = self.prompts
        if not prompts:
            raise RequestError("prompt is an empty list; it needs at least one prompt", "prompt")
        if len(prompts) > settings.max_prompts:
            raise RequestError(
                f"{len(prompts)} prompts are more than the {settings.max_prompts} of one request allowed",
                "prompt",
            )
        if self.max_tokens is not None and self.max_tokens < 0:
            raise RequestError(f"max_tokens must be at least 0, not {self.max_tokens}", "max_tokens")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(
                "max_tokens 0 asks for nothing without echo; set echo or more tokens", "max_tokens"
            )
        return warnings

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, one or several, each a text or token ids."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
        return [given] if is_one else given

    @property
    def only_prompt(self) -> bool:
        """True if nothing is to be generated: the prompt and its logprobs are all that is wanted."""
        return self.max_tokens == 0

    def sampling_kwargs(self) -> dict[str, Any]:
        """See GenerationRequest. A prompt alone is asked for as one token, which is not returned."""
        given = super().sampling_kwargs()
        if self.max_tokens is not None:
            given["max_tokens"] = max(self.max_tokens, 1)
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
            if self.echo:
                given["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        if self.only_prompt:
            given.pop("min_tokens", None)
        return given
