"""A machine, texts and a scheduler's loop, all made up, to see what a draft policy is worth.

The machine has a true cost curve; what the policy sees of it is noisy and now and then five times
as long. A text decides for each of its tokens, in advance, whether a draft of it would be right, so
that all policies meet the same luck. The score is true seconds, without the noise.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count as steps_from

from octavo.core.acceptance import MAX_DRAFTS
from octavo.core.cost_model import CostModel
from octavo.core.draft_plan import DraftPlan, DraftPolicy, DraftState, StepFacts, StepResult
from octavo.core.messages import DraftPasses

Rate = Callable[[int, int], float]  # (draft position, token index) -> conditional acceptance


def curve(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Straight lines between the points and beyond the last; flat before the first."""
    xs, ys = [x for x, _ in points], [y for _, y in points]

    def value(x: float) -> float:
        if x <= xs[0]:
            return ys[0]
        high = min(bisect_left(xs, x), len(xs) - 1)
        slope = (ys[high] - ys[high - 1]) / (xs[high] - xs[high - 1])
        return ys[high - 1] + slope * (x - xs[high - 1])

    return value


def padded(value: Callable[[float], float], sizes: Sequence[int]) -> Callable[[float], float]:
    """The same of the next larger size, as long as there is one."""

    def at_size(x: float) -> float:
        return value(sizes[bisect_left(sizes, x)] if x <= sizes[-1] else x)

    return at_size


@dataclass
class Machine:
    """True seconds of a target step and of a draft pass, and how badly they are seen."""

    target: Callable[[float], float]
    draft_pass: Callable[[float], float]
    kv_token: float
    knots: tuple[int, ...]
    noise: float = 0.05
    outliers: float = 0.01
    draft_kv: float = 1 / 6  # of kv_token, that a draft pass takes
    sizes: tuple[int, ...] = ()  # that steps are padded to, and draft passes
    draft_sizes: tuple[int, ...] = ()

    @property
    def draft_kv_token(self) -> float:
        """Seconds of a draft pass to read one token's KV."""
        return self.draft_kv * self.kv_token

    def models(
        self, with_draft: bool, error: float = 0.0, seed: int = 0
    ) -> tuple[CostModel, CostModel | None]:
        """What the start-up measures: wrong by up to `error`, at each number of rows anew."""
        rng = random.Random(seed)

        def table(value: Callable[[float], float]) -> list[tuple[int, float]]:
            return [(rows, value(rows) * (1 + error * rng.uniform(-1, 1))) for rows in self.knots]

        draft = None
        if with_draft:
            draft = CostModel(table(self.draft_pass), self.draft_kv_token, self.draft_sizes)
        return CostModel(table(self.target), self.kv_token, self.sizes), draft

    def seen(self, seconds: float, rng: random.Random) -> float:
        factor = 5.0 if rng.random() < self.outliers else rng.lognormvariate(0.0, self.noise)
        return seconds * factor


_CPU = curve([(1, 9e-3), (4, 10e-3), (16, 16e-3), (64, 50e-3), (128, 100e-3)])
_GPU = curve([(1, 8e-3), (128, 8.6e-3), (512, 28e-3)])
# One H200 with an 8B model and a 0.6B one to draft, as measured. A token's KV is nearly the same in both.
_H200 = [
    (1, 4.07), (2, 4.15), (4, 4.28), (6, 4.36), (8, 4.4), (16, 4.42), (32, 4.7), (64, 4.85), (80, 5.3),
    (128, 5.4), (192, 6.5), (256, 7.3), (320, 8.8), (384, 9.9), (512, 12.0), (8192, 177.0),
]  # fmt: skip
_H200_DRAFT = [(1, 0.7), (4, 0.75), (16, 0.95), (32, 1.05), (64, 1.3), (128, 1.7), (512, 2.6), (8192, 22.0)]
_GRAPHS = (1, 2, 4, 6, 8, 16, 32, 64, 96, 128, 160, 192, 256, 384, 512)
_DRAFT_GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 640, 1280)
H200 = Machine(
    padded(curve([(rows, 1e-3 * ms) for rows, ms in _H200]), _GRAPHS),
    padded(curve([(rows, 1e-3 * ms) for rows, ms in _H200_DRAFT]), _DRAFT_GRAPHS),
    32e-9,
    (*_GRAPHS, 1024, 2048, 4096),
    noise=0.01,
    outliers=0.002,
    draft_kv=0.8,
    sizes=_GRAPHS,
    draft_sizes=_DRAFT_GRAPHS,
)
CPU = Machine(_CPU, lambda n: _CPU(n) / 6, 1e-7, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
GPU = Machine(_GPU, lambda n: _GPU(n) / 6, 1e-8, (1, 8, 32, 64, 128, 256, 512, 1024))


def constant(rate: float) -> Rate:
    return lambda position, token: rate


class Text:
    """One request: how long it becomes and which drafts of it are right."""

    def __init__(
        self, name: str, length: int, rate: Rate, seed: int, *, match: float = 1.0, prompt: int = 0
    ) -> None:
        rng = random.Random(f"{seed} {name}")
        self.name = name
        self.length = length
        self.rate = rate
        self.match = match
        self.prompt = prompt
        self.coins = [rng.random() for _ in range(length + MAX_DRAFTS + 2)]
        self.match_coins = [rng.random() for _ in range(length + MAX_DRAFTS + 2)]
        self.tokens = 0
        self.inflight = 0
        self.proposed = 0
        self.state: DraftState | None = None

    def draft(self, asked: int) -> int:
        """Drafts really made."""
        if asked <= 0 or self.match_coins[self.tokens] >= self.match:
            return 0
        return asked

    def accept(self, drafted: int) -> int:
        accepted = 0
        while accepted < drafted:
            token = self.tokens + accepted
            if self.coins[token] >= self.rate(accepted, token):
                break
            accepted += 1
        return accepted


@dataclass
class Outcome:
    tokens: int = 0
    seconds: float = 0.0
    drafts: int = 0
    counts: list[list[int]] = field(default_factory=list)  # drafts asked for, by step
    plans: list[DraftPlan] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Fixed:
    """Always K drafts: what the budget is compared with."""

    def __init__(self, count: int) -> None:
        self.count = count

    def add(
        self,
        request_id: str,
        *,
        lookup: str | None = None,
        model: str | None = None,
        fixed: int | None = None,
    ) -> DraftState:
        return DraftState(request_id, None, None, self.count)

    def rests(self, num_requests: int) -> bool:
        return False

    def plan(self, facts: StepFacts) -> DraftPlan:
        counts = [min(self.count, room) for room in facts.rooms]
        return DraftPlan(facts.states, counts, passes=max(counts, default=0))

    def observe(self, result: StepResult) -> None:
        pass

    def observe_rest(self, num_requests: int, kv_tokens: int, target_seconds: float) -> None:
        pass


def simulate(
    policy: DraftPolicy,
    machine: Machine,
    arrivals: Callable[[int, int], list[Text]],
    *,
    model: bool = False,
    reserves_rows: bool = True,
    depth: int = 1,
    max_seconds: float = 1e9,
    seed: int = 0,
    fixed: int | None = None,
    keep_plans: bool = False,
    kv_room: int = 1 << 60,
    track_owed: bool = False,
    step_rows: int = 1 << 60,
) -> Outcome:
    """Run for `max_seconds`, or until `arrivals(step, running)` brings no more and all texts ended.

    `model`: drafts come from a draft model and cost passes; else they are free. `track_owed`: it has prompts
    to catch up with, in what a step leaves of `step_rows`.
    """
    rng = random.Random(seed)
    running: list[Text] = []
    behind: dict[str, int] = {}
    outcome = Outcome()
    unread: deque[StepResult] = deque()
    for step in steps_from():
        if outcome.seconds >= max_seconds:
            break
        new = arrivals(step, len(running))
        for text in new:
            lookup, drafter = (None, "draft") if model else ("lookup", None)
            text.state = policy.add(text.name, lookup=lookup, model=drafter, fixed=fixed)
            behind[text.name] = text.prompt
        chunk_rows = sum(text.prompt for text in new)
        if not running and not new:
            break
        # What this step verifies was decided at the end of the last one.
        drafted = [text.draft(text.proposed) for text in running]
        asked = [text.proposed for text in running]
        accepted = [text.accept(count) for text, count in zip(running, drafted, strict=True)]
        rows = chunk_rows + len(running) + sum(asked if reserves_rows else drafted)
        kv_tokens = sum(text.prompt + text.tokens for text in running)
        states = [text.state for text in running if text.state is not None]
        # The plan is made before this step's outcome is known.
        sampling = running + new
        rooms = []
        for text in sampling:
            inflight = text.proposed + 1 if text in running else 1
            rooms.append(max(0, text.length - text.tokens - inflight - 1))
        facts = StepFacts(
            states=[text.state for text in sampling if text.state is not None],
            rooms=rooms,
            kv_tokens=kv_tokens,
            chunk_rows=0,
            kv_room=kv_room,
            owed=[behind[text.name] for text in sampling] if track_owed else (),
            catch_up_room=max(0, step_rows - rows),
            prompt_rows=chunk_rows,
        )
        rests = not new and not track_owed and policy.rests(len(sampling))
        plan = DraftPlan(facts.states, [0] * len(sampling)) if rests else policy.plan(facts)
        outcome.counts.append(plan.num_drafts)
        if keep_plans:
            outcome.plans.append(plan)
        target_seconds = machine.target(rows) + machine.kv_token * kv_tokens
        draft_seconds = 0.0
        if model and any(plan.num_drafts):
            draft_seconds = plan.passes * (
                machine.draft_pass(len(sampling)) + machine.draft_kv_token * kv_tokens
            )
        caught_up = sum(plan.catch_up.values())
        if caught_up:
            draft_seconds += machine.draft_pass(caught_up)
        outcome.seconds += target_seconds + draft_seconds
        for index, text in enumerate(sampling):
            text.proposed = plan.num_drafts[index]
            behind[text.name] += 1 - plan.catch_up.get(index, 0)
            if text.proposed:
                behind[text.name] = 0
        ended: list[Text] = []
        for index, text in enumerate(running):
            text.tokens += accepted[index] + 1
            outcome.tokens += accepted[index] + 1
            outcome.drafts += drafted[index]
            if text.tokens >= text.length:
                outcome.tokens -= text.tokens - text.length
                asked[index] = accepted[index]
                ended.append(text)
        for text in new:
            text.tokens += 1
            outcome.tokens += 1
        running = [text for text in sampling if text not in ended]
        unread.append(
            StepResult(
                plan=None if rests else plan,
                rows=rows,
                kv_tokens=kv_tokens,
                chunk_rows=chunk_rows,
                num_verify=len(states),
                target_seconds=machine.seen(target_seconds, rng),
                draft_seconds=machine.seen(draft_seconds, rng),
                states=states,
                asked=asked,
                drafted=drafted,
                accepted=accepted,
                passes=_passes_run(plan, len(sampling), caught_up),
            )
        )
        if len(unread) > depth:
            _tell(policy, unread.popleft())
    return outcome


def _tell(policy: DraftPolicy, result: StepResult) -> None:
    if result.plan is None and not any(result.asked) and not result.chunk_rows:
        policy.observe_rest(result.num_verify, result.kv_tokens, result.target_seconds)
    else:
        policy.observe(result)


def _passes_run(plan: DraftPlan, batch: int, caught_up: int) -> DraftPasses | None:
    """What a draft model says it ran; None if it ran nothing, or there is none."""
    rows = [batch] * plan.passes
    if caught_up:
        rows.insert(0, caught_up)
    return DraftPasses(rows) if rows else None


def closed_loop(
    batch: int,
    length: int,
    rate: Callable[[int], Rate],
    seed: int = 0,
    total: int = 1 << 60,
    **options: float,
) -> Callable[[int, int], list[Text]]:
    """`batch` requests at any time, at most `total` in all; rate(i) belongs to the i-th."""
    started = 0

    def arrivals(step: int, running: int) -> list[Text]:
        nonlocal started
        new: list[Text] = []
        while running + len(new) < batch and started < total:
            # The first ones have different lengths, so that they do not all end together.
            share = 0.3 + 0.7 * (started + 1) / batch if started < batch and batch > 1 else 1.0
            text = Text(f"t{started}", int(length * share), rate(started), seed, **options)  # type: ignore[arg-type]
            new.append(text)
            started += 1
        return new

    return arrivals


def fixed_rate(
    machine: Machine, batch: int, acceptance: float, count: int, model: bool, kv_tokens: float
) -> float:
    """Tokens a second of a fixed K, exactly, at constant acceptance."""
    tokens = batch * sum(acceptance**n for n in range(count + 1))
    seconds = machine.target(batch * (1 + count)) + machine.kv_token * kv_tokens
    if model:
        seconds += count * (machine.draft_pass(batch) + machine.draft_kv_token * kv_tokens)
    return tokens / seconds


def best_fixed_rate(
    machine: Machine, batch: int, acceptance: float, model: bool, kv_tokens: float
) -> tuple[float, int]:
    """The best K in hindsight, 0 included."""
    return max(
        (fixed_rate(machine, batch, acceptance, count, model, kv_tokens), count)
        for count in range(MAX_DRAFTS + 1)
    )
