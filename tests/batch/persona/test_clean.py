"""Cleaning cuts at the ends and does nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.batch.persona.clean import clean

CASES = [
    ("  Hello there. ", "Hello there."),
    ("Anna: Hello there.", "Hello there."),
    ("Anna：你好。", "你好。"),
    ("Hello.\nBen: And you?\nAnna: Fine.", "Hello."),
    ("Anna: Hello.\n  Ben : And you?", "Hello."),
    ('"Hello there."', "Hello there."),
    ("「こんにちは。」", "こんにちは。"),
    ('Anna: "Hello."\nBen: Hi', "Hello."),
    ("<think>What would\nAnna say?</think>\n\nHello.", "Hello."),
    ("<think></think>Anna: Hello.", "Hello."),
    # What only looks like something to take away stays.
    ('"Hello," she said, "there."', '"Hello," she said, "there."'),
    ("Annabel: Hello.", "Annabel: Hello."),
    ("I told Ben: no.", "I told Ben: no."),
    ("<think>unfinished", "<think>unfinished"),
    ("First line.\n\nSecond  line,\twith ﬁ and Å.", "First line.\n\nSecond  line,\twith ﬁ and Å."),
    ("don't . stop ,", "don't . stop ,"),
    # Never nothing, where there was something.
    ("Anna:", "Anna:"),
    ('""', '""'),
    ("Anna:\nBen: Hi.", "Anna:\nBen: Hi."),
    ("   ", "   "),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_cases(text: str, expected: str) -> None:
    assert clean(text, "Anna", {"Ben", "Anna", ""}) == expected


def test_names_are_texts_and_not_patterns() -> None:
    assert clean("A.B (x): hi\nC*: no", "A.B (x)", {"C*"}) == "hi"
    assert clean("AxB (x): hi", "A.B (x)", ()) == "AxB (x): hi"


PIECES = st.sampled_from(
    [
        "Anna",
        "Ben",
        ":",
        "：",
        "\n",
        " ",
        '"',
        "“",
        "”",
        "「",
        "」",
        "<think>",
        "</think>",
        "word",
        "é",
        "中",
        "😀",
    ]
)
TEXTS = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=14).map("".join))


@given(TEXTS, st.sampled_from(["Anna", "Ben", None, "中"]), st.sets(st.sampled_from(["Ben", "Eva", ""])))
def test_the_result_is_a_piece_of_the_text_and_stays_as_it_is(
    text: str, name: str | None, sources: set[str]
) -> None:
    cleaned = clean(text, name, sources)
    assert cleaned in text
    assert clean(cleaned, name, sources) == cleaned
    assert bool(cleaned.strip()) == bool(text.strip())
