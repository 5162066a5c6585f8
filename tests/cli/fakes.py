"""A stand-in for LLM that answers from a script, one token a word, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from octavo import CompletionOutput, RequestOutput, SamplingParams
from octavo.errors import RequestError


class FakeLLM:
    """Records how it was made and called; `answer` is what it says to everything."""

    made: list[FakeLLM]  # set by the fixture
    answer = "one two three"
    errors: list[str | None]  # of the first answers; later ones have none. Set by the fixture
    model_path = "unset"
    generation_defaults: dict[str, Any] = {}  # noqa: RUF012 (tests replace it)
    fail_start: BaseException | None = None

    def __init__(self, **kwargs: Any) -> None:
        if self.fail_start is not None:
            raise self.fail_start
        self.kwargs = kwargs
        self.calls: list[tuple[Any, SamplingParams | None]] = []
        self.closed_streams = 0
        self.streams: list[Iterator[RequestOutput]] = []  # kept, so that none closes by being forgotten
        self.shutdowns = 0
        self.made.append(self)

    def _states(self, prompt: str | None) -> Iterator[RequestOutput]:
        words = self.answer.split(" ")
        error = self.errors.pop(0) if self.errors else None
        for count in range(1, len(words) + 1):
            done = count == len(words)
            text = " ".join(words[:count])
            answer = CompletionOutput(0, text, list(range(count)), finish_reason="stop" if done else None)
            if done and error is not None:
                answer.finish_reason, answer.error = "error", error
            yield RequestOutput("r", prompt, [7, 8], outputs=[answer], finished=done)

    def _stream(self, prompt: str | None) -> Iterator[RequestOutput]:
        try:
            yield from self._states(prompt)
        finally:
            self.closed_streams += 1

    def _opened(self, prompt: str | None) -> Iterator[RequestOutput]:
        self.streams.append(self._stream(prompt))
        return self.streams[-1]

    def generate(
        self,
        prompts: list[str],
        params: SamplingParams | None = None,
        stream: bool = False,
        use_tqdm: bool = True,
    ) -> Any:
        self.calls.append((list(prompts), params))
        if stream:
            return self._opened(prompts[0])
        outputs = []
        for prompt in prompts:
            output = list(self._states(prompt))[-1]
            count = 1 if params is None else params.n
            output.outputs = [
                CompletionOutput(i, o.text, o.token_ids, finish_reason=o.finish_reason, error=o.error)
                for i in range(count)
                for o in output.outputs
            ]
            outputs.append(output)
        return outputs

    def check_chat(self) -> None:
        """Its template is fine."""

    def chat(
        self, messages: list[dict[str, str]], params: SamplingParams | None = None, stream: bool = False
    ) -> Any:
        if not messages[-1]["content"]:
            raise RequestError("the prompt is empty", param="messages")
        self.calls.append(([dict(message) for message in messages], params))
        return self._opened(None)

    def shutdown(self) -> None:
        self.shutdowns += 1
