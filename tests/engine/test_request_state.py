"""Log-probabilities in the shape of the outputs, and what the detokenizer reads of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers

from octavo.core.messages import TokenLogprobs
from octavo.engine import request_state
from octavo.engine.detokenizer import IncrementalDetokenizer
from octavo.engine.request_state import logprobs_at, token_texts
from octavo.engine.tokenizer import RustBackend, Tokenizer
from octavo.outputs import Logprob
from tests.engine.sample_tokenizers import byte_level, metaspace


class CountingTokenizer(Tokenizer):
    """Notes what is decoded."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        decoded.append(list(token_ids))
        return super().decode(token_ids, skip_special_tokens)


decoded: list[list[int]] = []


def counting(rust: tokenizers.Tokenizer) -> CountingTokenizer:
    counted = CountingTokenizer(RustBackend(rust))
    decoded.clear()
    return counted


def test_the_token_itself_comes_first_and_keeps_its_rank() -> None:
    tokenizer = counting(byte_level())
    entry = TokenLogprobs(-1.5, 2, [7, 5, 9], [-0.5, -1.5, -3.0])
    found = logprobs_at(5, entry, tokenizer, token_texts(tokenizer))
    text = {token: tokenizer.decode([token], skip_special_tokens=False) for token in (5, 7, 9)}
    assert list(found.items()) == [
        (5, Logprob(-1.5, 2, text[5])),
        (7, Logprob(-0.5, 1, text[7])),
        (9, Logprob(-3.0, 3, text[9])),
    ]
    assert logprobs_at(5, entry, None, {})[7] == Logprob(-0.5, 1, None)


def test_a_token_is_decoded_once_and_the_texts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_state, "_MAX_TEXTS", 4)
    tokenizer = counting(byte_level())
    texts = token_texts(tokenizer)
    assert texts is token_texts(tokenizer)
    assert texts is not token_texts(counting(byte_level()))
    for _ in range(3):
        logprobs_at(5, TokenLogprobs(-1.0, 1, [5, 6], [-1.0, -2.0]), tokenizer, texts)
    assert decoded == [[5], [6]]
    found = logprobs_at(8, TokenLogprobs(-1.0, 1, [6, 10, 11], [-1.0] * 3), tokenizer, texts)
    assert all(entry.decoded_token is not None for entry in found.values())
    assert len(texts) == 4


def test_a_long_prompt_is_not_decoded_to_continue_it() -> None:
    prompt = byte_level().encode("Hello world " * 50).ids
    IncrementalDetokenizer(counting(byte_level()), prompt, continue_prompt=True)
    assert decoded == []
    tokenizer = counting(metaspace())
    IncrementalDetokenizer(tokenizer, tokenizer.encode("Hello world " * 50), continue_prompt=True)
    assert max(map(len, decoded), default=0) <= 4
