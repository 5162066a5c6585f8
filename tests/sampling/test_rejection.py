"""Rejection sampling draws from the target's distribution, whatever the drafts were drawn from."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from octavo.kernels.cpu.library import CpuLibraryError, load
from octavo.sampling import rejection
from octavo.sampling.batch import JudgedRows, SamplingBatch
from octavo.sampling.coins import CoinTable
from octavo.sampling.cpu_draw import CpuDraw
from octavo.sampling.noise import Stream, uniforms
from octavo.sampling.rejection import probabilities, reject
from octavo.sampling.sampler import DrawKernels, Sampler, TorchDraw, kept_tokens
from octavo.sampling_params import SamplingParams
from tests.sampling.helpers import make_batch, random_logits

VOCAB = 8
SAMPLES = 40_000
# Chi-square with 7 degrees of freedom exceeds this once in 10^5 times; seeds are fixed, so a test
# that passes goes on passing.
CRITICAL = 36.0

TARGET = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -1.0, 0.7, -3.0])
DRAFTS: dict[str, torch.Tensor] = {
    "the same": TARGET.clone(),
    "flat": torch.zeros(VOCAB),
    "close": TARGET + torch.tensor([0.3, -0.2, 0.1, -0.4, 0.2, 0.0, -0.1, 0.5]),
    "opposite": -TARGET,
    "nearly certain": torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 0]),
    "lacks tokens": torch.tensor([-math.inf, 1.0, 0.0, -math.inf, 0.3, 0.0, -math.inf, 1.0]),
    "smaller vocabulary": torch.tensor([0.5, 0.2, 0.0, 1.0, 0.3]),
    "larger vocabulary": torch.tensor([0.5, 0.2, 0.0, 1.0, 0.3, 0.0, 0.0, 0.0, -math.inf, -math.inf]),
}
FILTERS: dict[str, SamplingParams] = {
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.6),
    "filtered": SamplingParams(temperature=1.3, top_k=5, top_p=0.9, min_p=0.05),  # q has tokens p lacks
}


def fast_kernels() -> DrawKernels:
    try:
        return CpuDraw(load())
    except CpuLibraryError:
        return TorchDraw()


def repeated(params: SamplingParams, samples: int = SAMPLES, position: int = 9) -> SamplingBatch:
    one = make_batch([params], vocab_size=VOCAB, positions=[position])
    batch = one.take(torch.zeros(samples, dtype=torch.int64))
    batch.seed = torch.arange(samples) * 7919
    return batch


def drawn_by_rejection(target: torch.Tensor, draft: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Tokens [SAMPLES]. The draft is drawn with the target's noise, as a draft model does."""
    kernels, batch = fast_kernels(), repeated(params)
    count = len(batch.seed)
    plain = repeated(SamplingParams(temperature=1.0), count)
    drafts = kernels.draw(draft.repeat(count, 1), plain)
    coins = uniforms(batch.seed, batch.position, Stream.REJECTION)
    q = draft.softmax(0).repeat(count, 1)
    batch.judged = JudgedRows(torch.arange(count), drafts, q, coins)
    return Sampler(kernels)(target.repeat(count, 1), batch).tokens


def chi_square(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Against the probabilities `expected`; infinite where an impossible token came."""
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    wanted = expected.double() * len(tokens)
    if bool((counts[wanted == 0] > 0).any()):
        return math.inf
    possible = wanted > 0
    return float(((counts - wanted)[possible] ** 2 / wanted[possible]).sum())


def exact(params: SamplingParams) -> torch.Tensor:
    kept = kept_tokens(TARGET, params.temperature, params.top_k, params.top_p, params.min_p)
    probs = torch.zeros(VOCAB, dtype=torch.float64)
    probs[kept] = (TARGET[kept].double() / params.temperature).softmax(0)
    return probs


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("kind", FILTERS)
def test_tokens_are_the_targets(name: str, kind: str) -> None:
    params = FILTERS[kind]
    tokens = drawn_by_rejection(TARGET, DRAFTS[name], params)
    assert chi_square(tokens, exact(params)) < CRITICAL


@pytest.mark.parametrize("name", ["flat", "close", "opposite"])
def test_a_wrong_residual_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test, with refused drafts replaced by a draw from p itself, or from p without the draft."""
    params = FILTERS["plain"]
    monkeypatch.setattr(rejection, "residual", lambda p, q: p.clone())
    assert chi_square(drawn_by_rejection(TARGET, DRAFTS[name], params), exact(params)) > CRITICAL
    monkeypatch.setattr(rejection, "residual", lambda p, q: torch.where(q > p, 0.0, p))
    assert chi_square(drawn_by_rejection(TARGET, DRAFTS[name], params), exact(params)) > CRITICAL


def test_the_draws_own_noise_would_not_do_for_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft was drawn with it: what is refused, and what it is replaced by, would not be independent."""
    monkeypatch.setattr(rejection, "Stream", SimpleNamespace(RESIDUAL=Stream.DRAW))
    params = FILTERS["plain"]
    assert chi_square(drawn_by_rejection(TARGET, DRAFTS["flat"], params), exact(params)) > CRITICAL


def test_as_many_are_accepted_as_can_be() -> None:
    params = FILTERS["plain"]
    p, q = exact(params), DRAFTS["close"].softmax(0).double()
    kernels, batch = fast_kernels(), repeated(params)
    drafts = kernels.draw(DRAFTS["close"].repeat(SAMPLES, 1), repeated(SamplingParams(temperature=1.0)))
    tokens = drawn_by_rejection(TARGET, DRAFTS["close"], params)
    rate = float((tokens == drafts).double().mean())
    assert len(batch.seed) == SAMPLES
    best = float(torch.minimum(p, q).sum())
    assert abs(rate - best) < 4 * math.sqrt(best * (1 - best) / SAMPLES)


def test_rows_that_need_no_coin_keep_the_targets_own_draw() -> None:
    kernels = TorchDraw()
    params = [SamplingParams(temperature=t) for t in (0.0, 1.0, 1.0, 1.0)]
    batch = make_batch(params, vocab_size=VOCAB)
    logits = random_logits(4, VOCAB)
    logits[3] = -math.inf
    own = kernels.draw(logits, batch)
    assert own[3] == -1
    q = torch.full((4, VOCAB), 1 / VOCAB)
    q[2, 5] = 0.0  # a draft that cannot have been drawn from its q
    drafts = torch.tensor([(int(own[0]) + 1) % VOCAB, -1, 5, 2])
    judged = JudgedRows(torch.arange(4), drafts, q, torch.zeros(4))
    assert reject(logits, batch, own, judged, kernels).tolist() == own.tolist()
    greedy = make_batch([SamplingParams(temperature=0.0)] * 4, vocab_size=VOCAB)
    own = kernels.argmax(logits)
    assert reject(logits, greedy, own, judged, kernels).tolist() == own.tolist()


def test_only_the_judged_rows_change() -> None:
    kernels = TorchDraw()
    batch = make_batch([SamplingParams()] * 6, vocab_size=VOCAB, seeds=list(range(6)))
    logits = random_logits(6, VOCAB)
    own = kernels.draw(logits, batch)
    rows = torch.tensor([1, 4])
    drafts = (own[rows] + 1) % VOCAB
    q = torch.zeros(2, VOCAB).scatter_(1, drafts[:, None], 1e-6)  # coins of 0 accept anything possible
    tokens = reject(logits, batch, own, JudgedRows(rows, drafts, q, torch.zeros(2)), kernels)
    assert tokens[rows].tolist() == drafts.tolist()
    others = torch.tensor([0, 2, 3, 5])
    assert tokens[others].tolist() == own[others].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_probabilities_are_those_of_the_kept_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def choose(values: list[float]) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (64,), generator=generator)]

    logits = random_logits(64, 300, seed=seed)
    logits[::5, :100] = -math.inf
    logits[::3] = logits[::3].round()  # ties
    logits[7] = -math.inf
    logits[8, 3] = math.nan
    batch = SamplingBatch(
        temperature=choose([0.3, 0.7, 1.0, 1.7]),
        top_k=choose([0, 0, 1, 2, 40, 1000]).to(torch.int32),
        top_p=choose([1.0, 1.0, 0.95, 0.5, 0.01]),
        min_p=choose([0.0, 0.0, 0.02, 0.5, 1.0]),
        seed=torch.zeros(64, dtype=torch.int64),
        position=torch.zeros(64, dtype=torch.int64),
    )
    before = logits.clone()
    found = probabilities(logits, batch)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    for row in range(64):
        settings = [float(column[row]) for column in (batch.temperature, batch.top_p, batch.min_p)]
        kept = kept_tokens(logits[row], settings[0], int(batch.top_k[row]), settings[1], settings[2])
        expected = torch.zeros(300, dtype=torch.float64)
        if len(kept):
            expected[kept] = (logits[row, kept].double() / settings[0]).softmax(0)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-7)


def test_coins_are_uniform_and_of_their_own_stream() -> None:
    coins = uniforms(12345, torch.arange(100_000), Stream.REJECTION)
    assert float(coins.min()) > 0.0
    assert float(coins.max()) < 1.0
    counts = torch.histc(coins, bins=20, min=0.0, max=1.0)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 60.0
    others = uniforms(12345, torch.arange(100_000), Stream.SYNTHETIC)
    correlation = torch.corrcoef(torch.stack((coins, others)))[0, 1]
    assert abs(float(correlation)) < 0.02


def test_a_coin_table_remembers_each_requests_coins() -> None:
    table = CoinTable(3, 50, Stream.SYNTHETIC, torch.device("cpu"))
    table.put(1, -5, 10, 40)
    table.put(2, 2**64 - 5, 0, 50)  # the same seed, written unsigned
    slots, positions = torch.tensor([1, 2, 1, 0]), torch.tensor([10, 10, 39, -1])
    found = table.at(slots, positions)
    assert found[0] == found[1]
    assert torch.equal(found[[0, 2]], uniforms(-5, torch.tensor([10, 39]), Stream.SYNTHETIC))
