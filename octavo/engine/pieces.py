"""What one token adds to the text.

A tokenizer's decoder turns a list of token strings into text, all at once. Decoding one token at a
time, and knowing the bytes behind a token, needs the rule for a single one: `DecodeRule` reads it from
the decoder's own description, and `PieceTable` keeps its answer for every token that has come up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal


@dataclass(frozen=True)
class DecodeRule:
    """How the strings of tokens become text, read from a `tokenizers` decoder.

    bytes:  a token is a run of bytes, written in GPT-2's byte alphabet; the text is their UTF-8.
    pieces: a token is a piece of text after `replace`; `<0xNN>` tokens are bytes if `byte_fallback`.
    opaque: anything else; only the decoder itself knows.
    """

    kind: Literal["bytes", "pieces", "opaque"]
    replace: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_left: tuple[str, int] = ("", 0)  # up to so many of this character vanish from the text's start
    first_drops: str = ""  # this character vanishes from the first token (Metaspace)

    @classmethod
    def of_decoder(cls, spec: Mapping[str, Any] | None) -> DecodeRule:
        """The rule of a decoder's JSON; opaque wherever the text is not the tokens' pieces in a row."""
        steps = [] if spec is None else _flatten(spec)
        types = [step["type"] for step in steps]
        opaque = cls("opaque")
        if types in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            return cls("bytes")
        if types == ["Metaspace"]:
            mark = steps[0]["replacement"]
            drops = "" if steps[0].get("prepend_scheme", "always") == "never" else mark
            return cls("pieces", ((mark, " "),), first_drops=drops)
        if not steps:
            return opaque
        replace: list[tuple[str, str]] = []
        strip_left = ("", 0)
        order = ["Replace", "ByteFallback", "Fuse", "Strip"]
        if types != sorted(types, key=lambda name: order.index(name) if name in order else -1):
            return opaque
        for step in steps:
            if step["type"] == "Replace" and isinstance(step["pattern"].get("String"), str):
                replace.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "Strip" and step["stop"] == 0 and "Fuse" in types and not strip_left[1]:
                strip_left = (step["content"], step["start"])
            elif step["type"] not in ("ByteFallback", "Fuse"):
                return opaque
        return cls("pieces", tuple(replace), "ByteFallback" in types, strip_left)


def _flatten(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if spec["type"] == "Sequence":
        return [step for child in spec["decoders"] for step in _flatten(child)]
    return [spec]


class PieceTable(dict[int, str | bytes]):
    """Token id -> the text that the token adds, filled as tokens come.

    A str is text whatever stands beside it. Bytes are a part of a run, which becomes text together
    with its neighbours. Hidden and unknown tokens are "". The first token of a text may differ:
    `DecodeRule.strip_left` and `first_drops` are not applied here. With an opaque rule a piece is only
    the token decoded alone.
    """

    def __init__(
        self,
        rule: DecodeRule,
        id_to_token: Callable[[int], str | None],
        decode_one: Callable[[int], str],
        hidden: frozenset[int],
    ) -> None:
        super().__init__()
        self._rule = rule
        self._id_to_token = id_to_token
        self._decode_one = decode_one
        self._hidden = hidden

    def __missing__(self, token_id: int) -> str | bytes:
        piece = self[token_id] = self._make(token_id)
        return piece

    def _make(self, token_id: int) -> str | bytes:
        token = None if token_id in self._hidden else self._id_to_token(token_id)
        if token is None:
            return ""
        rule = self._rule
        if rule.kind == "opaque":
            return self._decode_one(token_id)
        if rule.kind == "bytes":
            data = bytes_of_byte_level(token)
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError:
                return data
        for old, new in rule.replace:
            token = token.replace(old, new)
        if rule.byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stands for itself."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


def bytes_of_byte_level(token: str) -> bytes:
    """The bytes of a byte-level token; a token written otherwise (an added one) is taken literally."""
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:
        return token.encode("utf-8")
