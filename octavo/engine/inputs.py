"""From what a caller hands in to prompts of token ids.

A prompt is a text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
`prompt_list` tells a single prompt from a list of them; `Prompt` is one, already legal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from octavo.engine.tokenizer import Tokenizer
from octavo.errors import RequestError

PromptInput: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that can be computed."""

    text: str | None  # None where token ids were given
    token_ids: list[int]


def prompt_list(prompts: PromptInput | Sequence[PromptInput]) -> tuple[list[PromptInput], bool]:
    """All prompts as a list, and whether a single one was given.

    A list of whole numbers is one prompt. An empty list is no prompts at all.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts], True
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts must be a text, a list of token ids, a dict or a list of these, not {_kind(prompts)}",
            "prompt",
        )
    if len(prompts) > 0 and all(_is_id(item) for item in prompts):
        return [prompts], True  # type: ignore[list-item]
    return list(prompts), False  # type: ignore[arg-type]


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
        names = set(given)
        if names == {"prompt"}:
            given = given["prompt"]
        elif names == {"prompt_token_ids"} or names == {"prompt", "prompt_token_ids"}:
            text, given = given.get("prompt"), given["prompt_token_ids"]
            if isinstance(given, str):
                raise RequestError("prompt_token_ids must be a list of token ids, not a text", "prompt")
        else:
            raise RequestError(
                "a prompt given as a dict has the key prompt or prompt_token_ids, not "
                f"{sorted(map(str, names))}",
                "prompt",
            )
    if isinstance(given, str):
        if tokenizer is None:
            raise RequestError(
                "this engine has no tokenizer, so a prompt must be a list of token ids "
                "(skip_tokenizer_init is set, or the model folder holds no tokenizer)",
                "prompt",
            )
        text, token_ids = given, tokenizer.encode(given, add_special_tokens=add_special_tokens)
    elif isinstance(given, Sequence) and all(_is_id(item) for item in given):
        token_ids = [int(token) for token in given]
    else:
        raise RequestError(f"a prompt must be a text or a list of token ids, not {_kind(given)}", "prompt")
    if not token_ids:
        raise RequestError("the prompt is empty; it needs at least one token", "prompt")
    worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
    if not 0 <= worst < vocab_size:
        raise RequestError(f"token id {worst} is not in the vocabulary (0 … {vocab_size - 1})", "prompt")
    if len(token_ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens and the context holds {max_model_len}, of which at "
            "least one must be left for the answer; shorten the prompt or raise max_model_len",
            "prompt",
        )
    return Prompt(text, token_ids)


def _is_id(item: object) -> bool:
    # numpy's integers have __index__ as well
    return hasattr(item, "__index__") and not isinstance(item, bool)


def _kind(value: object) -> str:
    return type(value).__name__
