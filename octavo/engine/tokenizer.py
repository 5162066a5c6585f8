"""From text to token ids and back, with the `tokenizers` library alone.

A model folder is read without transformers, whose import costs seconds: `tokenizer.json` holds the
whole pipeline, and `tokenizer_config.json` (or the older `special_tokens_map.json`) adds the names
of the special tokens, the chat template and a few switches. The result encodes and decodes as
transformers does with the same files. Transformers itself is imported only for a folder that has a
tokenizer of another make (sentencepiece, tiktoken), and a folder without any tokenizer gives None:
such a model is used with token ids.

How a single token becomes text is the question of `pieces.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import AddedToken

from octavo.engine.pieces import DecodeRule, PieceTable
from octavo.errors import CheckpointError, ModelError, RequestError

logger = logging.getLogger(__name__)

NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Any of these says that a folder without tokenizer.json has a tokenizer all the same.
OTHER_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
HOW_TO_DO_WITHOUT = (
    "name a folder that has a tokenizer with tokenizer=..., "
    "or pass skip_tokenizer_init=True and use token ids"
)


class Backend(Protocol):
    """What does the work below a `Tokenizer`: the Rust library, or a Python tokenizer of transformers."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def token_to_id(self, token: str) -> int | None: ...
    def vocab_size(self) -> int: ...
    def special_ids(self) -> frozenset[int]: ...
    def decoder_spec(self) -> dict[str, Any] | None: ...
    def to_json(self) -> str | None: ...


class RustBackend:
    """The `tokenizers` library."""

    def __init__(self, rust: tokenizers.Tokenizer) -> None:
        rust.no_truncation()  # as transformers: a length limit is the caller's decision
        rust.no_padding()
        self.rust = rust

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.rust.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        encodings = self.rust.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.rust.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        return self.rust.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.rust.token_to_id(token)

    def vocab_size(self) -> int:
        return self.rust.get_vocab_size(with_added_tokens=True)

    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.rust.get_added_tokens_decoder().items() if token.special)

    def decoder_spec(self) -> dict[str, Any] | None:
        decoder = self.rust.decoder
        return None if decoder is None else json.loads(decoder.__getstate__())

    def to_json(self) -> str | None:
        return self.rust.to_str()


class PythonBackend:
    """A tokenizer of transformers that is not built on the `tokenizers` library."""

    def __init__(self, python: Any) -> None:
        self.python = python

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.python.encode(text, add_special_tokens=add_special_tokens))

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self.python.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        if not 0 <= token_id < len(self.python):
            return None
        token: str | None = self.python.convert_ids_to_tokens(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self.python.get_vocab().get(token)
        return token_id

    def vocab_size(self) -> int:
        return len(self.python)

    def special_ids(self) -> frozenset[int]:
        return frozenset(self.python.all_special_ids)

    def decoder_spec(self) -> dict[str, Any] | None:
        return None

    def to_json(self) -> str | None:
        return None


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads."""

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        clean_up: bool = False,
        template_files: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})  # "bos_token" -> "<s>", as chat templates see them
        self.chat_template = chat_template
        self.template_files = dict(template_files or {})  # template's name -> its file in the model's folder
        self.vocab_size = backend.vocab_size()  # added tokens included
        self.special_ids = backend.special_ids()  # what skip_special_tokens leaves out
        self._clean_up = clean_up
        # Cleaning joins characters across tokens, so no rule by token can describe it.
        self.decode_rule = DecodeRule("opaque") if clean_up else DecodeRule.of_decoder(backend.decoder_spec())
        self._pieces: dict[bool, PieceTable] = {}

    @classmethod
    def from_folder(cls, path: str | Path, trust_remote_code: bool = False) -> Tokenizer | None:
        """Read the tokenizer of a model folder; None if the folder has none.

        Raises `CheckpointError` if its files are damaged, and `ModelError` if reading them needs a
        package that is not installed. `trust_remote_code` counts only where transformers is needed.
        """
        folder = Path(path)
        if (folder / "tokenizer.json").is_file():
            return _from_tokenizer_json(folder)
        if any((folder / name).is_file() for name in OTHER_TOKENIZER_FILES):
            return _from_transformers(folder, trust_remote_code)
        return None

    @cached_property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @cached_property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own begin token unless `add_special_tokens` is False."""
        try:
            return self.backend.encode(text, add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(_why_not_text(text), "prompt") from error

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for many texts at once, in parallel where the library can."""
        try:
            return self.backend.encode_batch(list(texts), add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(next(filter(None, map(_why_not_text, texts)), str(error)), "prompt") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids that the tokenizer does not have give no text."""
        try:
            text = self.backend.decode(token_ids, skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise RequestError(f"token ids must be integers from 0 up: {error}") from error
        return clean_up_spaces(text) if self._clean_up else text

    def id_to_token(self, token_id: int) -> str | None:
        """The token's string in the vocabulary, None beyond it."""
        return self.backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for in the text, whether or not they are whole characters.

        A special token gives its name, an id that the tokenizer does not have gives nothing.
        """
        piece = self.pieces(skip_special_tokens=False)[token_id]
        return piece if isinstance(piece, bytes) else piece.encode("utf-8", "surrogatepass")

    def _decode_one(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def pieces(self, skip_special_tokens: bool) -> PieceTable:
        """Token id -> its piece of text, as `PieceTable` defines it; shared by all that ask."""
        table = self._pieces.get(skip_special_tokens)
        if table is None:
            hidden = self.special_ids if skip_special_tokens else frozenset[int]()
            table = self._pieces.setdefault(
                skip_special_tokens,
                PieceTable(self.decode_rule, self.backend.id_to_token, self._decode_one, hidden),
            )
        return table


def clean_up_spaces(text: str) -> str:
    """Take out the spaces that word-piece decoding leaves before punctuation, as transformers does."""
    for mark in (".", "?", "!", ","):
        text = text.replace(" " + mark, mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(" " + ending, ending)
    return text


def _why_not_text(text: object) -> str:
    if not isinstance(text, str):
        return f"a prompt must be a str, not {type(text).__name__}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            f"the text holds half of a surrogate pair at character {error.start}, which is not valid Unicode"
        )
    return ""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object: download the file again")
    return content


def _from_tokenizer_json(folder: Path) -> Tokenizer:
    config = _read_json(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    try:
        rust = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{path} cannot be read by tokenizers {tokenizers.__version__} ({error}): download the file "
            f"again, upgrade tokenizers, or {HOW_TO_DO_WITHOUT}"
        ) from error
    if "added_tokens_decoder" not in config:  # older folders keep the names in a file of their own
        config = {**config, **_read_json(folder / "special_tokens_map.json")}
    special_tokens = _special_token_names(config)
    _add_missing_tokens(rust, config, special_tokens)
    rust.encode_special_tokens = bool(config.get("split_special_tokens", False))
    backend = RustBackend(rust)
    if config.get("add_bos_token") is True and not backend.encode("", add_special_tokens=True):
        logger.warning(
            "tokenizer_config.json asks for a begin token (add_bos_token) but tokenizer.json adds none; "
            "tokenizer.json is followed, as transformers 5 does"
        )
    is_bpe = (
        type(rust.model).__name__ == "BPE"
    )  # transformers 5 leaves BPE texts alone: cleaning corrupts them
    insists = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    clean_up = bool(config.get("clean_up_tokenization_spaces", False)) and (not is_bpe or bool(insists))
    template, files = _chat_template(folder, config)
    return Tokenizer(backend, special_tokens, template, clean_up, files)


def _special_token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Every `..._token` of the config, given as a string or as the dict of an added token."""
    names = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            names[key] = content
    return names


def _add_missing_tokens(
    rust: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Register what the config declares and tokenizer.json does not know, as transformers does."""
    known = rust.get_added_tokens_decoder()
    missing = []
    declared = config.get("added_tokens_decoder", {})
    for index in sorted(declared, key=int):
        entry = {key: value for key, value in declared[index].items() if key != "__type"}
        token = AddedToken(**entry)
        present = known.get(int(index))
        if present is None or repr(present) != repr(token):
            missing.append(token)
    contents = {token.content for token in known.values()} | {token.content for token in missing}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    entries = [special_tokens[name] for name in NAMED_SPECIAL_TOKENS if name in special_tokens]
    entries += [entry["content"] if isinstance(entry, dict) else entry for entry in extra]
    for content in dict.fromkeys(entries):
        if content not in contents:
            missing.append(AddedToken(content, special=True))
    if missing:
        rust.add_tokens(missing)


def _chat_template(
    folder: Path, config: Mapping[str, Any]
) -> tuple[str | dict[str, str] | None, dict[str, str]]:
    """One template, or several by name; and the file of each. Files of their own win over the config."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        templates = {name: _read_template(path) for name, path in files.items()}
        names = {name: path.relative_to(folder).as_posix() for name, path in files.items()}
        return (templates["default"] if list(templates) == ["default"] else templates), names
    entry, file = config.get("chat_template"), "tokenizer_config.json"
    if not entry:
        file = "chat_template.json"
        entry = _read_json(folder / file).get("chat_template")
    if isinstance(entry, list):
        entry = {named["name"]: named["template"] for named in entry}
    if isinstance(entry, dict):
        return entry, dict.fromkeys(entry, file)
    return (entry, {"default": file}) if isinstance(entry, str) else (None, {})


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"the chat template {path} cannot be read ({error}): download the file again or delete it"
        ) from error


def _from_transformers(folder: Path, trust_remote_code: bool) -> Tokenizer:
    why = f"{folder} has no tokenizer.json; its tokenizer is of a kind that only transformers can read"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"{why}: pip install transformers sentencepiece tiktoken, or {HOW_TO_DO_WITHOUT}"
        ) from error
    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the tokenizer's own code raises
        raise ModelError(
            f"{why}, and it failed ({type(error).__name__}: {error}): pip install sentencepiece tiktoken if "
            f"it is one of theirs, otherwise {HOW_TO_DO_WITHOUT}"
        ) from error
    rust = getattr(loaded, "backend_tokenizer", None)
    special_tokens = {name: str(token) for name, token in loaded.special_tokens_map.items()}
    if rust is None:
        return Tokenizer(PythonBackend(loaded), special_tokens, loaded.chat_template)
    is_bpe = type(rust.model).__name__ == "BPE"
    clean_up = bool(loaded.clean_up_tokenization_spaces) and not is_bpe
    return Tokenizer(RustBackend(rust), special_tokens, loaded.chat_template, clean_up)
