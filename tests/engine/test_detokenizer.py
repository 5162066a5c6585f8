"""The text that comes token by token is the text that comes at once, and stop strings cut it alike."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.detokenizer import IncrementalDetokenizer
from octavo.engine.tokenizer import RustBackend, Tokenizer
from tests.engine import sample_tokenizers

FAMILIES = ("byte_level", "byte_fallback", "byte_fallback_unstripped", "metaspace")


@functools.cache
def tokenizer_of(family: str) -> Tokenizer:
    made = {
        "byte_level": lambda: sample_tokenizers.byte_level(),
        "byte_fallback": lambda: sample_tokenizers.byte_fallback(),
        "byte_fallback_unstripped": lambda: sample_tokenizers.byte_fallback(strip=False),
        "metaspace": lambda: sample_tokenizers.metaspace(),
        "word_piece": lambda: sample_tokenizers.word_piece(),
    }[family]()
    return Tokenizer(RustBackend(made))


def steps_of(token_ids: Sequence[int], seed: int) -> list[list[int]]:
    """The ids cut into steps of 1 to 4 tokens."""
    chance, steps, at = random.Random(seed), [], 0
    while at < len(token_ids):
        size = chance.randint(1, 4)
        steps.append(list(token_ids[at : at + size]))
        at += size
    return steps


def run(detokenizer: IncrementalDetokenizer, steps: list[list[int]]) -> list[str]:
    """All deltas; the sum of them must be the text at any time."""
    deltas = []
    for index, step in enumerate(steps):
        deltas.append(detokenizer.append(step, finished=index == len(steps) - 1))
        assert detokenizer.text == "".join(deltas)
        if detokenizer.finished:
            break
    return deltas


# Ids of any kind, with many texts among them that mean something and some ids beyond the vocabulary.
def token_ids_of(family: str) -> st.SearchStrategy[list[int]]:
    tokenizer = tokenizer_of(family)
    any_id = st.integers(0, tokenizer.vocab_size + 3)
    texts = st.text("hello wrld你好é👍🏽\u0301\n\x80▁ü<>", max_size=6)
    encoded = texts.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    return st.lists(st.one_of(st.lists(any_id, max_size=4), encoded), max_size=8).map(
        lambda parts: [token_id for part in parts for token_id in part]
    )


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_text_is_what_decode_gives(family: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(family)
    token_ids = data.draw(token_ids_of(family))
    skip = data.draw(st.booleans())
    stop = ("\x00never",) if data.draw(st.booleans()) else ()
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stop, skip_special_tokens=skip)
    run(detokenizer, steps_of(token_ids, data.draw(st.integers(0, 9))) or [[]])
    assert detokenizer.text == tokenizer.decode(token_ids, skip)
    assert detokenizer.num_tokens == len(token_ids)
    assert detokenizer.finished
    assert detokenizer.stop_reason is None


def expected_stop(
    tokenizer: Tokenizer, token_ids: list[int], stops: Sequence[str], include: bool
) -> tuple[str, str | None, int]:
    """By trying all: the fewest tokens whose text has a stop string, and the one that ends first there."""
    for count in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:count])
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
        if ends:
            end, _, stop = min(ends)
            return text[: end if include else end - len(stop)], stop, count
    return tokenizer.decode(token_ids), None, len(token_ids)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_stop_strings_are_found_wherever_they_end(family: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(family)
    token_ids = data.draw(token_ids_of(family))
    text = tokenizer.decode(token_ids).replace("\ufffd", "")
    stops = set(data.draw(st.lists(st.text("lohe你 \n", min_size=1, max_size=3), max_size=2)))
    if text:
        begin = data.draw(st.integers(0, len(text) - 1))
        stops.add(text[begin : begin + data.draw(st.integers(1, 4))])
    include = data.draw(st.booleans())
    detokenizer = IncrementalDetokenizer(tokenizer, stop=sorted(stops), include_stop_str_in_output=include)
    expected = expected_stop(tokenizer, token_ids, sorted(stops), include)
    given_out = ""
    for delta in run(detokenizer, steps_of(token_ids, data.draw(st.integers(0, 9))) or [[]]):
        given_out += delta
        assert expected[0].startswith(given_out)  # nothing was given out that had to be taken back
    assert (detokenizer.text, detokenizer.stop_reason, detokenizer.num_tokens) == expected
    assert detokenizer.append([5], True) == ""  # what comes later vanishes
    assert detokenizer.num_tokens == expected[2]


def one_by_one(
    tokenizer: Tokenizer, text: str, **options: object
) -> tuple[IncrementalDetokenizer, list[str]]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)  # type: ignore[arg-type]
    ids = tokenizer.encode(text, add_special_tokens=False)
    return detokenizer, run(detokenizer, [[token_id] for token_id in ids])


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
def test_never_half_a_character(family: str) -> None:
    _, deltas = one_by_one(tokenizer_of(family), "ok 🙂ü你 ok")
    assert "".join(deltas) == "ok 🙂ü你 ok"
    assert not any("\ufffd" in delta for delta in deltas)
    assert len([delta for delta in deltas if delta]) > 3


def test_broken_end_is_flushed_as_decode_does() -> None:
    for family in ("byte_level", "byte_fallback"):
        tokenizer = tokenizer_of(family)
        # the thumb is 4 bytes, none of them a token with others; the last byte is missing
        ids = tokenizer.encode("a👎", add_special_tokens=False)[:-1]
        detokenizer = IncrementalDetokenizer(tokenizer)
        first = detokenizer.append(ids, False)
        last = detokenizer.append([], True)
        assert "\ufffd" not in first
        assert first + last == tokenizer.decode(ids)
        assert last.endswith("\ufffd")


def test_holds_back_only_what_may_be_a_stop_string() -> None:
    tokenizer = tokenizer_of("byte_level")
    detokenizer, deltas = one_by_one(tokenizer, "a\n\nb\n\n\nUser: c", stop=["\n\nUser:"])
    assert detokenizer.text == "a\n\nb\n"
    assert detokenizer.stop_reason == "\n\nUser:"
    # the first two line ends are given out as soon as "b" shows that they are not the stop string
    so_far, seen = "", []
    for delta in deltas:
        so_far += delta
        seen.append(so_far)
    assert "a\n\nb" in seen


def test_tokens_after_the_stop_string_vanish() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("one STOP two", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["STOP"])
    assert detokenizer.append(ids, True) == "one "
    assert detokenizer.finished
    kept = ids[: detokenizer.num_tokens]
    assert "STOP" in tokenizer.decode(kept)
    assert "STOP" not in tokenizer.decode(kept[:-1])


def test_include_stop_string() -> None:
    tokenizer = tokenizer_of("byte_level")
    detokenizer, _ = one_by_one(tokenizer, "one. two.", stop=["."], include_stop_str_in_output=True)
    assert detokenizer.text == "one."


def test_the_stop_string_that_ends_first_wins_and_the_longest_of_those() -> None:
    tokenizer = tokenizer_of("byte_level")
    for stops in (["world!", "wor", "or"], ["or", "world!", "wor"]):
        detokenizer, _ = one_by_one(tokenizer, "Hello world!", stop=stops)
        assert (detokenizer.text, detokenizer.stop_reason) == ("Hello ", "wor")


def test_overlapping_beginnings() -> None:
    tokenizer = tokenizer_of("byte_level")
    detokenizer, _ = one_by_one(tokenizer, "ababacabab", stop=["abac"])
    assert detokenizer.text == "ab"


def test_no_stop_string_within_min_tokens() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("x x x x", add_special_tokens=False)
    places = [i for i, token_id in enumerate(ids) if "x" in tokenizer.decode([token_id])]
    assert len(places) == 4
    for min_tokens in range(len(ids) + 1):
        detokenizer = IncrementalDetokenizer(tokenizer, stop=["x"], min_tokens=min_tokens)
        run(detokenizer, [[token_id] for token_id in ids])
        ends = [place for place in places if place >= min_tokens]
        assert detokenizer.num_tokens == (ends[0] + 1 if ends else len(ids))
        assert (detokenizer.stop_reason == "x") is bool(ends)


def test_a_stop_string_that_begins_within_min_tokens_counts_where_it_ends() -> None:
    tokenizer = tokenizer_of("byte_fallback")
    ids = [tokenizer.backend.token_to_id(piece) or 0 for piece in ("w", "h", "e", "w")]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["he"], min_tokens=2)
    run(detokenizer, [[token_id] for token_id in ids])
    assert (detokenizer.text, detokenizer.num_tokens) == ("w", 3)


def test_min_tokens_inside_a_run_of_bytes() -> None:
    """A stop string passed over as preview is not found again when its run of bytes closes."""
    tokenizer = tokenizer_of("byte_fallback")
    ids = [tokenizer.backend.token_to_id(piece) or 0 for piece in ("<0x0A>", "<0x41>", "w", "o")]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["\n"], min_tokens=2)
    run(detokenizer, [[token_id] for token_id in ids])
    assert (detokenizer.text, detokenizer.stop_reason) == ("\nAwo", None)


def test_a_preview_that_was_no_text_is_forgotten() -> None:
    """The "A" of a run of bytes is U+FFFD in the end, because the run goes on with what is no UTF-8."""
    tokenizer = tokenizer_of("byte_fallback")
    ids = [tokenizer.backend.token_to_id(piece) or 0 for piece in ("h", "<0x41>", "<0xFF>", "w", "o")]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["h\ufffd\ufffdw", "Aw"])
    run(detokenizer, [[token_id] for token_id in ids])
    assert (detokenizer.stop_reason, detokenizer.num_tokens) == ("h\ufffd\ufffdw", 4)


def test_stop_token_counts_and_gives_no_text() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("one two", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    detokenizer.append(ids, True, stop_token=True)
    assert detokenizer.text == tokenizer.decode(ids[:-1])
    assert detokenizer.num_tokens == len(ids)
    detokenizer = IncrementalDetokenizer(tokenizer, include_stop_str_in_output=True)
    detokenizer.append(ids, True, stop_token=True)
    assert detokenizer.text == "one two"


def test_leading_space_is_kept_when_the_prompt_goes_on() -> None:
    for family in ("byte_fallback", "metaspace"):
        tokenizer = tokenizer_of(family)
        prompt = tokenizer.encode("hello", add_special_tokens=False)
        ids = tokenizer.encode("hello", add_special_tokens=False)
        alone = IncrementalDetokenizer(tokenizer, prompt)
        assert alone.append(ids, True) == "hello"
        after = IncrementalDetokenizer(tokenizer, prompt, continue_prompt=True)
        assert after.append(ids, True) == " hello"
        assert tokenizer.decode(prompt + ids) == "hello hello"
        nothing_before = IncrementalDetokenizer(tokenizer, [], continue_prompt=True)
        assert nothing_before.append(ids, True) == "hello"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(token_ids=st.lists(st.integers(0, 12), max_size=12))
def test_other_decoders(token_ids: list[int]) -> None:
    tokenizer = tokenizer_of("word_piece")
    assert tokenizer.decode_rule.kind == "opaque"
    detokenizer = IncrementalDetokenizer(tokenizer)
    deltas = run(detokenizer, [[token_id] for token_id in token_ids] or [[]])
    assert "".join(deltas) == detokenizer.text
    if not {8, 9, 10} & set(token_ids) and not {6, 7} & set(token_ids):  # marks take back the space before
        assert detokenizer.text == tokenizer.decode(token_ids)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        IncrementalDetokenizer(tokenizer_of("byte_level"), stop=["a", ""])


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
def test_cost_of_a_token_does_not_grow(family: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode("hello world, and then. ", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["\n\nUser:", "###"])

    def cost_of_many() -> float:
        best = float("inf")
        for _ in range(5):
            begin = time.thread_time()
            for _ in range(40):
                for token_id in ids:
                    detokenizer.append([token_id], False)
            best = min(best, time.thread_time() - begin)
        return best

    early = cost_of_many()
    for _ in range(4000):
        detokenizer.append(ids, False)
    assert len(detokenizer.text) > 80_000
    assert cost_of_many() < 3 * early


def test_step_of_256_requests_is_cheap(smollm2_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(smollm2_path)
    assert tokenizer is not None
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog and so on, as ever, I think. ")
    running = [IncrementalDetokenizer(tokenizer, stop=["\n\nUser:", "###"]) for _ in range(256)]
    best = float("inf")
    for token_id in ids * 3:
        begin = time.thread_time()
        for detokenizer in running:
            detokenizer.append([token_id], False)
        best = min(best, time.thread_time() - begin)
    assert best < 1e-3
