"""Drafts from earlier outputs: what is remembered, what is proposed, and to whom."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.core.messages import Continuation, NewSlot
from octavo.errors import ConfigError
from octavo.kernels.cpu.library import CpuLibraryError, load
from octavo.kernels.cpu.suffix import CHistory
from octavo.outputs import RequestOutput
from octavo.speculation.continued import ContinuedProposer
from octavo.speculation.lookup import PythonLookup
from octavo.speculation.suffix import MAX_CONTINUATION, History, PythonHistory, SuffixGuesser, make_history
from octavo.worker.input_batch import DeviceState
from tests.checkpoints import make_checkpoint


def has_library() -> bool:
    try:
        load()
    except CpuLibraryError:
        return False
    return True


FORMS: list[Callable[[int], History]] = [PythonHistory]
if has_library():
    FORMS.append(CHistory)


def find(history: History, tail: list[int], space: int = 0, least: float = 0.25) -> tuple[int, list[int]]:
    return history.find(tail, space, 3, 16, least, 8)


# ---------------------------------------------------------------------- the memory


@pytest.mark.parametrize("form", FORMS)
def test_what_followed_is_found(form: Callable[[int], History]) -> None:
    history = form(64)
    history.add([1, 2, 3, 4, 5, 6, 7], 0)
    assert find(history, [9, 2, 3, 4]) == (3, [5, 6, 7])
    assert find(history, [1, 2, 3, 4]) == (4, [5, 6, 7])
    assert find(history, [3, 4]) == (0, [])  # too short to say anything
    assert find(history, [9, 3, 4]) == (0, [])
    assert find(history, [4, 5, 6, 7]) == (4, [])  # nothing followed
    assert history.find([1, 2, 3], 0, 4, 16, 0.25, 8) == (0, [])


@pytest.mark.parametrize("form", FORMS)
def test_the_longest_match_wins_and_among_equals_the_most_frequent(form: Callable[[int], History]) -> None:
    history = form(256)
    for text in ([1, 2, 3, 4, 50, 51], [1, 2, 3, 4, 60, 61], [1, 2, 3, 4, 60, 62], [8, 2, 3, 4, 70, 71]):
        history.add(text, 0)
    assert find(history, [1, 2, 3, 4], least=0.5) == (4, [60])  # two of three, and then one of three
    assert find(history, [1, 2, 3, 4], least=0.3) == (4, [60, 62])  # of equal votes, the latest
    assert find(history, [8, 2, 3, 4]) == (4, [70, 71])
    assert find(history, [9, 2, 3, 4], least=0.5) == (3, [60])  # two of four


@pytest.mark.parametrize("form", FORMS)
def test_spaces_do_not_see_each_other(form: Callable[[int], History]) -> None:
    history = form(64)
    history.add([1, 2, 3, 4, 5], 0)
    assert find(history, [1, 2, 3], space=1) == (0, [])
    history.add([1, 2, 3, 7], 1)
    assert find(history, [1, 2, 3], space=0) == (3, [4, 5])
    assert find(history, [1, 2, 3], space=1) == (3, [7])


@pytest.mark.parametrize("form", FORMS)
def test_the_oldest_is_forgotten(form: Callable[[int], History]) -> None:
    history = form(32)
    history.add([1, 2, 3, 4, 5], 0)
    history.add(list(range(100, 120)), 0)
    assert find(history, [1, 2, 3]) == (3, [4, 5])
    history.add(list(range(200, 210)), 0)
    assert find(history, [1, 2, 3]) == (0, [])
    assert find(history, [200, 201, 202])[0] == 3
    history.add(list(range(300, 400)), 0)  # more than there is room for: its end stays
    assert find(history, [300, 301, 302]) == (0, [])
    assert find(history, [390, 391, 392]) == (3, [393, 394, 395, 396, 397, 398, 399])


@pytest.mark.skipif(not has_library(), reason="the C library was not built")
@pytest.mark.parametrize("seed", range(5))
def test_both_forms_find_the_same(seed: int) -> None:
    rng = random.Random(seed)
    forms: list[History] = [PythonHistory(512), CHistory(512)]
    num_found = 0
    for _ in range(60):
        text = [rng.randrange(rng.choice([2, 4])) for _ in range(rng.randint(0, 60))]
        space = rng.randrange(2)
        for form in forms:
            form.add(text, space)
        for _ in range(10):
            tail = [rng.randrange(rng.choice([2, 4])) for _ in range(rng.randint(0, 20))]
            asked = (rng.randrange(3), rng.randint(3, 8), rng.randint(8, 16), rng.choice([0.1, 0.3, 0.7]))
            found = [form.find(tail, *asked, 21) for form in forms]
            assert found[0] == found[1]
            num_found += len(found[0][1]) > 0
    assert num_found > 50


@pytest.mark.skipif(not has_library(), reason="the C library was not built")
def test_thinking_is_cheap() -> None:
    """A loose bound: some microseconds a token remembered, and a search, even where all texts are alike."""
    history, rng = make_history(1 << 18), random.Random(0)
    phrases = [[rng.randrange(1000) for _ in range(20)] for _ in range(10)]
    texts = [[token for _ in range(25) for token in rng.choice(phrases)] for _ in range(200)]
    started = time.perf_counter()
    for text in texts:
        history.add(text, 0)
    per_token = (time.perf_counter() - started) / (200 * 500)
    started = time.perf_counter()
    for text in texts:
        history.find(text[100:116], 0, 4, 16, 0.25, MAX_CONTINUATION)
    per_search = (time.perf_counter() - started) / 200
    assert per_token < 20e-6
    assert per_search < 500e-6


# ---------------------------------------------------------------------- who is told what, and when


def guesser() -> SuffixGuesser:
    made = SuffixGuesser(PythonHistory(1024))
    made.finish("old", "", list(range(1, 100)), 0, True)
    return made


def test_a_continuation_is_given_once_and_again_before_it_runs_out() -> None:
    guess = guesser()
    text = [500, 10, 11, 12, 13]
    assert guess.suggest("a", "", 2, text, False) == Continuation(2, 5, list(range(14, 14 + 64)))
    assert guess.suggest("a", "", 2, [*text, 14, 15], False) is None  # it holds
    longer = [*text, *range(14, 60)]
    found = guess.suggest("a", "", 2, longer, False)
    assert found == Continuation(2, len(longer), list(range(60, 100)))
    nearly = [*text, *range(14, 95)]
    assert guess.suggest("a", "", 2, nearly, False) is None  # nothing goes further than what is there


def test_a_continuation_that_was_wrong_asks_for_a_longer_match() -> None:
    guess = guesser()
    assert guess.suggest("a", "", 0, [500, 10, 11, 12, 13], False) is not None
    wrong = [500, 10, 11, 12, 13, 600, 21, 22, 23, 24]
    assert guess.suggest("a", "", 0, wrong, False) is None  # four tokens are no longer enough
    assert guess.suggest("b", "", 0, wrong, False) is not None  # for another request they are
    assert guess.suggest("a", "", 0, [*wrong, 25, 26, 27, 28], False) is not None


def test_a_request_whose_own_drafts_hold_is_left_alone() -> None:
    guess = guesser()
    text = [10, 11, 12, 13]
    assert guess.suggest("a", "", 0, text, True) is None
    assert guess.suggest("a", "", 0, [*text, 14], False) is not None


def test_a_request_that_moves_is_told_again() -> None:
    guess = guesser()
    text = [10, 11, 12, 13]
    assert guess.suggest("a", "", 0, text, False) is not None
    assert guess.suggest("a", "", 0, text, False) is None
    guess.moved("a")
    assert guess.suggest("a", "", 3, text, False) is not None


def test_other_spaces_are_told_nothing() -> None:
    guess = guesser()
    assert guess.suggest("a", "someone else", 0, [10, 11, 12, 13], False) is None
    guess.finish("b", "someone else", [1, 2, 3, 4, 5, 6, 7], 3, False)  # it was aborted: not kept
    assert guess.suggest("a", "someone else", 0, [1, 2, 3, 4, 5], False) is None
    guess.finish("c", "someone else", [1, 2, 3, 4, 5, 6, 7], 3, True)  # with the end of its prompt
    assert guess.suggest("d", "someone else", 0, [0, 1, 2, 3, 4], False) == Continuation(0, 5, [5, 6, 7])


def test_many_spaces_do_not_pile_up() -> None:
    guess = SuffixGuesser(PythonHistory(1 << 17))
    for number in range(5000):
        guess.finish(str(number), f"salt {number}", list(range(10)), 0, True)
    assert len(guess._spaces) == 4096
    assert guess.suggest("a", "salt 0", 0, [0, 1, 2, 3], False) is None
    assert guess.suggest("b", "salt 4999", 0, [0, 1, 2, 3], False) is not None


# ---------------------------------------------------------------------- the device's part


def entered(slot: int, text: list[int], limit: int) -> NewSlot:
    return NewSlot(slot, 1, str(slot), text, len(text), [0], 0, SamplingParams(), 0, (), limit)


def test_the_device_follows_a_continuation_while_it_holds() -> None:
    state = DeviceState(4, 100, 16, torch.device("cpu"))
    proposer = ContinuedProposer(PythonLookup(state), state)
    texts = [[1, 2, 3, 4, 5], [1, 2, 3, 9, 9], [7, 8, 7, 8, 7], [1, 2, 3, 4, 5]]
    for slot, text in enumerate(texts):
        new = entered(slot, text, 8 if slot == 3 else 60)
        state.put(new)
        proposer.enter(new)
    # Proposed when three tokens were known: 4 5 6 7 8 9; slot 1 went another way, slot 2 was not told.
    proposer.continue_with([Continuation(slot, 3, [4, 5, 6, 7, 8, 9]) for slot in (0, 1, 3)])

    def drafts(slots: list[int], counts: list[int]) -> list[list[int]]:
        proposer.propose(slots, counts)
        found = []
        for slot in slots:
            known, count = int(state.num_tokens[slot]), int(state.num_drafts[slot])
            found.append(state.tokens[slot, known : known + count].tolist())
        return found

    assert drafts([0, 1, 2, 3], [3, 3, 3, 16]) == [[6, 7, 8], [], [8, 7, 8], [6, 7, 8]]
    state.tokens[0, 5:7] = torch.tensor([6, 7], dtype=torch.int32)
    state.num_tokens[0] = 7
    assert drafts([0], [16]) == [[8, 9]]
    assert drafts([0], [0]) == [[]]
    state.tokens[0, 7] = 1
    state.num_tokens[0] = 8
    assert drafts([0], [4]) == [[]]  # it no longer holds, and the text has no match of its own
    state.finished[3] = True
    assert drafts([3], [4]) == [[]]
    proposer.leave(0)
    proposer.enter(entered(0, [1, 2, 3], 60))
    state.put(entered(0, [1, 2, 3], 60))
    assert drafts([0], [4]) == [[]]  # another request


# ---------------------------------------------------------------------- in the engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


def engine(folder: Path, **more: Any) -> LLM:
    speculative = {"method": "suffix", "num_speculative_tokens": 6, **more.pop("speculative", {})}
    options = {"dtype": "float32", "kv_cache_memory": "8MB", "speculative": speculative, **more}
    return LLM(str(folder), **options)


def accepted(output: RequestOutput) -> int:
    assert output.metrics is not None
    assert output.metrics.speculation is not None
    return output.metrics.speculation.accepted


# A sampled text that does not repeat itself, so that nothing but the history can draft it.
PARAMS = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True, seed=11)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_text_said_before_is_drafted_from_the_history(folder: Path, depth: int) -> None:
    with engine(folder, pipeline_depth=depth) as llm:
        outputs = [llm.generate("the cat", PARAMS, use_tqdm=False)[0] for _ in range(2)]
        salted = llm.generate("the cat", PARAMS.replace(cache_salt="mine"), use_tqdm=False)[0]
        again = llm.generate("the cat", PARAMS.replace(cache_salt="mine"), use_tqdm=False)[0]
    texts = {tuple(output.outputs[0].token_ids) for output in (*outputs, salted, again)}
    assert len(texts) == 1
    assert accepted(outputs[0]) < 5
    assert accepted(outputs[1]) > 30
    assert accepted(salted) == accepted(outputs[0])  # nothing of what others wrote
    assert accepted(again) > 30


def test_the_history_can_be_switched_off(folder: Path) -> None:
    with engine(folder, speculative={"history_tokens": 0}) as llm:
        outputs = [llm.generate("the cat", PARAMS, use_tqdm=False)[0] for _ in range(2)]
        assert llm._engine_parts().engine._suffix is None
    assert accepted(outputs[0]) == accepted(outputs[1]) < 5


def test_a_prediction_goes_before_the_history(folder: Path) -> None:
    with engine(folder) as llm:
        first = llm.generate("the cat", PARAMS, use_tqdm=False)[0]
        wrong = PARAMS.replace(prediction=[9] * 60)
        second = llm.generate("the cat", wrong, use_tqdm=False)[0]
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    assert accepted(second) < 5


@pytest.mark.parametrize("tokens", [-1, True, "many", 1 << 30])
def test_sizes_that_cannot_be(folder: Path, tokens: Any) -> None:
    with pytest.raises(ConfigError, match="history_tokens must be 0"):
        engine(folder, speculative={"history_tokens": tokens})
