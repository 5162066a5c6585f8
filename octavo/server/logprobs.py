"""Log-probabilities in the two shapes of the OpenAI API, and vLLM's for prompts.

A token is named by its text. Where it is only a part of a character its name shows the replacement
character, and its `bytes` tell what it is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from octavo.engine.tokenizer import Tokenizer
from octavo.outputs import Logprob, LogprobsAt

LOWEST = -9999.0  # OpenAI's word for "never"; JSON has no infinity


class TokenNames:
    """How tokens are shown. Without a tokenizer, or where asked for, as `token_id:123`."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the token stands for; none without a tokenizer."""
        return self._tokenizer.token_bytes(token_id) if self._tokenizer is not None else b""

    def name(self, token_id: int) -> str:
        """The token's text."""
        if self._as_ids:
            return f"token_id:{token_id}"
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def entry(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        """A token in the shape of chat."""
        known = list(self.bytes_of(token_id)) if self._tokenizer is not None else None
        return {"token": self.name(token_id), "logprob": finite(logprob.logprob), "bytes": known}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if logprob > LOWEST else LOWEST


def most_probable(at: LogprobsAt, count: int) -> list[tuple[int, Logprob]]:
    """The top tokens of a position, most probable first; the chosen one only if it is among them."""
    ranked = [(token, found) for token, found in at.items() if found.rank is not None and found.rank <= count]
    return sorted(ranked, key=lambda pair: pair[1].rank or 0)


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], found: Sequence[LogprobsAt], count: int
) -> list[dict[str, Any]]:
    """`logprobs.content` of chat: one entry a token, each with the `count` most probable ones."""
    content = []
    for token_id, at in zip(token_ids, found, strict=True):
        top = [names.entry(token, logprob) for token, logprob in most_probable(at, count)]
        content.append({**names.entry(token_id, at[token_id]), "top_logprobs": top})
    return content


class CompletionLogprobs:
    """`logprobs` of completions, which also says where in the text each token begins."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(
        self, token_ids: Sequence[int], found: Sequence[LogprobsAt | None], hidden: frozenset[int]
    ) -> dict[str, Any]:
        """The lists for more tokens. `None` stands for the first token of a prompt, which has no
        probability. `hidden` are special tokens that the text does not show."""
        offsets: list[int] = []
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, at in zip(token_ids, found, strict=True):
            offsets.append(self._offset)
            if token_id not in hidden:
                self._offset += len(self._decoder.decode(self._names.bytes_of(token_id)))
            tokens.append(self._names.name(token_id))
            logprobs.append(None if at is None else finite(at[token_id].logprob))
            tops.append(None if at is None else self._top(at))
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": tops}

    def skip_to(self, offset: int) -> None:
        """The text before the next token has this length, whatever its tokens would make of it."""
        self._offset = offset
        self._decoder.reset()

    def _top(self, at: LogprobsAt) -> dict[str, float]:
        """By the tokens' texts. Of several with one text the most probable counts."""
        top: dict[str, float] = {}
        for token_id, logprob in at.items():
            name = self._names.name(token_id)
            top[name] = max(top.get(name, LOWEST), finite(logprob.logprob))
        return top


def prompt_logprobs(
    names: TokenNames, found: Sequence[LogprobsAt | None], count: int
) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token its own log-probability and the `count` most probable ones."""
    shown: list[dict[str, Any] | None] = []
    for at in found:
        if at is None:
            shown.append(None)
            continue
        own = next(iter(at))
        shown.append(
            {
                str(token): {
                    "logprob": finite(logprob.logprob),
                    "rank": logprob.rank,
                    "decoded_token": names.name(token),
                }
                for token, logprob in at.items()
                if token == own or (logprob.rank is not None and logprob.rank <= count)
            }
        )
    return shown


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lists of several `CompletionLogprobs.add` in a row."""
    return {key: [item for part in parts for item in part[key]] for key in parts[0]} if parts else {}
