"""Structured output: at every position, which tokens keep the text within a grammar.

The grammars (JSON schema, regular expression, Lark or GBNF grammar, list of choices) are compiled by
llguidance, an optional package that is imported when the first request asks for it. A `Matcher` lives
on the host beside its request: it takes the tokens that were drawn and fills the bit mask of those
that may come next. End-of-sequence tokens are this module's business, not the grammar's: they are
legal exactly where the grammar may end.

Everything a request can make expensive is bounded: the length of what is compiled, and by llguidance's
own limits the work of compiling and of one mask.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.engine.tokenizer import Tokenizer
from octavo.errors import RequestError

logger = logging.getLogger(__name__)

PARAM = "structured_outputs"
KINDS = ("json", "json_object", "regex", "grammar", "choice")
MAX_SOURCE_LENGTH = 2**20  # characters of a schema, regex or grammar
MAX_CACHED = 64  # compiled grammars kept
INSTALL = "pip install 'octavo[grammar]' (or: pip install llguidance)"

# Between the items of a JSON text. JSON allows any length, and small models never come back from it.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}

Row = npt.NDArray[np.int32]  # [ceil(vocab_size / 32)], bit i % 32 of word i // 32: token i is legal


class GrammarCompiler:
    """Compiles and keeps the grammars of one model. Safe to use from several threads.

    vocab_size: of the model's logits. Ids beyond the tokenizer's are never legal.
    eos_ids: the tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # Only tokens the model can draw: a padded or foreign id would be no end at all.
        self._eos_ids = tuple(sorted({i for i in eos_ids if 0 <= i < vocab_size}))
        self._num_tokens = max(vocab_size, tokenizer.vocab_size)
        self._matcher_tokenizer: Any = None
        self._cache: OrderedDict[tuple[str, str], Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, structured_outputs: Mapping[str, Any]) -> Matcher:
        """A matcher at the beginning of the text.

        structured_outputs: exactly one of
            json: a JSON schema as dict, text or pydantic class
            json_object: True, any JSON object
            regex: a regular expression that the whole text matches
            grammar: a grammar in Lark's or in GBNF notation
            choice: a list of texts

        Raises `RequestError` that names what is wrong with it, or the package to install.
        """
        kind, source = _read_source(structured_outputs)
        if not self._eos_ids:
            raise RequestError("structured_outputs needs a model that has an end-of-sequence token", PARAM)
        key = (kind, source)
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                found = self._compile(kind, source)
                self._cache[key] = found
                if len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)
            else:
                self._cache.move_to_end(key)
            return found.copy()

    def _compile(self, kind: str, source: str) -> Matcher:
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                f"structured_outputs needs the package llguidance: {INSTALL}", PARAM
            ) from error
        if self._matcher_tokenizer is None:
            self._matcher_tokenizer = _matcher_tokenizer(self._tokenizer, self._num_tokens, self._eos_ids)
        llm = llguidance.LLMatcher
        try:
            if kind == "json":
                grammar = llm.grammar_from_json_schema(source, defaults=_JSON_OPTIONS)
            elif kind == "regex":
                grammar = llm.grammar_from_regex(source)
            elif kind == "choice":
                # Lark writes strings as JSON does. One terminal (in capitals) is one regular expression,
                # which copes with thousands of choices.
                texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(source))
                grammar = llm.grammar_from_lark("start: CHOICE\nCHOICE: " + texts)
            else:
                grammar = llguidance.grammar_from("grammar", source)
        except (ValueError, RecursionError) as error:
            raise _refused(kind, str(error)) from error
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llm(self._matcher_tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(kind, matcher.get_error())
        result = Matcher(matcher, self._vocab_size, self._num_tokens, self._eos_ids)
        result.fill_mask(
            np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        )  # copies start with a warm mask
        if result.error is not None:
            raise _refused(kind, result.error)
        return result


class Matcher:
    """How far one output has come in its grammar.

    Nothing here raises for what a model draws: a token that is not legal is not accepted. A grammar that
    exceeds its limits half-way sets `error`, and from then on no token is legal.
    """

    def __init__(self, matcher: Any, vocab_size: int, num_tokens: int, eos_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._eos_ids = eos_ids
        self._num_accepted = 0  # tokens the grammar holds, the end not counted
        self._ended = False  # an end-of-sequence token was accepted
        self.error: str | None = None
        # The grammar's own mask covers the tokenizer's ids, which may be more than the model's.
        own_words = -(-num_tokens // 32)
        self._scratch = np.zeros(own_words, dtype=np.int32) if own_words != self._num_words else None
        self._last_word = _bits_below(vocab_size % 32 or 32)
        self._eos_row = np.zeros(self._num_words, dtype=np.int32)
        for token_id in eos_ids:
            self._eos_row.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)

    def copy(self) -> Matcher:
        """An independent matcher at the same place."""
        other = Matcher.__new__(Matcher)
        other.__dict__.update(self.__dict__)
        other._matcher = self._matcher.deep_copy()
        if self._scratch is not None:
            other._scratch = self._scratch.copy()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Matcher:
        return self.copy()

    @property
    def may_end(self) -> bool:
        """True if the text is complete as it is, whether or not it may go on."""
        return self._ended or (self.error is None and bool(self._matcher.is_accepting()))

    @property
    def is_finished(self) -> bool:
        """True if nothing but an end-of-sequence token may follow, or one has been accepted."""
        return self._ended or (self.may_end and bool(self._matcher.is_stopped()))

    def accept(self, tokens: Sequence[int]) -> int:
        """Go on with `tokens`, as far as they are legal; returns how many were."""
        for index, token_id in enumerate(tokens):
            if self._ended or self.error is not None:
                return index
            if token_id in self._eos_ids:
                if not self._matcher.is_accepting():
                    return index
                self._ended = True
            elif not 0 <= token_id < self._vocab_size or not self._matcher.try_consume_tokens([token_id]):
                self._note_error()
                return index
            else:
                self._num_accepted += 1
        return len(tokens)

    def rollback(self, num_tokens: int) -> None:
        """Take back the last accepted tokens."""
        held = self._num_accepted + self._ended
        if not 0 <= num_tokens <= held:
            raise ValueError(f"cannot take back {num_tokens} of {held} tokens")
        if num_tokens and self._ended:
            self._ended = False
            num_tokens -= 1
        if num_tokens:
            self._matcher.rollback(num_tokens)
            self._num_accepted -= num_tokens
            self._note_error()

    def fill_mask(self, row: Row) -> None:
        """Write the bit mask of the tokens that may come next into `row` [ceil(vocab_size / 32)].

        After the end, only end-of-sequence tokens are legal. With `error` no token is.
        """
        if row.shape != (self._num_words,) or row.dtype != np.int32 or not row.flags.c_contiguous:
            raise ValueError(f"the mask must be a contiguous int32 row of {self._num_words} words")
        if self._ended:
            row[:] = self._eos_row
            return
        if self.error is None:
            target = row if self._scratch is None else self._scratch
            self._matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
            self._note_error()
            if self._scratch is not None:
                words = min(len(self._scratch), self._num_words)
                row[:words] = self._scratch[:words]
            row[-1] &= self._last_word
        if self.error is not None:
            row[:] = 0
        elif not row.any():
            self.error = "the model has no token that the grammar allows here"

    def _note_error(self) -> None:
        if self.error is None and self._matcher.is_error():
            self.error = _first_lines(self._matcher.get_error()) or "the grammar is too complex"


def _read_source(structured_outputs: Mapping[str, Any]) -> tuple[str, str]:
    """(kind, text) with the kinds that differ only in spelling made one."""
    given = {key: value for key, value in structured_outputs.items() if value is not None}
    if len(given) != 1 or next(iter(given)) not in KINDS:
        found = ", ".join(map(str, given)) or "nothing"
        raise RequestError(f"structured_outputs takes exactly one of {', '.join(KINDS)}, not {found}", PARAM)
    kind, value = next(iter(given.items()))
    if kind == "json_object":
        if value is not True:
            raise RequestError("structured_outputs: json_object must be True", PARAM)
        kind, text = "json", '{"type": "object"}'
    elif kind == "json":
        text = _schema_text(value)
    elif kind == "choice":
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
            raise RequestError("structured_outputs: choice must be a list of at least one text", PARAM)
        if not all(isinstance(item, str) and item for item in value):
            raise RequestError("structured_outputs: each choice must be a text that is not empty", PARAM)
        text = json.dumps(list(dict.fromkeys(value)))
    elif not isinstance(value, str) or not value:
        raise RequestError(f"structured_outputs: {kind} must be a text that is not empty", PARAM)
    else:
        text = value
    if len(text) > MAX_SOURCE_LENGTH:
        raise RequestError(
            f"structured_outputs: {kind} has {len(text)} characters, more than {MAX_SOURCE_LENGTH}", PARAM
        )
    return kind, text


def _schema_text(value: Any) -> str:
    if isinstance(value, type) and callable(make := getattr(value, "model_json_schema", None)):
        value = make()
    try:
        if isinstance(value, (str, bytes)):
            value = json.loads(value)
        if not isinstance(value, Mapping):
            raise RequestError("structured_outputs: json must be a JSON schema that is an object", PARAM)
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"structured_outputs: json is not a JSON schema: {error}", PARAM) from error


def _matcher_tokenizer(tokenizer: Tokenizer, num_tokens: int, eos_ids: tuple[int, ...]) -> Any:
    """llguidance's view of the vocabulary, padded to `num_tokens` (a fifth of a second for 49,152)."""
    import llguidance

    description = tokenizer.backend.to_json()
    # Its own reader knows the usual decoders, and end tokens that are in the tokenizer.
    if (
        description is not None
        and max(eos_ids) < tokenizer.vocab_size
        and tokenizer.decode_rule.kind != "opaque"
    ):
        try:
            return llguidance.LLTokenizer(description, n_vocab=num_tokens, eos_token=list(eos_ids))
        except ValueError as error:
            logger.debug(
                "llguidance cannot read the tokenizer (%s); it is given the bytes of each token", error
            )
    vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, num_tokens, eos_ids))
    return llguidance.LLTokenizer(vocabulary, eos_token=list(eos_ids))


class _Vocabulary:
    """The vocabulary as bytes, for tokenizers that llguidance cannot read itself."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, eos_ids: tuple[int, ...]) -> None:
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(num_tokens)]
        self.special_token_ids = sorted({*tokenizer.special_ids, *eos_ids})
        self._tokenizer = tokenizer
        special = set(self.special_token_ids)
        self._ids = {token: i for i, token in enumerate(self.tokens) if token and i not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Ids that spell exactly `text`, the tokenizer's own where they do (a space put in front is not it).

        Where no tokens spell it whole, those of its beginning.
        """
        data = text.encode("utf-8")
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if b"".join(self.tokens[i] for i in ids) == data:
            return ids
        ids, at = [], 0
        while at < len(data):
            for length in range(min(self._longest, len(data) - at), 0, -1):
                token_id = self._ids.get(data[at : at + length])
                if token_id is not None:
                    ids.append(token_id)
                    at += length
                    break
            else:
                break
        return ids


def _bits_below(number: int) -> np.int32:
    """An int32 with the lowest bits set, 1 to 32 of them."""
    return np.int32(2**number - 1 if number < 32 else -1)


def _refused(kind: str, reason: str) -> RequestError:
    return RequestError(f"structured_outputs: this {kind} cannot be used: {_first_lines(reason)}", PARAM)


def _first_lines(text: str) -> str:
    lines = text.split("<backtrace>")[0].split("<non-verbose")[0].strip().splitlines()
    return "\n".join(lines[:8])[:1000]
