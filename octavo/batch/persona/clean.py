"""An optional step behind the model: take away what is not the person's words.

What is generated is kept as it is; this makes a second text from it. It only ever cuts at the two ends,
so its result is a part of what was generated, in one piece and with every character as it was: nothing
is replaced, joined or normalised. Applied again it changes nothing, and it never leaves nothing over.

Taken away are
  - thoughts in front of the answer (<think>…</think>),
  - the person's own name in front of it ("Anna: "),
  - what others are made to say behind it: everything from the first line that begins with a name of
    the conversation and a colon,
  - one pair of quotation marks around all of it, and white space.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_QUOTES = {'"': '"', "“": "”", "「": "」", "『": "』", "«": "»"}
_COLON = r"[ \t]*[:：]"


def clean(text: str, name: str | None, sources: Collection[str] = ()) -> str:
    """The person's words in `text`.

    name: of the person; None where the profile has none. sources: of the turns of the conversation.
    """
    own = _label(name) if name else None
    others = _next_speaker({*sources, *([name] if name else [])} - {""})
    cleaned = text
    while True:
        before = cleaned
        cleaned = _cut(cleaned, _THOUGHTS.match(cleaned))
        if own is not None:
            cleaned = _cut(cleaned, own.match(cleaned))
        if others is not None and (found := others.search(cleaned)):
            cleaned = cleaned[: found.start()]
        cleaned = _unquoted(cleaned.strip())
        if not cleaned:  # nothing but a label, or nothing at all: whoever reads it shall see that
            return before if before.strip() else text
        if cleaned == before:
            return cleaned


def _cut(text: str, found: re.Match[str] | None) -> str:
    return text if found is None else text[found.end() :]


def _label(name: str) -> re.Pattern[str]:
    return re.compile(rf"\s*{re.escape(name)}{_COLON}")


def _next_speaker(names: Collection[str]) -> re.Pattern[str] | None:
    """A line, but not the first, that begins with a name and a colon."""
    if not names:
        return None
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile(rf"\n[ \t]*(?:{'|'.join(map(re.escape, longest_first))}){_COLON}")


def _unquoted(text: str) -> str:
    """Without the quotation marks around it, if they are one pair and there are none inside."""
    closing = _QUOTES.get(text[:1])
    if closing is None or len(text) < 2 or not text.endswith(closing):
        return text
    inside = text[1:-1]
    return text if text[0] in inside or closing in inside else inside.strip()
