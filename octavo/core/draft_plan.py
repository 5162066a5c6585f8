"""What the scheduler and its draft policy say to one another, once a step.

    state  = policy.add(request_id, lookup="prompt_lookup")      when a request arrives
    plan   = policy.plan(StepFacts(…))                           when a step has been filled
             policy.observe(StepResult(plan, …))                 when its output was read

A step's plan is about the drafts made at its *end*; the step after it verifies them. So the rows
and the accepted drafts in a StepResult belong to the plan before, and only its draft passes to the
plan it carries. Plans are made before the outcome of their own step is known, and with a pipeline
before that of the step before as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from octavo.core.acceptance import MAX_DRAFTS, RequestAcceptance, SharedAcceptance
from octavo.core.draft_choice import NOTHING, Curve
from octavo.core.messages import DraftPasses

UNLIMITED = 1 << 60
_REFRESHED = 8


class DraftState:
    """What the budget knows of one request. Made by `DraftBudget.add`, kept by the request.

    `fixed` is the number of drafts somebody asked for, or None for the budget's own choice.
    """

    __slots__ = ("blocked", "catching_up", "chosen", "draft_seconds", "explored", "fixed", "free",
                 "lookup", "model", "num_cut", "passed", "probe", "promised", "queued", "request_id",
                 "saved_seconds", "started", "verify_seconds")  # fmt: skip

    def __init__(
        self,
        request_id: str,
        lookup: RequestAcceptance | None,
        model: RequestAcceptance | None,
        fixed: int | None,
    ) -> None:
        assert fixed is None or 0 <= fixed <= MAX_DRAFTS, "checked by the configuration"
        self.request_id = request_id
        self.lookup = lookup
        self.model = model
        self.fixed = fixed
        self.blocked = False  # the draft model cannot draft for it now
        self.catching_up = False  # it has begun to, and is not done
        self.free = NOTHING
        self.passed = NOTHING
        # Drafts a step: in steps without a prompt's chunk, and with one.
        self.chosen = [0, 0] if fixed is None else [fixed, fixed]
        self.promised = 0.0  # accepted drafts a step, as expected at the last decision
        self.num_cut = 0  # drafts asked for by `fixed` that some limit did not allow
        self.queued = False  # has records to be folded
        self.draft_seconds = 0.0  # its part of the time in which drafts were made, by their number
        self.verify_seconds = 0.0  # its part of the steps that verified drafts of it, by rows
        self.saved_seconds = 0.0  # by its accepted drafts; what the steps took longer is not in here
        self.explored = 0  # the step of the last exploration; below 0: its drafts were right
        self.probe = 1  # drafts of the next one
        self.started = (0.0, 0.0)  # the budget's clocks when it was added

    @property
    def may_explore(self) -> bool:
        """True if one draft could be made to see what it is worth."""
        return self.fixed is None and (self.lookup is not None or not self.blocked)

    @property
    def is_known(self) -> bool:
        """True if drafts of its own were seen."""
        lookup, model = self.lookup, self.model
        return (lookup is not None and lookup.num_folds > 0) or (model is not None and model.num_folds > 0)

    def update_curves(self, reserves_rows: bool) -> None:
        """Recompute the chances after records were folded or the prior changed."""
        lookup, model = self.lookup, self.model
        if lookup is not None:
            match = lookup.match
            found = lookup.chances()
            if reserves_rows:
                self.free = Curve([match * chance for chance in found])
            else:
                self.free = Curve(found, rows=match)
            self.passed = self.free
        if model is None:
            return
        if self.blocked:
            self.passed = self.free
            return
        chances = model.chances()
        if lookup is not None:  # the lookup's draft where it matches, the model's otherwise
            length = max(len(found), len(chances))
            found += [0.0] * (length - len(found))
            chances += [0.0] * (length - len(chances))
            chances = [match * a + (1.0 - match) * b for a, b in zip(found, chances, strict=True)]
        self.passed = Curve(chances)


def refresh_curves(states: Sequence[DraftState], reserves_rows: bool, turn: int) -> int:
    """Take in what all requests together showed since a request's own chances were computed.

    Those that have shown nothing themselves have the same chances; of the others, one in `_REFRESHED` has
    its turn. Returns the turn for the next call.
    """
    alike: dict[tuple[SharedAcceptance | None, SharedAcceptance | None, bool], DraftState] = {}
    known: list[DraftState] = []
    for state in states:
        if state.is_known:
            known.append(state)
            continue
        lookup, model = state.lookup, state.model
        drafters = (lookup.shared if lookup else None, model.shared if model else None, state.blocked)
        first = alike.get(drafters)
        if first is None:
            state.update_curves(reserves_rows)
            alike[drafters] = state
        else:
            state.free, state.passed = first.free, first.passed
    for _ in range(min(len(known), max(1, len(states) // _REFRESHED))):
        turn = (turn + 1) % len(known)
        known[turn].update_curves(reserves_rows)
    return turn


@dataclass(slots=True)
class StepFacts:
    """What the scheduler knows when it plans the drafts made at the end of a step.

    They are verified in the next step; `kv_tokens`, `chunk_rows` and `kv_room` are about that one,
    as well as can be told. The sequences are parallel to `states`: the requests that sample.
    """

    states: Sequence[DraftState]
    rooms: Sequence[int]  # drafts that the request's own limit allows
    kv_tokens: int  # context of all these requests
    chunk_rows: int = 0  # prompt rows that wait for the next step
    kv_room: int = UNLIMITED  # draft rows the free blocks hold without a preemption
    owed: Sequence[int] = ()  # tokens the draft model is behind; empty: none
    blocked: Mapping[int, str] = field(default_factory=dict)  # index -> why it cannot draft at all
    catch_up_room: int = UNLIMITED  # rows this step's token budget has left for catching up
    prompt_rows: int = 0  # of this very step


@dataclass(slots=True)
class DraftPlan:
    """How many drafts to make at the end of the step, and why; parallel to StepFacts.states."""

    states: Sequence[DraftState] = ()
    num_drafts: list[int] = field(default_factory=list)
    passes: int = 0  # draft model passes, if there is one
    catch_up: dict[int, int] = field(default_factory=dict)  # index -> rows the draft model computes
    gain: float = 1.0  # expected speed-up against plain decoding
    counterfactual: bool = False
    on_trial: bool = False  # more drafts than seem to pay, to see what they take
    explored: tuple[int, ...] = ()
    cut: dict[int, tuple[int, str]] = field(default_factory=dict)  # index -> (drafts wanted, why cut)
    blocked: Mapping[int, str] = field(default_factory=dict)  # as in the facts
    too_far_behind: frozenset[int] = frozenset()

    def reason(self, index: int) -> str:
        """One short line for a trace."""
        count = self.num_drafts[index]
        if index in self.cut:
            wanted, why = self.cut[index]
            return f"cut by {why}: K={count} of {wanted}"
        if index in self.blocked and not count:
            return f"plain: {self.blocked[index]}"
        if index in self.catch_up and not count:
            return f"plain: the draft model catches up {self.catch_up[index]} tokens"
        if index in self.too_far_behind and not count:
            return "plain: catching up would cost the draft model more than it brings"
        if self.states[index].fixed is not None:
            return f"fixed K={count}"
        if self.counterfactual:
            return "plain: counterfactual"
        if index in self.explored:
            return "explore"
        if count and self.on_trial:
            return f"trial: K={count}, to see what it takes"
        if count:
            return f"gain {self.gain:.2f}x at K={count}"
        if self.gain > 1.0:
            return "plain: this request's drafts are not worth their rows"
        return "plain: no drafts are worth their time"


@dataclass(slots=True)
class StepResult:
    """What a step that was read tells the budget. Sequences are parallel to `states`.

    `states` are the requests that verified drafts; `num_verify` counts the others too. `asked` are the
    drafts planned for this step and not cut by the scheduler, `drafted` those really made, `accepted`
    those accepted. For a request that ended in this step, asked = accepted: the drafts behind its end
    were not refused.
    """

    plan: DraftPlan | None  # of the drafts made at the end of this very step
    rows: int
    kv_tokens: int
    chunk_rows: int
    num_verify: int  # requests with verify rows
    target_seconds: float
    draft_seconds: float
    states: Sequence[DraftState]
    asked: Sequence[int]
    drafted: Sequence[int]
    accepted: Sequence[int]
    # Index into `states` of drafts the model made for a request that has a lookup as well.
    from_model: frozenset[int] = frozenset()
    passes: DraftPasses | None = None  # what the draft model ran at the end of this very step


class DraftPolicy(Protocol):
    """The seam of the scheduler: one `plan` a step that samples, one `observe` a step that was read.

    A step may go without a plan where `rests` says so; it is told by `observe_rest` (see DraftPlanner).
    """

    def add(
        self,
        request_id: str,
        *,
        lookup: str | None = None,
        model: str | None = None,
        fixed: int | None = None,
    ) -> DraftState: ...

    def rests(self, num_requests: int) -> bool: ...

    def plan(self, facts: StepFacts) -> DraftPlan: ...

    def observe(self, result: StepResult) -> None: ...

    def observe_rest(self, num_requests: int, kv_tokens: int, target_seconds: float) -> None: ...


@dataclass(slots=True)
class BudgetReport:
    """Since the start. Seconds are device time."""

    seconds: float = 0.0
    saved_seconds: float = 0.0  # against plain decoding; negative if speculation lost
    allowance_spent: float = 0.0  # expected seconds given to exploration and plain windows
    num_steps: int = 0
    num_speculating_steps: int = 0
    num_explored: int = 0
    num_windows: int = 0
    num_bold: int = 0  # trials of more drafts than seemed to pay
    num_cut_drafts: int = 0  # of fixed numbers
    num_cut_steps: int = 0
    num_changes: int = 0  # of the choice for the whole batch
    draft_seconds: float = 0.0  # in which drafts were made
    verify_seconds: float = 0.0  # of the rows of requests whose drafts were verified
    # Observed plain step ÷ what the model had expected, middle of the windows: how far to trust it.
    window_error: float = 0.0

    @property
    def net_speedup(self) -> float:
        """Time of plain decoding for the same tokens ÷ time taken."""
        return 1.0 + self.saved_seconds / self.seconds if self.seconds else 1.0
