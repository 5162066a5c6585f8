"""Penalties, bias, bans and masks against transformers' own processors and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from octavo.sampling.batch import Bitmask, bad_word_spellings, mask_words
from octavo.sampling.processors import apply_bitmask, apply_processors
from octavo.sampling_params import SamplingParams
from tests.sampling.helpers import make_batch, random_logits

VOCAB = 101
INF = float("inf")


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(3, VOCAB)
    histories = [[1, 2, 3, 3], [50], [100, 0, 7, 7, 7, 9]]
    penalties = [1.3, 0.7, 5.0]
    params = [SamplingParams(repetition_penalty=penalty) for penalty in penalties]
    found = logits.clone()
    apply_processors(found, make_batch(params, vocab_size=VOCAB, histories=histories))
    for row, (penalty, history) in enumerate(zip(penalties, histories, strict=True)):
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([history]), logits[row : row + 1].clone()
        )
        torch.testing.assert_close(found[row], theirs[0])


def test_presence_and_frequency_follow_the_openai_formula_on_output_only() -> None:
    logits = random_logits(2, VOCAB)
    history = [4, 4, 5, 6, 6, 7, 6]  # prompt 4 4 5, output 6 6 7 6
    params = [SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)] * 2
    batch = make_batch(params, vocab_size=VOCAB, histories=[history, history], prompt_lengths=[3, 7])
    found = logits.clone()
    apply_processors(found, batch)
    expected = logits.clone()
    expected[0, 6] -= 3 * 0.25 + 0.5
    expected[0, 7] -= 1 * 0.25 + 0.5
    torch.testing.assert_close(found, expected)


def test_penalties_together_apply_repetition_first() -> None:
    logits = torch.full((1, VOCAB), 2.0)
    params = [SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=1.0)]
    batch = make_batch(params, vocab_size=VOCAB, histories=[[3, 4, 4]], prompt_lengths=[1])
    apply_processors(logits, batch)
    assert logits[0, [3, 4, 5]].tolist() == [1.0, 1.0 - 2.0 - 0.5, 2.0]


def test_drafts_in_front_of_a_row_are_part_of_its_history() -> None:
    """Three rows of one slot, as a verify step has them: each sees one draft more."""
    from octavo.sampling.batch import SamplingSlots, compile_params

    slots = SamplingSlots(4)
    params = SamplingParams(presence_penalty=1.0)
    slots.put(2, compile_params(params, seed=0, num_prompt_tokens=2, vocab_size=VOCAB))
    table = torch.zeros(4, 16, dtype=torch.int32)
    table[2, :5] = torch.tensor([9, 9, 20, 21, 22], dtype=torch.int32)
    batch = slots.batch(np.array([2, 2, 2]), torch.tensor([3, 4, -1]), table)
    logits = torch.zeros(3, VOCAB)
    apply_processors(logits, batch)
    assert torch.nonzero(logits).tolist() == [[0, 20], [1, 20], [1, 21]]


def test_ids_outside_the_vocabulary_do_not_break_penalties() -> None:
    logits = torch.ones(1, 8)
    params = [SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)]
    apply_processors(logits, make_batch(params, vocab_size=8, histories=[[3, 9, 200]], prompt_lengths=[1]))
    assert logits.tolist() == [[1, 1, 1, 0.5, 1, 1, 1, 1]]


def test_logit_bias_and_bans() -> None:
    logits = torch.zeros(2, VOCAB)
    params = [
        SamplingParams(logit_bias={3: 5.0, 100: -100.0}, min_tokens=2, max_tokens=5),
        SamplingParams(logit_bias={4: 1.5}),
    ]
    batch = make_batch(
        params, vocab_size=VOCAB, histories=[[1, 1, 1], [1]], prompt_lengths=[2, 1], stop_ids=[2, 3]
    )
    apply_processors(logits, batch)
    assert logits[0, [2, 3, 100]].tolist() == [-INF, -INF, -100.0]  # bias does not lift a ban
    assert logits[1, [2, 3, 4]].tolist() == [0.0, 0.0, 1.5]
    # two tokens generated: stopping is allowed
    batch = make_batch(
        params[:1], vocab_size=VOCAB, histories=[[1, 1, 1, 1]], prompt_lengths=[2], stop_ids=[2]
    )
    assert batch.banned is None


@pytest.mark.parametrize("history", [[5, 6], [6], [9, 5, 6, 7], [7, 7, 7]])
def test_bad_words_equal_transformers(history: list[int]) -> None:
    words = [[8], [6, 9], [5, 6, 10], [5, 6, 7, 11], [7, 7, 7, 7, 12], [13, 14]]
    logits = random_logits(1, VOCAB)
    theirs = NoBadWordsLogitsProcessor(words, eos_token_id=99)(torch.tensor([history]), logits.clone())
    batch = make_batch([SamplingParams()], vocab_size=VOCAB, histories=[history], bad_words_ids=[*words, []])
    apply_processors(logits, batch)
    assert torch.equal(logits == -INF, theirs == -INF)


def test_bad_words_are_spelled_with_and_without_a_space() -> None:
    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    assert bad_word_spellings(["ab", " ab", "c", " "], encode) == [(97, 98), (32, 97, 98), (99,), (32, 99)]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 97])
def test_masks(vocab_size: int) -> None:
    allowed = sorted({0, vocab_size - 1, vocab_size // 2})
    words = mask_words(allowed, vocab_size)
    assert words.shape == (-(-vocab_size // 32),)
    logits = torch.zeros(2, vocab_size)
    apply_bitmask(logits, Bitmask(torch.tensor([1]), torch.from_numpy(words)[None]))
    assert torch.nonzero(logits[1] == 0)[:, 0].tolist() == allowed
    assert bool((logits[0] == 0).all())


def test_a_mask_shorter_than_the_vocabulary_bans_the_rest() -> None:
    logits = torch.zeros(1, 70)
    apply_bitmask(logits, Bitmask(torch.tensor([0]), torch.tensor([[-1, 5]], dtype=torch.int32)))
    assert torch.nonzero(logits[0] == 0)[:, 0].tolist() == [*range(32), 32, 34]


def test_grammar_and_allowed_ids_are_both_obeyed() -> None:
    batch = make_batch([SamplingParams(allowed_token_ids=[1, 2, 3])], vocab_size=VOCAB)
    words = torch.from_numpy(mask_words([2, 3, 4], VOCAB))[None]
    batch.grammar = Bitmask(torch.tensor([0]), words)
    logits = torch.zeros(1, VOCAB)
    apply_processors(logits, batch)
    assert torch.nonzero(logits[0] == 0)[:, 0].tolist() == [2, 3]
