"""How sure a figure is: intervals from repetitions, and from the prompts of one run.

Two sources of chance are kept apart. *Repetitions* of the whole load tell how much a total (throughput, say)
moves from run to run: a Student t interval of their mean. *Prompts* tell how much a figure depends on which
prompts happened to be asked: a bootstrap over prompts, paired when two runs answered the same ones, so that a
long prompt is long in both. Without repetitions a total has no interval, and the report says so instead of
inventing one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from octavo.bench.metrics import t95
from octavo.bench.record import RequestRecord, RunResult

RESAMPLES = 2000
_MIN_PROMPTS = 5  # below it a bootstrap says nothing


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval; `low` and `high` are None where nothing gives one."""

    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""  # "t over n repetitions" | "bootstrap over n prompts" | ""

    @property
    def has_interval(self) -> bool:
        """True if there is an interval."""
        return self.low is not None and self.high is not None


def over_repeats(values: Sequence[float]) -> Estimate | None:
    """The mean of repetitions with a t interval; None without values."""
    if not values:
        return None
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean)
    half = t95(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, f"t over {len(values)} repetitions")


def ratio_over_repeats(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """mean(ours) ÷ mean(theirs), with an interval from the spread of the logarithms (Welch) where both have
    repetitions."""
    if not ours or not theirs or min(*ours, *theirs) <= 0:
        return None
    value = fmean(ours) / fmean(theirs)
    if len(ours) < 2 or len(theirs) < 2:
        return Estimate(value)
    logs = [[math.log(x) for x in each] for each in (ours, theirs)]
    parts = [stdev(each) ** 2 / len(each) for each in logs]
    variance = sum(parts)
    if variance == 0:
        return Estimate(value, value, value, f"t over {len(ours)} and {len(theirs)} repetitions")
    degrees = variance**2 / sum(
        part**2 / (len(each) - 1) for part, each in zip(parts, logs, strict=True) if part
    )
    half = t95(max(1, math.floor(degrees))) * math.sqrt(variance)
    method = f"t over {len(ours)} and {len(theirs)} repetitions"
    return Estimate(value, value * math.exp(-half), value * math.exp(half), method)


def by_prompt(result: RunResult, figure: Callable[[RequestRecord], float | None]) -> dict[str, float]:
    """The mean of a figure for each prompt that was answered, over repetitions."""
    values: dict[str, list[float]] = {}
    for record in result.requests:
        value = figure(record) if record.ok else None
        if value is not None:
            values.setdefault(record.prompt_id, []).append(value)
    return {prompt: fmean(each) for prompt, each in values.items()}


def bootstrap(
    values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> Estimate | None:
    """A statistic of one run with a percentile interval over its prompts.

    `statistic` maps [resamples, n] to [resamples]. None without values.
    """
    if not values:
        return None
    data = np.asarray(values, dtype=np.float64)
    value = float(statistic(data[None, :])[0])
    if len(values) < _MIN_PROMPTS:
        return Estimate(value)
    drawn = statistic(data[_indices(len(values), seed)])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), f"bootstrap over {len(values)} prompts")


def paired_ratio(theirs: Mapping[str, float], ours: Mapping[str, float], seed: int = 0) -> Estimate | None:
    """sum(theirs) ÷ sum(ours) over the prompts both answered: above 1 where ours take less.

    The interval resamples prompts, both runs together. None if no prompt was answered by both.
    """
    common = sorted(theirs.keys() & ours.keys())
    if not common:
        return None
    a = np.asarray([theirs[name] for name in common])
    b = np.asarray([ours[name] for name in common])
    if a.sum() <= 0 or b.sum() <= 0:
        return None
    value = float(a.sum() / b.sum())
    if len(common) < _MIN_PROMPTS:
        return Estimate(value)
    picks = _indices(len(common), seed)
    drawn = a[picks].sum(axis=1) / np.maximum(b[picks].sum(axis=1), 1e-12)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), f"paired bootstrap over {len(common)} prompts")


def median(rows: np.ndarray) -> np.ndarray:
    """For `bootstrap`."""
    return np.median(rows, axis=1)  # type: ignore[no-any-return]


def quantile95(rows: np.ndarray) -> np.ndarray:
    """For `bootstrap`."""
    return np.quantile(rows, 0.95, axis=1)  # type: ignore[no-any-return]


def _indices(count: int, seed: int) -> np.ndarray:
    """[RESAMPLES, count] picks with replacement; the same for the same seed."""
    return np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
