"""Rebuilds a `tokenizer.json` from the vocabulary inside a GGUF file.

GGUF keeps the tokens, their kinds, and either merges (byte-level BPE, "gpt2") or scores
(sentencepiece, "llama"). It does not keep the rules by which text is cut before merging: those it
names in `tokenizer.ggml.pre`, and the patterns below are the ones the original tokenizers publish
under these names. A name that is not known here is an error, because a wrong pattern gives a model
that almost works.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from octavo.hub.gguf_file import GGUFFile, damaged, inexpressible

logger = logging.getLogger(__name__)

# GGUF's kinds of token.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_LETTERS_THEN_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _LETTERS_THEN_REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _LETTERS_THEN_REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


class _BytePairRules(NamedTuple):
    """What the name in `tokenizer.ggml.pre` stands for."""

    patterns: tuple[str, ...]
    single_digits: bool = False
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # where the file does not say
    normalize_nfc: bool = False


_SINGLE_DIGITS = _BytePairRules((_GPT2,), single_digits=True)
_PLAIN_GPT2 = _BytePairRules((_GPT2,))
_LLAMA3_RULES = _BytePairRules((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_RULES = _BytePairRules((_QWEN2,), normalize_nfc=True)
_RULES: dict[str, _BytePairRules] = {
    "default": _BytePairRules(_DEFAULT),
    "gpt-2": _PLAIN_GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3_RULES,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "falcon3": _LLAMA3_RULES,
    "smaug-bpe": _BytePairRules((_LLAMA3,), ignore_merges=True),
    "dbrx": _BytePairRules((_LLAMA3,)),
    "qwen2": _QWEN2_RULES,
    "deepseek-r1-qwen": _QWEN2_RULES,
    "megrez": _QWEN2_RULES,
    "tekken": _BytePairRules((_TEKKEN,), ignore_merges=True, add_bos=True),
}


class _Vocabulary:
    """The tokens of a GGUF file, checked."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.tokens: list[str] = self.field("tokens")
        if not isinstance(self.tokens, list) or not all(isinstance(t, str) for t in self.tokens):
            raise damaged(gguf.path, "tokenizer.ggml.tokens is not a list of texts")
        self.kinds: list[int] = self.field("token_type", [1] * len(self.tokens))
        if len(self.kinds) != len(self.tokens):
            raise damaged(gguf.path, f"it has {len(self.tokens)} tokens and {len(self.kinds)} token types")
        self.ids: dict[str, int] = {}
        for index, token in enumerate(self.tokens):
            self.ids.setdefault(token, index)

    def field(self, name: str, default: Any = None) -> Any:
        value = self.gguf.metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise damaged(self.gguf.path, f"it has no metadata field tokenizer.ggml.{name}")
        return value

    def special(self, name: str) -> str | None:
        """The text of a special token, by the name of its id ("bos", "unknown")."""
        index = self.gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise damaged(
                self.gguf.path, f"tokenizer.ggml.{name}_token_id is {index}, outside the vocabulary"
            )
        return self.tokens[index]


def write_tokenizer(gguf: GGUFFile, folder: Path, max_length: int) -> bool:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Returns False, with nothing written, for a file that holds no tokenizer at all.
    Raises UnsupportedModelError for one that cannot be rebuilt, CheckpointError for a broken one.
    """
    kind = gguf.metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "no_vocab":
        return False
    if kind not in ("gpt2", "llama"):
        raise inexpressible(
            gguf.path,
            f"its tokenizer is of kind {kind!r}; what can be rebuilt is gpt2 (byte-level BPE) "
            "and llama (sentencepiece)",
        )
    vocabulary = _Vocabulary(gguf)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_pair_tokenizer(vocabulary)
    else:
        tokenizer, add_bos = _sentencepiece_tokenizer(vocabulary), True
    _add_special_tokens(tokenizer, vocabulary)
    add_bos = bool(gguf.metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(gguf.metadata.get("tokenizer.ggml.add_eos_token", False))
    _surround_with(tokenizer, vocabulary, add_bos, add_eos)
    # transformers trusts the file's own order of keys, and loads the compact form faster.
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)

    named = {
        f"{ours}_token": text
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (text := vocabulary.special(theirs)) is not None
    }
    config: dict[str, Any] = {
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "added_tokens_decoder": {str(index): entry for index, entry in _added_entries(vocabulary)},
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template := gguf.metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", named)
    return True


def _byte_pair_tokenizer(vocabulary: _Vocabulary) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    path = vocabulary.gguf.path
    name = vocabulary.gguf.metadata.get("tokenizer.ggml.pre")
    if name is None:
        logger.warning("%s does not say how its tokenizer cuts text; llama.cpp's default is used.", path)
        name = "default"
    rules = _RULES.get(name)
    if rules is None:
        raise inexpressible(path, f"its pre-tokenizer is {name!r}; known are {', '.join(_RULES)}")
    # A merge is two tokens around a space; a token may itself begin with one.
    cuts = [(merge, merge.find(" ", 1)) for merge in vocabulary.field("merges")]
    if any(cut < 0 for _, cut in cuts):
        raise damaged(path, "tokenizer.ggml.merges holds an entry without a space")
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]
    try:
        model = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=rules.ignore_merges)
    except Exception as error:  # tokenizers raises bare Exception: a merge that is not in the vocabulary
        raise damaged(path, f"its merges do not fit its tokens ({error})") from error
    tokenizer = Tokenizer(model)
    if rules.normalize_nfc:
        tokenizer.normalizer = normalizers.NFC()
    if rules.patterns == (_GPT2,):
        # ByteLevel has GPT-2's pattern built in, several times faster than the same as a Regex.
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rules.single_digits else []
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rules.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rules.add_bos


def _sentencepiece_tokenizer(vocabulary: _Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    prefix_space = bool(vocabulary.gguf.metadata.get("tokenizer.ggml.add_space_prefix", True))
    all_bytes = all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256))
    unknown = vocabulary.special("unknown")
    if unknown is None and _UNKNOWN in vocabulary.kinds:
        unknown = vocabulary.tokens[vocabulary.kinds.index(_UNKNOWN)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_from_scores(vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=all_bytes,
        )
    )
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix_space else []
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        undo.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Sentencepiece merges whichever neighbours make the token of the best score.

    As merges: every way to cut a token into two tokens, ordered by the score of the whole.
    """
    scores = vocabulary.field("scores")
    if len(scores) != len(vocabulary.tokens):
        raise damaged(
            vocabulary.gguf.path, f"it has {len(vocabulary.tokens)} tokens and {len(scores)} scores"
        )
    ids = vocabulary.ids
    apart = {_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}
    found: list[tuple[float, int, int, str, str]] = []
    for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, scores, strict=True):
        if kind in apart:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _added_entries(vocabulary: _Vocabulary) -> list[tuple[int, dict[str, Any]]]:
    """Tokens that are matched in the text before anything else."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return [
        (index, {"content": token, **plain, "special": kind == _CONTROL})
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]


def _add_special_tokens(tokenizer: Any, vocabulary: _Vocabulary) -> None:
    from tokenizers import AddedToken

    # One call for both kinds keeps ids in order; `special` on the token itself tells them apart.
    tokenizer.add_tokens([AddedToken(**entry) for _, entry in _added_entries(vocabulary)])


def _surround_with(tokenizer: Any, vocabulary: _Vocabulary, add_bos: bool, add_eos: bool) -> None:
    """Let the tokenizer put a bos and an eos around a text, where the model wants that."""
    from tokenizers import processors

    before = vocabulary.special("bos") if add_bos else None
    after = vocabulary.special("eos") if add_eos else None
    if (add_bos and before is None) or (add_eos and after is None):
        raise damaged(vocabulary.gguf.path, "its tokenizer adds a bos or eos token that it does not define")
    around = [token for token in (before, after) if token is not None]
    if not around:
        return
    single = [*([before] if before else []), "$A", *([after] if after else [])]
    pair = [*single, *([before] if before else []), "$B", *([after] if after else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, vocabulary.ids[token]) for token in dict.fromkeys(around)],
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
