"""The C kernels behind the sampler against the torch reference: same tokens, same logprobs."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.kernels.cpu.library import CpuLibraryError, load
from octavo.sampling.batch import SamplingBatch
from octavo.sampling.cpu_draw import CpuDraw
from octavo.sampling.noise import exponentials, noise_words
from octavo.sampling.processors import apply_processors
from octavo.sampling.sampler import NO_TOKEN, ProcessKernels, Sampler, TorchDraw, kept_tokens
from octavo.sampling_params import SamplingParams
from tests.sampling.helpers import make_batch, random_logits


def has_library() -> bool:
    try:
        load()
    except CpuLibraryError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_library(), reason="the C library was not built")


def is_a_near_tie(logits: torch.Tensor, batch: SamplingBatch, row: int, ours: int, theirs: int) -> bool:
    """Two tokens whose scores float32 cannot tell apart, or one at the very edge of the kept set."""
    temperature, position = float(batch.temperature[row]), int(batch.position[row])
    ids = torch.tensor([ours, theirs])
    noise = exponentials(noise_words(int(batch.seed[row]), position, ids)).log()
    scores = logits[row, ids].double() / temperature - noise
    if abs(float(scores[0] - scores[1])) < 4e-6 * max(1.0, float(scores.abs().max())):
        return True
    edges = []
    for nudge in (1 - 1e-6, 1 + 1e-6):
        top_p, min_p = float(batch.top_p[row]), float(batch.min_p[row])
        top_p = min(1.0, top_p * nudge) if top_p < 1 else 1.0
        kept = kept_tokens(logits[row], temperature, int(batch.top_k[row]), top_p, min_p * nudge)
        edges.append(set(kept.tolist()))
    return (ours in edges[0]) != (ours in edges[1]) or (theirs in edges[0]) != (theirs in edges[1])


@pytest.mark.parametrize("vocab_size", [1, 5, 130, 5003])
@pytest.mark.parametrize("scale", [0.5, 4.0, 20.0])
def test_tokens_equal_the_reference(vocab_size: int, scale: float) -> None:
    rows = 96
    logits = random_logits(rows, vocab_size, seed=vocab_size, scale=scale)
    logits[::7, : vocab_size // 2] = -math.inf
    logits[3::7] = logits[3::7].round()  # ties
    generator = torch.Generator().manual_seed(1)

    def choose(values: list[float]) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    batch = SamplingBatch(
        temperature=choose([0.0, 0.3, 0.7, 1.0, 1.7]),
        top_k=choose([0, 0, 1, 2, 40, 1000]).to(torch.int32),
        top_p=choose([1.0, 1.0, 0.95, 0.5, 0.01]),
        min_p=choose([0.0, 0.0, 0.02, 0.5, 1.0]),
        seed=torch.randint(-(2**62), 2**62, (rows,), generator=generator) * 2,
        position=torch.randint(0, 100_000, (rows,), generator=generator),
    )
    expected = TorchDraw().draw(logits, batch)
    found = CpuDraw().draw(logits, batch)
    differ = torch.nonzero(expected != found)[:, 0].tolist()
    assert len(differ) <= 1
    for row in differ:
        assert is_a_near_tie(logits, batch, row, int(expected[row]), int(found[row]))
    assert torch.equal(TorchDraw().argmax(logits), CpuDraw().argmax(logits))


def test_rows_without_a_legal_token_are_flagged_alike() -> None:
    logits = random_logits(6, 77)
    logits[1] = -math.inf
    logits[2] = math.nan
    logits[3, 40:] = math.nan
    logits[4, :40] = math.nan
    logits[5, 50] = math.inf
    for kernels in (CpuDraw(), TorchDraw()):
        for params in (SamplingParams(temperature=0), SamplingParams(top_p=0.9), SamplingParams(top_k=3)):
            tokens = Sampler(kernels)(logits.clone(), make_batch([params] * 6, vocab_size=77)).tokens.tolist()
            assert tokens[1:3] == [NO_TOKEN, NO_TOKEN]
            assert 0 <= tokens[0] < 77
            assert 0 <= tokens[3] < 40
            assert 40 <= tokens[4] < 77
            assert tokens[5] == 50


@pytest.mark.parametrize("num_top", [0, 1, 20, 64, 65, 1000])
def test_logprobs_equal_a_float32_softmax(num_top: int) -> None:
    logits = random_logits(9, 333, scale=5.0)
    logits[4] = logits[4].round()
    tokens = torch.arange(9) * 30
    tokens[8] = NO_TOKEN
    found, expected = (kernels.logprobs(logits, tokens, num_top) for kernels in (CpuDraw(), TorchDraw()))
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=2e-6)
    assert torch.equal(found.top_ids, expected.top_ids)
    assert torch.equal(found.ranks, expected.ranks)
    assert found.ranks.dtype == torch.int64


def test_a_whole_batch_through_the_sampler() -> None:
    logits = random_logits(3, 640)
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, logprobs=3, presence_penalty=1.0),
        SamplingParams(temperature=0),
        SamplingParams(min_p=0.1, allowed_token_ids=[5, 6, 639]),
    ]
    batch = make_batch(params, vocab_size=640, seeds=[1, 2, 2**64 - 1])
    found, expected = (Sampler(kernels)(logits.clone(), batch) for kernels in (CpuDraw(), TorchDraw()))
    assert torch.equal(found.tokens, expected.tokens)
    assert found.logprobs is not None
    assert expected.logprobs is not None
    ours, reference = found.logprobs[0], expected.logprobs[0]
    assert ours is not None
    assert reference is not None
    assert ours.logprob == pytest.approx(reference.logprob, abs=2e-6)
    assert (ours.rank, ours.top_ids) == (reference.rank, reference.top_ids)


def test_process_gives_the_bits_of_the_torch_functions() -> None:
    params = [
        SamplingParams(allowed_token_ids=[5, 6, 639], logit_bias={6: 3.0}),
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.1),
        SamplingParams(min_tokens=4, max_tokens=9, logit_bias={7: -2.0}, repetition_penalty=0.9),
    ]
    histories = [[1, 2], [7, 7, 9, 9, 9, 11], [7, 3, 3]]
    batch = make_batch(params, vocab_size=640, histories=histories, prompt_lengths=[1, 3, 2], stop_ids=[3])
    kernels = CpuDraw()
    assert isinstance(kernels, ProcessKernels)
    found = random_logits(3, 640)
    expected = found.clone()
    kernels.process(found, batch)
    apply_processors(expected, batch)
    assert torch.equal(found, expected)
