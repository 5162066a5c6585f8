"""A set of names in 16 bytes each behaves as a set does."""

from __future__ import annotations

import random

from octavo.batch.keys import KeySet


def test_it_holds_what_was_added_and_nothing_else() -> None:
    source = random.Random(3)
    names = [f"request-{source.randrange(10**9)}-{i}" for i in range(5000)]
    keys, real = KeySet(), set()
    for name in names + names[::7]:
        assert keys.add(name) == (name not in real)
        real.add(name)
    assert len(keys) == len(real)
    assert all(name in keys for name in names)
    assert not any(f"{name}x" in keys for name in names)


def test_any_text_is_a_name() -> None:
    keys = KeySet()
    for name in ["", " ", "ключ", "\ud800", "a\nb"]:
        assert name not in keys
        assert keys.add(name)
        assert not keys.add(name)
