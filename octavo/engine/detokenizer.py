"""The text of one output, made token by token as they arrive.

Four promises. The text is `tokenizer.decode(all output ids)` wherever no stop string cuts it. What was
given out is never taken back: half a character is held back until it is whole, and so is text that
could be the beginning of a stop string. A stop string is found however the tokens cut it, as if the
text came one character at a time, so that the result does not depend on tokens or on steps. And a
token costs the same however long the output is: nothing is decoded twice.

Three ways lead from tokens to text, after the kinds of `DecodeRule`: `_ByteLevelText`, `_PieceText`
and, for any other decoder, `_WindowText`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from octavo.engine.pieces import PieceTable
from octavo.engine.tokenizer import Tokenizer

_BROKEN = "\ufffd"  # the replacement character, which decoders write for bytes that are no text


class IncrementalDetokenizer:
    """Collects the text of one output and watches for its stop strings.

    None of the first `min_tokens` tokens can complete a stop string; the text may contain one then. If
    several stop strings end at the same character, the longest is the one that was found.

    The text stands alone, as `decode` of the output's ids would write it: decoders that strip a leading
    space strip it here too. With `continue_prompt=True` the text is what follows `prompt_token_ids`, and
    keeps that space.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        continue_prompt: bool = False,
    ) -> None:
        self.finished = False
        self.stop_reason: str | None = None  # the stop string that ended the output
        self.num_tokens = 0  # tokens of the output: up to and including the one that completed a stop string
        context = prompt_token_ids if continue_prompt else ()
        self._source = _text_source(tokenizer, skip_special_tokens, context)
        self._stops = _StopStrings(stop) if stop else None
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._parts: list[str] = []  # given out
        self._held = ""  # certain, but may be the beginning of a stop string
        self._previewed = ""  # text of an open run of bytes that the stop strings have seen
        self._before_preview: list[int] = []  # their state before it

    @property
    def text(self) -> str:
        """Everything given out so far: the sum of all deltas."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def append(self, token_ids: Sequence[int], finished: bool, stop_token: bool = False) -> str:
        """Take the next tokens and return the text that they make certain.

        `finished` says that these are the last ones. `stop_token` says that the output ended with a stop
        token, the last of these: it counts as a token and gives no text, unless stop strings are to be
        included in the output. Where a stop string is completed, `finished`, `stop_reason` and
        `num_tokens` say so, and the tokens after it are as if they never came.
        """
        if self.finished:
            return ""
        silent = stop_token and not self._include_stop
        last = len(token_ids) - 1
        delta = ""
        for index, token_id in enumerate(token_ids):
            self.num_tokens += 1
            if silent and index == last:
                break
            text = self._source.push(token_id)
            if self._stops is None:
                delta += text
            else:
                delta += self._watch(text)
                if self.stop_reason is not None:
                    break
        if finished and self.stop_reason is None:
            text = self._source.finish()
            delta += text if self._stops is None else self._watch(text)
            if self.stop_reason is None:
                delta += self._held
            self.finished = True
        if delta:
            self._parts.append(delta)
        return delta

    def _watch(self, text: str) -> str:
        """Show new text to the stop strings; return what can be given out."""
        stops = self._stops
        assert stops is not None
        may_stop = self.num_tokens > self._min_tokens
        if not text:
            return self._watch_preview(stops, may_stop)
        seen = 0
        if self._previewed:  # the run of bytes is closed: the preview came true, or the bytes were no text
            if text.startswith(self._previewed):
                seen = len(self._previewed)
            else:
                stops.matched = self._before_preview
            self._previewed = ""
        found = stops.feed(text[seen:], may_stop)
        if found is not None:
            return self._cut(text, seen, found)
        text = self._held + text
        hold = 0 if self._include_stop else max(stops.matched)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def _watch_preview(self, stops: _StopStrings, may_stop: bool) -> str:
        preview = self._source.preview
        seen = len(self._previewed)
        if len(preview) <= seen:
            return ""
        if not seen:
            self._before_preview = list(stops.matched)
        self._previewed = preview
        found = stops.feed(preview[seen:], may_stop)
        return "" if found is None else self._cut(preview, seen, found)

    def _cut(self, text: str, seen: int, found: _Found) -> str:
        """The output ends with the stop string found in text[seen:]."""
        self.finished = True
        self.stop_reason = found.stop
        text = self._held + text[: seen + found.end]
        return text if self._include_stop else text[: len(text) - len(found.stop)]


class _Found(NamedTuple):
    stop: str
    end: int  # characters of the fed text up to the end of the stop string


class _StopStrings:
    """Finds stop strings in a text that comes in parts (Knuth, Morris and Pratt, one state a string).

    `matched[i]` is the length of the longest beginning of stop i that the text ends with. The greatest
    of them is what must be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self.stops = tuple(stops)
        self.matched = [0] * len(self.stops)
        self._fallbacks = [_fallbacks(stop) for stop in self.stops]
        self._first_characters = {stop[0] for stop in self.stops}

    def feed(self, text: str, may_stop: bool) -> _Found | None:
        """Read on; return the first stop string that ends here. Without `may_stop` it is passed over."""
        matched = self.matched
        if self._first_characters.isdisjoint(text) and not any(matched):
            return None
        for end, character in enumerate(text, 1):
            found = ""
            for i, stop in enumerate(self.stops):
                length, fallback = matched[i], self._fallbacks[i]
                while length and stop[length] != character:
                    length = fallback[length]
                if stop[length] == character:
                    length += 1
                if length == len(stop):
                    length = fallback[length]
                    if len(stop) > len(found):
                        found = stop
                matched[i] = length
            if found and may_stop:
                return _Found(found, end)
        return None


def _fallbacks(stop: str) -> list[int]:
    """For every length n: the longest proper beginning of stop[:n] that is also its end."""
    table = [0] * (len(stop) + 1)
    for n in range(2, len(stop) + 1):
        length = table[n - 1]
        while length and stop[length] != stop[n - 1]:
            length = table[length]
        table[n] = length + (stop[length] == stop[n - 1])
    return table


class _TextSource(Protocol):
    preview: str  # text that follows if no more bytes come: a stop string may already be in it

    def push(self, token_id: int) -> str:
        """Take a token; return the text that is certain now."""

    def finish(self) -> str:
        """No more tokens come: return the rest of the text, broken characters as decode writes them."""


class _ByteLevelText:
    """Tokens are bytes, the text is their UTF-8; broken bytes become U+FFFD as soon as they are known."""

    preview = ""

    def __init__(self, pieces: PieceTable) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside_character = False

    def push(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, str):
            if not self._inside_character:
                return piece
            piece = piece.encode("utf-8")
        text = self._utf8.decode(piece)
        self._inside_character = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class _PieceText:
    """Tokens are pieces of text, or single bytes that become text a run at a time.

    A run is UTF-8 as a whole or, if any of it is not, one U+FFFD for each byte. So nothing of a run is
    certain before it ends; `preview` is what it says so far.
    """

    def __init__(self, tokenizer: Tokenizer, pieces: PieceTable, follows_text: bool) -> None:
        rule = tokenizer.decode_rule
        self.preview = ""
        self._pieces = pieces
        self._run_length = 0  # bytes
        self._run_is_text = True
        self._run_text = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._strip = rule.strip_left[0]
        self._strip_left = 0 if follows_text else rule.strip_left[1]
        self._drop_from_first = "" if follows_text else rule.first_drops
        self._tokenizer = tokenizer

    def push(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, bytes):
            self._extend_run(piece)
            return ""
        if self._drop_from_first and piece:
            piece = (self._tokenizer.id_to_token(token_id) or "").replace(self._drop_from_first, "")
            self._drop_from_first = ""
        if not piece:  # a hidden token does not even end a run
            return ""
        if self._run_length:
            piece = self._end_run() + piece
        return self._stripped(piece) if self._strip_left else piece

    def _extend_run(self, data: bytes) -> None:
        self._run_length += len(data)
        if not self._run_is_text:
            return
        try:
            new = self._utf8.decode(data)
        except UnicodeDecodeError:
            self._run_is_text = False
            return
        self._run_text += new
        self.preview = self._without_leading(self._run_text)[0]

    def _end_run(self) -> str:
        try:
            self._utf8.decode(b"", True)
        except UnicodeDecodeError:
            self._run_is_text = False
        text = self._run_text if self._run_is_text else _BROKEN * self._run_length
        self._utf8.reset()
        self._run_length, self._run_is_text, self._run_text, self.preview = 0, True, "", ""
        return text

    def _stripped(self, text: str) -> str:
        text, self._strip_left = self._without_leading(text)
        return text

    def _without_leading(self, text: str) -> tuple[str, int]:
        """`text` without the characters to be stripped, and how many more of them may be."""
        left = self._strip_left
        while left and text.startswith(self._strip):
            text, left = text[1:], left - 1
        return text, 0 if text else left

    def finish(self) -> str:
        text = self._end_run()
        return self._stripped(text) if self._strip_left else text


class _WindowText:
    """Any other decoder: decode the last few tokens with and without the new one, and compare."""

    preview = ""
    MAX_WAIT = 16  # tokens; a character has at most 4 bytes, so what is broken after so many stays broken

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        self._begin = 0  # of the window: tokens whose text is known, kept as context
        self._read = 0  # tokens whose text was returned
        self._given: list[str] = []

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

    def push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        known = self._decode(self._token_ids[self._begin : self._read])
        text = self._decode(self._token_ids[self._begin :])
        if len(text) <= len(known):
            return ""
        if text.endswith(_BROKEN) and len(self._token_ids) - self._read < self.MAX_WAIT:
            return ""
        self._begin, self._read = self._read, len(self._token_ids)
        self._given.append(text[len(known) :])
        return self._given[-1]

    def finish(self) -> str:
        whole, given = self._decode(self._token_ids), "".join(self._given)
        if whole.startswith(given):
            return whole[len(given) :]
        known = self._decode(self._token_ids[self._begin : self._read])
        return self._decode(self._token_ids[self._begin :])[len(known) :]


def _text_source(tokenizer: Tokenizer, skip_special_tokens: bool, context: Sequence[int]) -> _TextSource:
    """The way to text for this tokenizer, after `context`."""
    pieces = tokenizer.pieces(skip_special_tokens)
    if tokenizer.decode_rule.kind == "bytes":
        return _ByteLevelText(pieces)
    if tokenizer.decode_rule.kind == "pieces":
        return _PieceText(tokenizer, pieces, _has_text(tokenizer, context, skip_special_tokens))
    return _WindowText(tokenizer, skip_special_tokens)


def _has_text(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool) -> bool:
    """Whether tokens decode to any text. The last few say so, unless they are all hidden ones."""
    few = 4
    return bool(token_ids) and (
        bool(tokenizer.decode(token_ids[-few:], skip_special_tokens))
        or (len(token_ids) > few and bool(tokenizer.decode(token_ids, skip_special_tokens)))
    )
