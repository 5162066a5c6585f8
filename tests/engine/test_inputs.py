"""What may be handed in as a prompt, and what is said of everything else."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from octavo.engine.inputs import Prompt, prompt_list, read_prompt
from octavo.errors import RequestError
from tests.core.fake_device import VOCAB
from tests.engine.fakes import word_tokenizer


def named(given: object) -> str:
    """A test's name, the same in every process: without the addresses of objects."""
    return re.sub(r" at 0x\w+", "", repr(given))


def read(given: Any) -> Prompt:
    return read_prompt(given, word_tokenizer(), VOCAB, 100)


@pytest.mark.parametrize(
    "given",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], dtype=np.uint8),
        [np.int64(1), np.int32(2), 3],
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 2, 3], dtype=torch.int32),
    ],
    ids=named,
)
def test_token_ids_in_any_shape_are_one_prompt(given: Any) -> None:
    items, single = prompt_list(given)
    assert single
    assert len(items) == 1
    for prompt in (items[0], given, {"prompt_token_ids": given}):
        found = read(prompt)
        assert found == Prompt(None, [1, 2, 3])
        assert all(type(token) is int for token in found.token_ids)


def test_a_text() -> None:
    assert prompt_list(" w1 w2") == ([" w1 w2"], True)
    assert read(" w1 w2") == read({"prompt": " w1 w2"}) == Prompt(" w1 w2", [1, 2])
    assert read({"prompt": "shown", "prompt_token_ids": [4]}) == Prompt("shown", [4])
    assert read({"prompt": None, "prompt_token_ids": [4]}) == Prompt(None, [4])


def test_several_prompts() -> None:
    assert prompt_list([]) == ([], False)
    mixed: Any = ["a", [1, 2]]
    assert prompt_list(mixed) == (["a", [1, 2]], False)
    texts: Any = np.array(["a", "b"])
    assert prompt_list(texts) == (["a", "b"], False)
    assert prompt_list(text for text in ("a", "b")) == (["a", "b"], False)
    numbers: Any = iter([1, 2])
    assert prompt_list(numbers) == ([[1, 2]], True)
    arrays: Any = [np.array([1, 2]), torch.tensor([3])]
    items, single = prompt_list(arrays)
    assert not single
    assert [read(item).token_ids for item in items] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "text or a list of token ids.*not NoneType"),
        (5, "text or a list of token ids.*not int"),
        (b"abc", "not bytes; give text .*or token ids"),
        (bytearray(b"abc"), "not bytearray; give text"),
        (memoryview(b"abc"), "not memoryview; give text"),
        ({1, 2}, "not set"),
        (np.array([[1, 2], [3, 4]]), "one dimension, not 2.*list"),
        (np.array(5), "one dimension, not 0"),
        (torch.tensor(5), "one dimension, not 0"),
    ],
    ids=named,
)
def test_no_prompt_at_all(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        prompt_list(given)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match=message) as caught:
        read(given)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2.5], "item 1 of the list is float, and a token id is a whole number"),
        ([True, 2], "item 0 of the list is bool"),
        ([1, None], "item 1 of the list is NoneType"),
        (np.array([1.0, 2.0]), "item 0 of the list is float"),
        (np.array([True, False]), "item 0 of the list is bool"),
        (torch.tensor([1.5]), "item 0 of the list is float"),
        (torch.tensor([True]), "item 0 of the list is bool"),
        ([2**70], "is not in the vocabulary"),
        ([-1], "token id -1 is not in the vocabulary"),
    ],
    ids=named,
)
def test_token_ids_that_are_none(given: Any, message: str) -> None:
    items, single = prompt_list(given)
    assert single
    with pytest.raises(RequestError, match=message):
        read(items[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([np.array([1, 2, 3])], "item 0 of the list is ndarray.*tolist"),
        ([torch.tensor(1.5)], "item 0 of the list is Tensor.*tolist"),
        ([b"abc"], "item 0 of the list is bytes.*give text"),
        ([object()], "item 0 of the list is object"),
        ([], "empty"),
        ("", "empty"),
        ((text for text in "ab"), "not generator"),
        ("a\ud800b", "surrogate"),
        ({}, "has the key prompt or prompt_token_ids, not"),
        ({"input_ids": [1]}, "has the key prompt or prompt_token_ids, not .'input_ids'"),
        ({"prompt": 5}, "not int"),
        ({"prompt": None}, "not NoneType"),
        ({"prompt": {"prompt": "x"}}, "not dict"),
        ({"prompt": 5, "prompt_token_ids": [1]}, "prompt beside prompt_token_ids must be the text"),
        ({"prompt_token_ids": "x"}, "must be a list of token ids, not a text"),
        ({"prompt_token_ids": b"x"}, "not bytes; give text"),
        ({"prompt_token_ids": None}, "not NoneType"),
    ],
    ids=named,
)
def test_one_prompt_that_is_none(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read(given)
    assert caught.value.param in ("prompt", None)
