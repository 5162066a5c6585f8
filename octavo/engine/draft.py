"""Which draft model goes with a model: found, and refused early where the two do not fit.

A draft is token ids. It is worth something only if both models mean the same by an id, so their
tokenizers must be the same; where neither folder has one, their vocabularies must have the same size.
Vocabularies padded to different sizes are fine: what only one of them has is never drafted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo import hub
from octavo.config import DraftConfig, SpeculativeConfig
from octavo.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from octavo.models.config import ModelConfig

_TOKENIZER = "tokenizer.json"


def resolve_draft(
    speculative: SpeculativeConfig, target: ModelConfig, target_path: Path, trust_remote_code: bool = False
) -> DraftConfig | None:
    """The draft model of this configuration, or None if it has none.

    Raises ConfigError if its tokenizer or vocabulary is another one than the target's, and what
    finding a model may raise.
    """
    if speculative.model is None:
        return None
    from octavo.models.config import ModelConfig

    path = hub.resolve(speculative.model, trust_remote_code=trust_remote_code)
    model = ModelConfig.from_folder(path)
    check_same_tokens(speculative.model, path, model.vocab_size, target_path, target.vocab_size)
    return DraftConfig(speculative.model, model, path)


def check_same_tokens(name: str, draft: Path, draft_size: int, target: Path, target_size: int) -> None:
    """Raises ConfigError unless the ids of both models mean the same tokens."""
    mine, theirs = draft / _TOKENIZER, target / _TOKENIZER
    if not (mine.exists() and theirs.exists()):
        if draft_size == target_size:
            return
        lacking = " and ".join(str(path.parent) for path in (mine, theirs) if not path.exists())
        raise ConfigError(
            f"the draft model {name} has {draft_size:,} tokens and the target {target_size:,}, and {lacking} "
            f"has no {_TOKENIZER} that would show they are the same but for padding. Use a draft model of "
            "the target's family"
        )
    if mine.read_bytes() == theirs.read_bytes():
        return
    difference = _difference(_vocabulary(mine), _vocabulary(theirs))
    if difference:
        raise ConfigError(
            f"the draft model {name} has another tokenizer than the target: {difference}. Its drafts would "
            "be other words than it means. Use a draft model of the target's family"
        )


def _vocabulary(path: Path) -> dict[int, str]:
    """id -> token, without added ones: base and chat models name those differently."""
    try:
        model: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"]
        vocabulary = model["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer that can be read: {error!r}") from error
    if isinstance(vocabulary, dict):
        return {index: token for token, index in vocabulary.items()}
    return {index: entry[0] for index, entry in enumerate(vocabulary)}  # unigram: (token, score) pairs


def _difference(mine: dict[int, str], theirs: dict[int, str]) -> str:
    if len(mine) != len(theirs):
        return f"{len(mine):,} tokens instead of {len(theirs):,}"
    for index, token in theirs.items():
        if mine.get(index) != token:
            return f"token {index} is {mine.get(index)!r} there and {token!r} here"
    return ""
