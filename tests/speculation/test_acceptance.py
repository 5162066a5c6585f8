"""The other ways to accept a draft: by rejection sampling, and by coins for benchmarks."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.core.messages import NewSlot
from octavo.engine.stats import StatsLog
from octavo.errors import ConfigError, RequestError
from octavo.outputs import RequestOutput, SpeculationMetrics
from octavo.speculation.acceptance import RejectionAcceptance, VerifyRows
from octavo.speculation.rejection import DraftDistributions
from tests.checkpoints import make_checkpoint

DRAFTERS = "tests.speculation.drafters"
PROMPTS = ["the cat and the hat and the cat and", "one two one two one two", "in the end", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


def engine(folder: Path, speculative: dict[str, Any] | None, **more: Any) -> LLM:
    options = {"dtype": "float32", "kv_cache_memory": "8MB", **more}
    return LLM(str(folder), speculative=speculative, **options)


def speculation(output: RequestOutput) -> SpeculationMetrics:
    assert output.metrics is not None
    assert output.metrics.speculation is not None
    return output.metrics.speculation


# ---------------------------------------------------------------------- which row checks which draft


def test_rows_know_the_drafts_they_check() -> None:
    slots = np.array([3, 3, 3, 0, 5, 5, 5])
    positions = torch.tensor([10, 11, 12, 7, 20, 21, -1])  # the last draft of slot 5 was never made
    read = torch.tensor([100, 101, 102, 200, 300, 301, 0])
    rows = VerifyRows.of(slots, positions, read)
    assert rows.columns.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert rows.drafts.tolist() == [101, 102, -1, -1, 301, -1, -1]


# ---------------------------------------------------------------------- rejection


def test_distributions_are_kept_until_the_next_drafts() -> None:
    kept = DraftDistributions()
    kept.begin([1, 4])
    first, second = torch.rand(2, 5), torch.rand(1, 5)
    kept.record([1, 4], 0, first)
    kept.record([4], 1, second)
    expected = first.clone()
    first.zero_()  # a graph writes the next pass's here
    found = kept.find(np.array([1, 1, 4, 4, 4, 2]), np.array([0, 1, 0, 1, 2, 0]))
    assert found is not None
    index, probs = found
    assert index.tolist() == [0, 2, 3]
    assert torch.equal(probs, torch.cat((expected, second)))
    kept.begin([4])
    found = kept.find(np.array([1, 4]), np.array([0, 0]))
    assert found is not None
    assert found[0].tolist() == [0]
    kept.begin([1])
    assert kept.find(np.array([1, 4]), np.array([0, 0])) is None


@pytest.mark.parametrize("method", ["prompt_lookup", "predicted", f"{DRAFTERS}:Wrong"])
def test_drafters_that_are_certain_keep_the_text(folder: Path, method: str) -> None:
    params = SamplingParams(temperature=0.8, max_tokens=30, ignore_eos=True, seed=5)
    with engine(folder, None) as llm:
        plain = llm.generate(PROMPTS, params, use_tqdm=False)
    config = {"method": method, "num_speculative_tokens": 3, "acceptance": "rejection"}
    with engine(folder, config) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]


class Drawing:
    """A drafter that draws from distributions of its own, one for each token before the draft."""

    name = "drawing"

    def __init__(self, tables: Any, distributions: DraftDistributions, tokens: Sequence[int]) -> None:
        self._tables, self._distributions, self._tokens = tables, distributions, list(tokens)
        generator = torch.Generator().manual_seed(7)
        self._q = torch.zeros(512, int(max(tokens)) + 1)
        weights = torch.arange(1, len(tokens) + 1) ** 2  # the last of the tokens is its favourite
        self._q[:, self._tokens] = weights * (0.5 + torch.rand(512, len(tokens), generator=generator))
        self._q /= self._q.sum(1, keepdim=True)
        self._generator = generator
        self.num_drafts = 0

    def enter(self, new: NewSlot) -> None: ...

    def leave(self, slot: int) -> None: ...

    def propose(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        tables = self._tables
        self._distributions.begin(slots)
        for slot, count in zip(slots, counts, strict=True):
            known = int(tables.num_tokens[slot])
            count = 0 if tables.finished[slot] else min(count, int(tables.limit[slot]) - known)
            for column in range(count):
                q = self._q[int(tables.tokens[slot, known + column - 1])]
                token = int(torch.multinomial(q, 1, generator=self._generator))
                tables.tokens[slot, known + column] = token
                self._distributions.record([slot], column, q[None])
            tables.num_drafts[slot] = max(0, count)
            self.num_drafts += max(0, count)


ALLOWED, SAMPLES = [65, 70, 75, 80], 3000


def short_texts(llm: LLM) -> tuple[Counter[tuple[int, ...]], float]:
    """Three tokens of four possible ones, many times: how often each text came, and the acceptance rate."""
    one = SamplingParams(
        top_k=3,
        max_tokens=3,
        ignore_eos=True,
        allowed_token_ids=ALLOWED,
        logit_bias={65: 1.5, 70: 0.5, 80: -0.5},
    )
    params = [one.replace(seed=n) for n in range(SAMPLES)]
    outputs = llm.generate([{"prompt_token_ids": [1, 2, 3]}] * SAMPLES, params, use_tqdm=False)
    drafted = accepted = 0
    for output in outputs:
        if output.metrics is not None and output.metrics.speculation is not None:
            drafted, accepted = drafted + speculation(output).drafted, accepted + speculation(output).accepted
    return Counter(tuple(o.outputs[0].token_ids) for o in outputs), accepted / max(1, drafted)


@pytest.fixture(scope="module")
def plain_texts(folder: Path) -> Counter[tuple[int, ...]]:
    with engine(folder, None) as llm:
        return short_texts(llm)[0]


def check_distribution(plain: Counter[tuple[int, ...]], found: Counter[tuple[int, ...]]) -> None:
    """Two draws of one distribution, by chi-square; seeds are fixed, so what passes goes on passing."""
    assert found != plain
    texts = plain.keys() | found.keys()
    distance = sum((plain[t] - found[t]) ** 2 / (plain[t] + found[t]) for t in texts)
    freedom = len(texts) - 1
    assert distance < freedom + 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("depth", [0, 1])
def test_texts_with_rejection_have_the_targets_distribution(
    folder: Path, plain_texts: Counter[tuple[int, ...]], depth: int
) -> None:
    """The drafter's favourite is the target's least probable token."""
    config = {"method": "predicted", "num_speculative_tokens": 2, "acceptance": "rejection"}
    with engine(folder, config, pipeline_depth=depth) as llm:
        executor: Any = llm._engine_parts().engine.executor
        runner = executor.runner if depth == 0 else executor._runner
        assert isinstance(runner._acceptance, RejectionAcceptance)
        runner._proposer = Drawing(runner.state, runner._acceptance._distributions, ALLOWED)
        found, acceptance = short_texts(llm)
    assert 0.1 < acceptance < 0.95
    check_distribution(plain_texts, found)


@pytest.mark.parametrize("method", ["draft_model", "hybrid"])
def test_draft_models_draw_from_what_they_say(
    folder: Path, plain_texts: Counter[tuple[int, ...]], method: str, tmp_path: Path
) -> None:
    draft = make_checkpoint(tmp_path / "draft", tokenizer=True, seed=5, num_hidden_layers=1)
    config = {"method": method, "model": str(draft), "num_speculative_tokens": 2, "acceptance": "rejection"}
    with engine(folder, config) as llm:
        found, acceptance = short_texts(llm)
    assert 0.1 < acceptance < 0.999
    check_distribution(plain_texts, found)


# ---------------------------------------------------------------------- synthetic


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("method", ["prompt_lookup", f"{DRAFTERS}:Wrong"])
def test_drafts_are_accepted_at_the_given_rates(folder: Path, method: str, depth: int) -> None:
    rates = [0.8, 0.5, 0.9]
    config = {"method": method, "num_speculative_tokens": 4, "synthetic_acceptance_rates": rates}
    params = [SamplingParams(max_tokens=100, ignore_eos=True, temperature=0, seed=n) for n in range(60)]
    with engine(folder, config, pipeline_depth=depth) as llm:
        outputs = llm.generate([PROMPTS[0]] * 60, params, use_tqdm=False)
        total = llm._engine_parts().engine.speculation
        llm._engine_parts().engine.scheduler.check_integrity()
    assert total is not None
    assert total.synthetic
    assert total.drafted == sum(speculation(o).drafted for o in outputs)
    wanted = [*rates, rates[-1]]  # the last rate goes on
    found = total.conditional_acceptance_by_position
    assert len(found) == 4
    for rate, share, tries in zip(wanted, found, total.reached_by_position, strict=True):
        assert tries > 100
        assert abs(share - rate) < 4.5 * math.sqrt(rate * (1 - rate) / tries)
    for output in outputs:
        assert len(output.outputs[0].token_ids) == 100
        assert speculation(output).synthetic
        assert "SYNTHETIC" in repr(output)
        assert "SYNTHETIC" in repr(output.metrics)


@pytest.mark.parametrize(("rate", "length"), [(1.0, 5.0), (0.0, 1.0)])
def test_all_or_nothing(folder: Path, rate: float, length: float) -> None:
    config = {
        "method": f"{DRAFTERS}:Wrong", "num_speculative_tokens": 4, "synthetic_acceptance_rates": [rate],
    }  # fmt: skip
    params = SamplingParams(max_tokens=51, ignore_eos=True, temperature=0.7)
    with engine(folder, config) as llm:
        (output,) = llm.generate("a", params, use_tqdm=False)
    assert speculation(output).mean_acceptance_length == length
    assert speculation(output).acceptance_rate == rate


def test_synthetic_acceptance_is_the_same_every_time(folder: Path) -> None:
    config = {"method": "prompt_lookup", "synthetic_acceptance_rates": [0.5], "num_speculative_tokens": 3}
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0, seed=4)
    results = []
    for _ in range(2):
        with engine(folder, config) as llm:
            (output,) = llm.generate(PROMPTS[1], params, use_tqdm=False)
        results.append((output.outputs[0].token_ids, speculation(output).accepted_by_position))
    assert results[0] == results[1]


def test_synthetic_acceptance_says_what_it_is(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {"method": "prompt_lookup", "synthetic_acceptance_rates": [0.9]}
    with caplog.at_level(logging.INFO, logger="octavo"), engine(folder, config) as llm:
        parts = llm._engine_parts()
        assert any("text means nothing" in note for note in parts.notes)
        assert not parts.engine.info.enable_prefix_caching
        StatsLog(0.0, synthetic=True).step(parts.engine.scheduler)
        for _ in range(2):
            (output,) = llm.generate("the same long prompt " * 4, SamplingParams(n=2), use_tqdm=False)
        assert output.metrics is not None
        assert output.metrics.num_cached_tokens == 0
        with pytest.raises(RequestError, match="no grammar can follow both"):
            llm.generate("a", SamplingParams(structured_outputs={"regex": "a+"}), use_tqdm=False)
    assert "SYNTHETIC" in caplog.text


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"synthetic_acceptance_rates": []}, "1 to 16 numbers"),
        ({"synthetic_acceptance_rates": [0.5] * 17}, "1 to 16 numbers"),
        ({"synthetic_acceptance_rates": 0.5}, "1 to 16 numbers"),
        ({"synthetic_acceptance_rates": [0.5, 1.5]}, "1.5 is none"),
        ({"synthetic_acceptance_rates": [True]}, "True is none"),
        ({"synthetic_acceptance_rates": [float("nan")]}, "nan is none"),
        ({"synthetic_acceptance_rates": [0.5], "acceptance": "rejection"}, "nothing to reject by"),
        ({"history_tokens": 5}, "keeps no history"),
    ],
)
def test_settings_that_cannot_be(folder: Path, speculative: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine(folder, {"method": "prompt_lookup", **speculative})


def test_a_drafts_end_is_nobodys_refusal() -> None:
    metrics = SpeculationMetrics()
    for drafted, accepted in ((3, 1), (3, 3), (2, 0), (0, 0), (1, 1)):
        metrics.record(drafted, accepted)
    assert metrics.drafted_by_position == [4, 3, 2]
    assert metrics.reached_by_position == [4, 2, 1]
    assert metrics.accepted_by_position == [3, 1, 1]
    assert metrics.acceptance_by_position == [3 / 4, 1 / 3, 1 / 2]
    assert metrics.conditional_acceptance_by_position == [3 / 4, 1 / 2, 1.0]
    assert SpeculationMetrics().acceptance_by_position == []
    never = SpeculationMetrics()
    never.record(2, 0)
    assert never.conditional_acceptance_by_position == [0.0]  # the second was never put to the test
    assert never.acceptance_by_position == [0.0, 0.0]
