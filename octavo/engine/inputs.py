"""From what a caller hands in to prompts of token ids.

A prompt is a text, a list (or 1-d array, or tensor) of token ids, `{"prompt": text}` or
`{"prompt_token_ids": ids}`. `prompt_list` tells a single prompt from several; `Prompt` is one,
already legal. Whatever else is handed in gets a RequestError that names what to pass instead.
"""

from __future__ import annotations

import marshal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Number
from typing import Any, TypeAlias

import numpy as np

from octavo.engine.tokenizer import Tokenizer
from octavo.errors import RequestError

PromptInput: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"

_WHAT_A_PROMPT_IS = "a text or a list of token ids"
# An int of 32 bits in the format of marshal, and what stands before a list's items.
_MARSHALLED = np.dtype([("kind", "u1"), ("value", "<i4")])
_HEAD = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that can be computed."""

    text: str | None  # None where token ids were given
    token_ids: list[int]


def prompt_list(
    prompts: PromptInput | Sequence[PromptInput] | Iterator[PromptInput],
) -> tuple[list[PromptInput], bool]:
    """All prompts as a list, and whether a single one was given.

    A list, or 1-d array, of numbers is one prompt. An empty list is no prompts at all. An iterator is
    read to its end.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts], True
    given: Any = prompts
    if _is_array(given):
        given = _one_dimension(given)
    elif isinstance(given, Iterator):
        given = list(given)
    elif _is_bytes(given) or not isinstance(given, Sequence):
        raise RequestError(
            f"prompts must be {_WHAT_A_PROMPT_IS}, a dict with prompt or prompt_token_ids, or a list of "
            f"these, not {_kind(given)}{_hint(given)}",
            "prompt",
        )
    # What begins with a number was meant as token ids, even if a later item spoils it.
    if len(given) > 0 and isinstance(given[0], Number):
        return [given], True
    return list(given), False


def read_prompt(
    given: PromptInput,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_model_len: int,
    *,
    add_special_tokens: bool = True,
) -> Prompt:
    """Check and tokenize one prompt. Raises RequestError that says what to change."""
    text: str | None = None
    if isinstance(given, Mapping):
        text, given = _from_mapping(given)
    if isinstance(given, str):
        if tokenizer is None:
            raise RequestError(
                "this engine has no tokenizer, so a prompt must be a list of token ids "
                "(skip_tokenizer_init is set, or the model folder holds no tokenizer: tokenizer=… names "
                "another one)",
                "prompt",
            )
        text, token_ids = given, tokenizer.encode(given, add_special_tokens=add_special_tokens)
        ends = _range_of(token_ids)
    else:
        token_ids, ends = _token_ids(given)
    if not token_ids:
        raise RequestError("the prompt is empty; it needs at least one token", "prompt")
    least, most = ends or (min(token_ids), max(token_ids))
    worst = least if least < 0 else most
    if not 0 <= worst < vocab_size:
        raise RequestError(f"token id {worst} is not in the vocabulary (0 … {vocab_size - 1})", "prompt")
    if len(token_ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens and the context holds {max_model_len}, of which at "
            "least one must be left for the answer; shorten the prompt or raise max_model_len",
            "prompt",
        )
    return Prompt(text, token_ids)


def _from_mapping(given: Mapping[str, Any]) -> tuple[str | None, Any]:
    """(text to show, what to compute) of a prompt given as a dict."""
    names = set(given)
    if names == {"prompt"}:
        return None, given["prompt"]
    if names not in ({"prompt_token_ids"}, {"prompt", "prompt_token_ids"}):
        raise RequestError(
            f"a prompt given as a dict has the key prompt or prompt_token_ids, not {sorted(map(str, names))}",
            "prompt",
        )
    text, token_ids = given.get("prompt"), given["prompt_token_ids"]
    if isinstance(token_ids, str):
        raise RequestError("prompt_token_ids must be a list of token ids, not a text", "prompt")
    if text is not None and not isinstance(text, str):
        raise RequestError(
            f"prompt beside prompt_token_ids must be the text of these tokens, or be left out, "
            f"not {_kind(text)}",
            "prompt",
        )
    return text, token_ids


def _token_ids(given: Any) -> tuple[list[int], tuple[int, int] | None]:
    """Plain ints of a list, a 1-d array or a 1-d tensor of token ids; least and greatest, if known."""
    if _is_array(given):
        given = _one_dimension(given)
    elif _is_bytes(given) or not isinstance(given, Sequence):
        raise RequestError(
            f"a prompt must be {_WHAT_A_PROMPT_IS}, not {_kind(given)}{_hint(given)}", "prompt"
        )
    items = list(given)
    ends = _range_of(items)
    if ends is not None:  # nearly always, and many times as fast as to look at each
        return items, ends
    token_ids: list[int] = []
    for index, item in enumerate(items):
        if type(item) is int:
            token_ids.append(item)
        elif not isinstance(item, bool) and isinstance(item, Integral):  # numpy's integers, for one
            token_ids.append(int(item))
        else:
            raise RequestError(
                f"a prompt must be {_WHAT_A_PROMPT_IS}; item {index} of the list is {_kind(item)}, and a "
                f"token id is a whole number{_hint(item)}",
                "prompt",
            )
    return token_ids, None


def _range_of(items: list[Any]) -> tuple[int, int] | None:
    """Least and greatest of a list of plain ints of 32 bits; None for any other list, an empty one too.

    All of a long prompt's ids are looked at before anything runs, so this is one pass in C: in the format of
    marshal (version 2) such an int is the letter i and four bytes, and nothing else begins with that letter.
    """
    try:
        packed = marshal.dumps(items, 2)
    except ValueError:  # something that this format does not know
        return None
    if not items or len(packed) != _HEAD + len(items) * _MARSHALLED.itemsize:
        return None
    found = np.frombuffer(packed, _MARSHALLED, offset=_HEAD)
    if not (found["kind"] == ord("i")).all():
        return None
    return int(found["value"].min()), int(found["value"].max())


def _is_array(value: object) -> bool:
    """Arrays of numpy, tensors of torch and their like, without importing either."""
    return hasattr(value, "tolist") and hasattr(value, "ndim") and not _is_bytes(value)


def _one_dimension(array: Any) -> list[Any]:
    """The items of a 1-d array as plain Python values."""
    if array.ndim != 1:
        raise RequestError(
            f"an array of token ids must have one dimension, not {array.ndim}; give one 1-d array a prompt, "
            "in a list, without padding",
            "prompt",
        )
    return list(array.tolist())


def _is_bytes(value: object) -> bool:
    return isinstance(value, (bytes, bytearray, memoryview))


def _hint(value: object) -> str:
    """What to do about a value that is not what it was meant to be."""
    if _is_bytes(value):
        return "; give text (decode it first) or token ids"
    if _is_array(value):
        return "; give plain integers (tolist() makes them)"
    return ""


def _kind(value: object) -> str:
    return type(value).__name__
